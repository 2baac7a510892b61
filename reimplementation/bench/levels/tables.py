"""The levels as tables: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line, markdown_table, ratio, three_digits

from .measure import PASSES, Figure, Pass

HEADS = (
    *("level", "pass", "time, ms", "x level 5", "call, ms", "host, us", "launches", "memory, MB", "of a copy"),
    *("first call, s", "lines", "largest error", "mean error"),
)
TEXTS = 2  # columns of words
FORMULAS = (
    "Time: on a GPU that of a replayed CUDA graph, on a CPU that of a call. Call: until the result is there. "
    "Host: what of a call the host is busy for. Memory: the most held beyond the inputs. Of a copy: the bytes of the "
    "rows that a forward gathers, over its time, as a share of what a copy of memory reads and writes; what lies in "
    "caches is read faster than that. First call: forward and backward, with whatever compiles. Lines: of the op's own "
    "code. Errors: of output and gradients against float64, as a share of the largest number."
)


def print_tables(document: Document) -> None:
    """Print a table an op, and why levels are missing."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 200, markup=False)
    for op, figures in by_op(document).items():
        table = Table(title=f"{op}: {machine_line(document)}", title_justify="left")
        for i, head in enumerate(HEADS):
            table.add_column(head, justify="left" if i < TEXTS else "right")
        for row in rows(document, figures):
            table.add_row(*row)
        console.print(table)
        for line in missing(figures):
            console.print(line, soft_wrap=True)
    console.print(FORMULAS, style="dim")


def markdown(document: Document, op: str) -> str:
    """The table of one op, and why levels are missing."""
    figures = by_op(document)[op]
    return "\n\n".join([markdown_table(HEADS, rows(document, figures), TEXTS), *missing(figures)])


def by_op(document: Document) -> dict[str, list[Figure]]:
    found: dict[str, list[Figure]] = {}
    for figure in document.results:
        found.setdefault(figure.op, []).append(figure)
    return found


def missing(figures: Sequence[Figure]) -> list[str]:
    return [f"{_title(figure)} is not there: {figure.missing}." for figure in figures if not figure.passes]


def rows(document: Document, figures: Sequence[Figure]) -> list[list[str]]:
    """A row a level and pass; what belongs to a level as a whole stands in its first."""
    last = {passed.name: passed.us for figure in figures if figure.level == 5 for passed in figure.passes}
    found = []
    for figure in figures:
        for passed in figure.passes:
            first = passed.name == PASSES[0]
            found.append(
                [
                    _title(figure) if first else "",
                    passed.name,
                    three_digits(passed.us / 1e3),
                    ratio(passed.us, last.get(passed.name)),
                    three_digits(passed.call_us / 1e3),
                    _or_empty(passed.host_us),
                    "" if passed.launches is None else str(passed.launches),
                    "" if passed.extra_bytes is None else three_digits(passed.extra_bytes / 1e6),
                    _share_of_copy(document, figure, passed) if first else "",
                    _or_empty(figure.first_call_s) if first else "",
                    _or_empty(figure.lines) if first else "",
                    _error(figure.max_error) if first else "",
                    _error(figure.mean_error) if first else "",
                ]
            )
    return found


def _title(figure: Figure) -> str:
    return f"{figure.level} {figure.name}"


def _share_of_copy(document: Document, figure: Figure, passed: Pass) -> str:
    copied = document.machine.get("copy_gb_per_s")
    if not copied or figure.gathered_bytes is None:
        return ""
    return f"{figure.gathered_bytes / passed.us / 1e3 / copied:.0%}"


def _or_empty(value: float | None) -> str:
    return "" if value is None else three_digits(value)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"
