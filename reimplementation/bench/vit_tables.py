"""The ViT's figures as Markdown, and parts of a run as one document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .results import Document
from .tables import markdown_table, three_digits
from .vit import MODES, PASSES, Figure

PEAK_TFLOPS = {("NVIDIA H200", "bfloat16"): 989.0}  # dense, by NVIDIA's data sheet


def joined(documents: Sequence[Document]) -> Document:
    """Parts of a run as one document; a figure that several have is the last one's.

    Raises:
        ValueError: they are of different machines or versions.
    """
    versions: dict = {}
    for document in documents:
        if document.machine["device"] != documents[0].machine["device"]:
            raise ValueError("--read takes parts of a run; these files are of different machines")
        if any(versions.get(name, version) != version for name, version in document.versions.items()):
            raise ValueError("--read takes parts of a run; these files are of different versions")
        versions |= document.versions
    figures = {_key(figure): figure for document in documents for figure in document.results}
    return replace(documents[0], versions=versions, results=list(figures.values()))


def markdown(document: Document) -> str:
    """A table for each size of batch and image: milliseconds, and in brackets the share of the device's peak."""
    sizes = dict.fromkeys((figure.batch_size, figure.image_size) for figure in document.results)
    return "\n\n".join([_machine(document), *(_table(document, *size) for size in sizes)])


def _key(figure: Figure) -> tuple:
    return figure.config, figure.batch_size, figure.image_size, figure.passed, figure.mode, figure.dtype


def _machine(document: Document) -> str:
    known = [f"{name} {document.versions[name]}" for name in ("torch", "timm") if name in document.versions]
    return ", ".join([document.machine["device"], *known, document.date])


def _table(document: Document, batch_size: int, image_size: str) -> str:
    chosen = [f for f in document.results if (f.batch_size, f.image_size) == (batch_size, image_size)]
    columns = [
        (passed, mode)
        for passed in PASSES
        for mode in MODES
        if any((f.passed, f.mode) == (passed, mode) for f in chosen)
    ]
    heads = [f"{batch_size} x {image_size}", *(f"{passed.replace('_', ' and ')}, {mode}" for passed, mode in columns)]
    lines = []
    for config in sorted({f.config for f in chosen}, key=[f.config for f in document.results].index):
        cells = {(f.passed, f.mode): _cell(f, document) for f in chosen if f.config == config}
        lines.append([config, *(cells.get(column, "") for column in columns)])
    return markdown_table(heads, lines, texts=1)


def _cell(figure: Figure, document: Document) -> str:
    milliseconds = three_digits(figure.timing.median_us / 1e3)
    peak = PEAK_TFLOPS.get((document.machine["device"], figure.dtype))
    return milliseconds if peak is None else f"{milliseconds} ({figure.tflops_per_s / peak:.0%})"
