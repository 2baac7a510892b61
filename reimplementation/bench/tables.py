"""The results as a table for the terminal, and as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .goals import MACHINES, goal_us
from .results import FLOOR, Document, Result

FORMULAS = (
    "GB/s: bytes of the rows that visible samples gather (rows x channels x bytes of a channel) over the median time. "
    "x floor: the median over that of a kernel that only gathers the same rows. x ours: the median over that of our "
    "kernels. x default: the median over that of the plain backward. MB: the most held "
    "beyond the inputs. kept MB: what a forward leaves for its backward."
)


def print_table(document: Document) -> None:
    """Print every result of a document."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 200, markup=False)
    table = Table(
        *("case", "dtype", "backend", "pass"), title=f"{machine_line(document)}; microseconds", title_justify="left"
    )
    for column in ("median", "spread", "goal", "x goal", "GB/s", "x floor", "x ours", "x default", "MB", "kept MB"):
        table.add_column(column, justify="right")
    table.add_column("timed by")
    for r in document.results:
        goal = goal_us(r)
        table.add_row(
            *(r.case, r.dtype, r.backend, r.passed),
            three_digits(r.timing.median_us),
            three_digits(r.timing.spread_us),
            _number(goal),
            ratio(r.timing.median_us, goal),
            _number(r.gather_bandwidth),
            ratio(r.timing.median_us, floor_us(r, document)),
            ratio(r.timing.median_us, ours_us(r, document)),
            ratio(r.timing.median_us, default_us(r, document)),
            *("" if count is None else three_digits(count / 1e6) for count in (r.extra_bytes, r.kept_bytes)),
            r.timing.method,
        )
    console.print(table)
    console.print(f"{FORMULAS} Goals are meant for {MACHINES['cuda']} and {MACHINES['cpu']}.", style="dim")


def markdown(document: Document) -> str:
    """Tables, each after a line that names it: the cases, what others take for them, and the host's part of a call.

    A row of ours is a case and a pass; a dtype's column holds the figure and, behind a stroke, its goal.
    """
    ours = [r for r in document.results if r.is_ours]
    if not ours:
        raise ValueError("there are no figures of cuda or cpu kernels, which the table is about")
    on_host = [r for r in ours if r.timing.method == "host"]
    timed = [r for r in ours if r.timing.method != "host"]
    unit, scale = ("ms", 1e-3) if timed and timed[0].device == "cpu" else ("µs", 1)
    tables = []
    if timed:
        tables.append(f"{machine_line(document)}; {unit} / goal:\n\n{_ours(timed, document, scale)}")
    if others := _others(document, scale):
        tables.append(f"What others take on the same inputs in the same run, {unit}, and times ours:\n\n{others}")
    if on_host:
        tables.append(f"The host's time for one call, µs / goal:\n\n{_ours(on_host, document, 1)}")
    return "\n\n".join(tables)


def _ours(results: list[Result], document: Document, scale: float) -> str:
    """A row a case and pass; a column a dtype, and the first dtype's ratio to the floor where that was timed."""
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    rows: dict[tuple[str, str], dict[str, Result]] = {}
    for r in results:
        rows.setdefault((r.case, r.passed), {})[r.dtype] = r
    lines = []
    for names, found in rows.items():
        first = found.get(dtypes[0])
        of_floor = ratio(first.timing.median_us, floor_us(first, document), "x") if first else ""
        lines.append([*names, *(_figure(found[d], scale) if d in found else "" for d in dtypes), of_floor])
    heads = ["case", "pass", *dtypes, f"of the floor, {dtypes[0]}"]
    if not any(line[-1] for line in lines):
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    return markdown_table(heads, lines, texts=2)


def _others(document: Document, scale: float) -> str:
    """A row a case, pass and dtype that ours and another were timed on; a column each; empty where there is none."""
    names = list(dict.fromkeys(r.backend for r in document.results if ours_us(r, document)))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for r in document.results:
        if ours := ours_us(r, document):
            row = rows.setdefault((r.case, r.passed, r.dtype), {"ours": three_digits(ours * scale)})
            row[r.backend] = f"{three_digits(r.timing.median_us * scale)} ({ratio(r.timing.median_us, ours, 'x')})"
    if not rows:
        return ""
    lines = [[*key, *(row.get(name, "") for name in ("ours", *names))] for key, row in rows.items()]
    return markdown_table(["case", "pass", "dtype", "ours", *names], lines, texts=3)


def markdown_table(heads: Sequence[str], lines: Iterable[Sequence[str]], texts: int) -> str:
    """A table in Markdown, whose first ``texts`` columns are words and the rest numbers."""
    rules = ["---"] * texts + ["---:"] * (len(heads) - texts)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rules, *lines))


def ours_us(result: Result, document: Document) -> float | None:
    """What our kernels take for what plain PyTorch or a peer was timed on; None for our own figures and the floor."""
    if result.is_ours or result.backend == FLOOR:
        return None
    device = result.device.partition(":")[0]
    return _median(document, result.case, device, result.dtype, result.passed)


def floor_us(result: Result, document: Document) -> float | None:
    """What gathering the same rows takes, for a forward of our kernels; None where that was not timed."""
    if not result.is_ours:
        return None
    return _median(document, result.case, FLOOR, result.dtype, result.passed)


def default_us(result: Result, document: Document) -> float | None:
    """What the plain backward takes, for a variant of it."""
    if not result.passed.startswith("backward "):
        return None
    return _median(document, result.case, result.backend, result.dtype, "backward")


def _median(document: Document, *key: str) -> float | None:
    for r in document.results:
        if (r.case, r.backend, r.dtype, r.passed) == key:
            return r.timing.median_us
    return None


def machine_line(document: Document) -> str:
    """The machine, the versions and the date of results, in a line."""
    machine, versions = document.machine, document.versions
    on_cpu = all(r.device == "cpu" for r in document.results)
    parts = [
        machine["device"],
        f"{machine['threads']} threads" if on_cpu else f"CUDA {versions['cuda']}",
        f"PyTorch {versions['torch']}",
        document.date,
    ]
    if "copy_gb_per_s" in machine:
        parts.append(f"a copy reads and writes {machine['copy_gb_per_s']:.0f} GB/s")
    return ", ".join(parts)


def _figure(result: Result, scale: float) -> str:
    figure, goal = three_digits(result.timing.median_us * scale), goal_us(result)
    return figure if goal is None else f"{figure} / {three_digits(goal * scale)}"


def _number(value: float | None) -> str:
    return "" if value is None else three_digits(value)


def three_digits(value: float) -> str:
    """A number to three digits, or to the unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None, base: float | None, suffix: str = "") -> str:
    """A quotient as text; empty where a part of it is not known."""
    if value is None or base is None:
        return ""
    quotient = value / base
    return f"{quotient:.1f}{suffix}" if quotient >= 10 else f"{quotient:.2f}{suffix}"
