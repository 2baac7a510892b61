"""The figures of other people's models as a table: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line, ratio, three_digits

from .measure import ClientResult

HEADS = (
    *("model", "dtype", "batch", "pass", "modules", "ms", "", "faster", "deformops, ms"),
    *("attention's share", "", "memory, MB", ""),
)
NOTE = (
    "Each pair: the original, and accelerated; deformops where it was there and knows the model; timed in turn. Share: "
    "the part of a forward within the modules that are replaced. Memory: the most held beyond model and inputs. Half "
    "precision is autocast."
)


def rows(document: Document) -> Iterator[tuple[str, ...]]:
    """The cells of each result, under `HEADS`."""
    for r in document.results:
        yield (
            *(r.model, r.dtype, str(r.batch), r.passed, str(r.modules)),
            *(three_digits(side.timing.median_us / 1e3) for side in _sides(r)),
            ratio(r.original.timing.median_us, r.accelerated.timing.median_us, "x"),
            "" if r.deformops is None else three_digits(r.deformops.timing.median_us / 1e3),
            *("" if side.attention_share is None else f"{side.attention_share:.0%}" for side in _sides(r)),
            *("" if side.extra_bytes is None else three_digits(side.extra_bytes / 1e6) for side in _sides(r)),
        )


def print_table(document: Document) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 200, markup=False)
    table = Table(title=machine_line(document), title_justify="left")
    for number, head in enumerate(HEADS):
        table.add_column(head or "ours", justify="left" if number < 4 and head != "batch" else "right")
    for row in rows(document):
        table.add_row(*row)
    console.print(table)
    console.print(NOTE, style="dim")


def markdown(document: Document) -> str:
    heads = [head or "ours" for head in HEADS]
    aligned = ["---" if head in ("model", "dtype", "pass") else "---:" for head in heads]
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, aligned, *rows(document))]
    return f"{machine_line(document)}. {NOTE}\n\n" + "\n".join(lines)


def _sides(result: ClientResult) -> tuple:
    return result.original, result.accelerated
