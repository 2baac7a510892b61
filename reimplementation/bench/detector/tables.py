"""The detector's figures as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line, markdown_table, three_digits

from .measure import PASSES, DetectorResult

FORM_NAMES = {
    "inference": "`for_inference`",
    "model": "the model",
    "plain": "the model, `use_deformable_func=False`",
}
HEADINGS = {
    "frame": "called",
    "frame replayed": "replayed, called",
    "frame graph": "as a replayed graph",
    "frame compiled": "compiled",
    "frame compiled graph": "compiled, as a replayed graph",
    "training": "step of training",
}


def markdown(document: Document) -> str:
    """Two tables: milliseconds (frames a second) of every pass; and kernels, their time, and memory."""
    passes = [passed for passed in PASSES if any(r.passed == passed for r in document.results)]
    times = markdown_table(["", *(HEADINGS[passed] for passed in passes)], _times(document.results, passes), texts=1)
    called = [result for result in document.results if result.kernels is not None]
    counts = markdown_table(["", "kernels", "their time, ms", "aggregation", "memory, MB"], _counts(called), texts=1)
    return "\n\n".join([machine_line(document), times, *([counts] if called else [])])


def joined(documents: Sequence[Document]) -> Document:
    """Parts of a run as one document.

    Raises:
        ValueError: they are of different machines or versions.
    """
    first, *others = documents
    if any((d.machine["device"], d.versions) != (first.machine["device"], first.versions) for d in others):
        raise ValueError("--read takes parts of a run; these files are of different machines or versions")
    return replace(first, results=[result for document in documents for result in document.results])


def print_table(document: Document) -> None:
    """A table on the terminal, a row a figure."""
    from rich.console import Console
    from rich.table import Table

    table = Table("form", "dtype", "pass", title=machine_line(document))
    for heading in ("ms", "frames/s", "MB", "kernels", "GPU ms", "aggregation"):
        table.add_column(heading, justify="right")
    for r in document.results:
        table.add_row(
            r.form,
            r.dtype,
            r.passed,
            three_digits(r.timing.median_us / 1e3),
            three_digits(r.frames_a_second),
            "" if r.extra_bytes is None else three_digits(r.extra_bytes / 1e6),
            "" if r.kernels is None else str(r.kernels),
            "" if r.gpu_us is None else three_digits(r.gpu_us / 1e3),
            "" if r.aggregation_share is None else f"{r.aggregation_share:.0%}",
        )
    Console(width=None if Console().is_terminal else 120).print(table)


def _times(found: Sequence[DetectorResult], passes: Sequence[str]) -> Iterable[list[str]]:
    for form, dtype in dict.fromkeys((r.form, r.dtype) for r in found):
        of_row = {r.passed: r for r in found if (r.form, r.dtype) == (form, dtype)}
        yield [_name(form, dtype), *(_time(of_row[passed]) if passed in of_row else "" for passed in passes)]


def _counts(called: Sequence[DetectorResult]) -> Iterable[list[str]]:
    for r in called:
        memory = "" if r.extra_bytes is None else f"{r.extra_bytes / 1e6:.0f}"
        yield [
            _name(r.form, r.dtype),
            str(r.kernels),
            three_digits((r.gpu_us or 0) / 1e3),
            f"{r.aggregation_share or 0:.1%}",
            memory,
        ]


def _time(result: DetectorResult) -> str:
    milliseconds = three_digits(result.timing.median_us / 1e3)
    return f"{milliseconds} ({three_digits(result.frames_a_second)})"


def _name(form: str, dtype: str) -> str:
    under_autocast = form != "inference" and dtype != "float32"
    return f"{FORM_NAMES[form]}, {dtype}{' autocast' if under_autocast else ''}"
