"""The figures of other people's models as a table: for the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line, markdown_table, ratio, three_digits

from .measure import PASSES, ClientResult, Side

HEADS = (
    *("model", "dtype", "batch", "pass", "modules", "ms", "", "faster", "deformops, ms"),
    *("attention's share", "", "memory, MB", ""),
)
NOTE = (
    "Each pair: the original, and accelerated; deformops where it was there and knows the model; timed in turn. Share: "
    "the part of a forward within the modules that are replaced. Memory: the most held beyond model and inputs. GPU "
    "alone: the kernels of a step, without what they wait for the host. Half precision is autocast."
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
    """A table for each dtype and batch, a row a model."""
    ways = dict.fromkeys((r.dtype, r.batch) for r in document.results)
    parts = [f"{machine_line(document)}. {NOTE}"]
    for dtype, batch in ways:
        passes: dict[str, dict[str, ClientResult]] = {}
        for r in document.results:
            if (r.dtype, r.batch) == (dtype, batch):
                passes.setdefault(r.model, {})[r.passed] = r
        lines = [(model, *_cells(found)) for model, found in passes.items()]
        parts.append(f"In {dtype}, batch {batch}:\n\n{markdown_table(MARKDOWN_HEADS, lines, texts=1)}")
    return "\n\n".join(parts)


MARKDOWN_HEADS = (
    *("model", "forward, ms", "", "GPU alone", "deformops", "training, ms", "", "GPU alone", "deformops"),
    *("memory in training, GB", "attention's share of a forward"),
)


def _cells(passes: dict[str, ClientResult]) -> Iterator[str]:
    for passed in PASSES:
        r = passes.get(passed)
        yield _change(r, lambda side: three_digits(side.timing.median_us / 1e3))
        yield f"{r.speedup:.2f}x" if r else ""
        yield ratio(r.original.gpu_us, r.accelerated.gpu_us, "x") if r else ""
        yield three_digits(r.deformops.timing.median_us / 1e3) if r and r.deformops else ""
    yield _change(passes.get("training"), lambda side: three_digits((side.extra_bytes or 0) / 1e9))
    yield _change(passes.get("forward"), lambda side: f"{side.attention_share or 0:.0%}")


def _change(result: ClientResult | None, shown: Callable[[Side], str]) -> str:
    return "" if result is None else " → ".join(map(shown, _sides(result)))


def _sides(result: ClientResult) -> tuple[Side, Side]:
    return result.original, result.accelerated
