"""The results as a table for the terminal, and as Markdown for the README."""

from __future__ import annotations

from .goals import MACHINES, goal_us
from .results import FLOOR, Document, Result

FORMULAS = (
    "GB/s: bytes of the rows that visible samples gather (rows x channels x bytes of a channel) over the median time. "
    "x floor: the median over that of a kernel that only gathers the same rows. grid_sample x: how many times longer "
    "that takes. x default: the median over that of the plain backward. Memory: the most held beyond the inputs."
)


def print_table(document: Document) -> None:
    """Print every result of a document."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 200, markup=False)
    table = Table(
        *("case", "dtype", "backend", "pass"), title=f"{_machine(document)}; microseconds", title_justify="left"
    )
    for column in ("median", "spread", "goal", "x goal", "GB/s", "x floor", "grid_sample x", "x default", "MB"):
        table.add_column(column, justify="right")
    table.add_column("timed by")
    for r in document.results:
        goal = goal_us(r)
        table.add_row(
            *(r.case, r.dtype, r.backend, r.passed),
            three_digits(r.timing.median_us),
            three_digits(r.timing.spread_us),
            _number(goal),
            _ratio(r.timing.median_us, goal),
            _number(r.gather_bandwidth),
            _ratio(r.timing.median_us, floor_us(r, document)),
            _ratio(grid_sample_us(r, document), r.timing.median_us),
            _ratio(r.timing.median_us, default_us(r, document)),
            "" if r.extra_bytes is None else three_digits(r.extra_bytes / 1e6),
            r.timing.method,
        )
    console.print(table)
    console.print(f"{FORMULAS} Goals are meant for {MACHINES['cuda']} and {MACHINES['cpu']}.", style="dim")


def markdown(document: Document) -> str:
    """Two tables, each with a line that names the machine: the cases, and what the host does for one call.

    A row is a case and a pass; a dtype's column holds the figure and, behind a stroke, its goal.
    """
    native = [r for r in document.results if r.backend not in ("grid_sample", FLOOR)]
    if not native:
        raise ValueError("there are no figures of cuda or cpu kernels, which the table is about")
    on_host = [r for r in native if r.timing.method == "host"]
    timed = [r for r in native if r.timing.method != "host"]
    unit, scale = ("ms", 1e-3) if timed and timed[0].device == "cpu" else ("µs", 1)
    tables = []
    if timed:
        tables.append(f"{_machine(document)}; {unit} / goal:\n\n{_rows(timed, document, scale)}")
    if on_host:
        tables.append(f"The host's time for one call, µs / goal:\n\n{_rows(on_host, document, 1)}")
    return "\n\n".join(tables)


def _rows(results: list[Result], document: Document, scale: float) -> str:
    dtypes = list(dict.fromkeys(r.dtype for r in results))
    ratios = {
        "grid_sample takes": lambda r: _ratio(grid_sample_us(r, document), r.timing.median_us, "x"),
        "of the floor": lambda r: _ratio(r.timing.median_us, floor_us(r, document), "x"),
    }
    rows: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        rows.setdefault((r.case, r.passed), []).append(r)
    shown = {
        f"{name}, {dtypes[0]}": ratio
        for name, ratio in ratios.items()
        if any(ratio(r) for r in results if r.dtype == dtypes[0])
    }
    lines = [
        "| " + " | ".join(["case", "pass", *dtypes, *shown]) + " |",
        "| --- | --- |" + " ---: |" * (len(dtypes) + len(shown)),
    ]
    for (case, passed), found in rows.items():
        figures = {r.dtype: _figure(r, scale) for r in found}
        against = [ratio(found[0]) if found[0].dtype == dtypes[0] else "" for ratio in shown.values()]
        lines.append("| " + " | ".join([case, passed, *(figures.get(dtype, "") for dtype in dtypes), *against]) + " |")
    return "\n".join(lines)


def grid_sample_us(result: Result, document: Document) -> float | None:
    """What grid_sample takes for the same pass of the same case; None where it was not timed."""
    if result.backend in ("grid_sample", FLOOR):
        return None
    return _median(document, result.case, "grid_sample", result.dtype, result.passed)


def floor_us(result: Result, document: Document) -> float | None:
    """What gathering the same rows takes; None where that was not timed, and for all but forwards of kernels."""
    if result.backend in ("grid_sample", FLOOR):
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


def _machine(document: Document) -> str:
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


def _ratio(value: float | None, base: float | None, suffix: str = "") -> str:
    if value is None or base is None:
        return ""
    ratio = value / base
    return f"{ratio:.1f}{suffix}" if ratio >= 10 else f"{ratio:.2f}{suffix}"


def _number(value: float | None) -> str:
    return "" if value is None else three_digits(value)


def three_digits(value: float) -> str:
    """A number to three digits, or to the unit."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
