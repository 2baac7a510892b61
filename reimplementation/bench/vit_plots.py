"""The ViT's benchmark as bars: a picture for each quantity, a group of bars for each size of image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure as Picture

from .results import Document
from .vit import Figure

QUANTITIES: dict[str, tuple[str, Callable[[Figure], float | None]]] = {
    "latency": ("ms", lambda figure: figure.timing.median_us / 1e3),
    "memory": ("MB", lambda figure: None if figure.extra_bytes is None else figure.extra_bytes / 1e6),
    "gflops": ("GFLOPs of a batch", lambda figure: figure.gflops),
    "throughput": ("images/s", lambda figure: figure.throughput),
}
GROUP_WIDTH = 0.8


def draw_all(folder: Path, document: Document, formats: Sequence[str], dpi: int) -> list[Path]:
    """Write ``benchmark_{quantity}.{format}`` for each quantity that is known; returns the paths.

    Raises:
        ValueError: a format is unknown to matplotlib.
    """
    paths = []
    for name, (unit, value) in QUANTITIES.items():
        known = [(figure, number) for figure in document.results if (number := value(figure)) is not None]
        if known:
            picture = _bars(known, f"{name}: {document.machine['device']}", unit)
            paths += [folder / f"benchmark_{name}.{kind}" for kind in formats]
            for path in paths[-len(formats) :]:
                picture.savefig(path, dpi=dpi)
    return paths


def _bars(known: Sequence[tuple[Figure, float]], title: str, unit: str) -> Picture:
    groups = list(dict.fromkeys(_group(figure) for figure, _ in known))
    kinds = list(dict.fromkeys(_kind(figure) for figure, _ in known))
    width = GROUP_WIDTH / len(kinds)
    picture = Picture(figsize=(2 + 1.2 * len(groups) + 0.3 * len(known), 4), layout="constrained")
    axes = picture.subplots()
    for index, kind in enumerate(kinds):
        bars = [(groups.index(_group(figure)), number) for figure, number in known if _kind(figure) == kind]
        offset = (index - (len(kinds) - 1) / 2) * width
        drawn = axes.bar([place + offset for place, _ in bars], [number for _, number in bars], width, label=kind)
        axes.bar_label(drawn, [f"{number:.3g}" for _, number in bars], fontsize=6, rotation=90, padding=2)
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    axes.set_xticks(range(len(groups)), groups, fontsize=7)
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return picture


def _group(figure: Figure) -> str:
    return f"{figure.batch_size} x {figure.image_size}\n{figure.passed}"


def _kind(figure: Figure) -> str:
    return f"{figure.config}, {figure.dtype}, {figure.mode}"
