"""The sweep as maps of colour: channels against points and levels, a map per op, pass and batch size."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reimplementation.cli.sweep import outliers

from .results import Document


def draw(path: Path, document: Document) -> None:
    """Write the picture; its format follows the file's name. Shapes that stand out wear a red frame."""
    figures = document.results
    kinds = list(dict.fromkeys((f.shape.op, f.passed) for f in figures))
    batch_sizes = sorted({f.shape.batch_size for f in figures})
    channels = sorted({f.shape.channels for f in figures})
    samples = sorted({(f.shape.levels, f.shape.points) for f in figures})
    costs = [f.ps_per_byte for f in figures]
    picture = Figure(figsize=(1 + 6 * len(batch_sizes), 1 + 2.2 * len(kinds)), layout="constrained")
    all_axes = picture.subplots(len(kinds), len(batch_sizes), squeeze=False)
    marked = {(f.shape, f.passed) for f, _ in outliers(figures)}
    for (op, passed), row in zip(kinds, all_axes):
        for batch_size, axes in zip(batch_sizes, row):
            cells = [[float("nan")] * len(samples) for _ in channels]
            for f in figures:
                if (f.shape.op, f.passed, f.shape.batch_size) != (op, passed, batch_size):
                    continue
                x, y = samples.index((f.shape.levels, f.shape.points)), channels.index(f.shape.channels)
                cells[y][x] = f.ps_per_byte
                if (f.shape, f.passed) in marked:
                    axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
            image = axes.imshow(
                cells, norm=LogNorm(min(costs), max(costs)), cmap="viridis_r", aspect="auto", origin="lower"
            )
            for x, (here, next_one) in enumerate(zip(samples, samples[1:])):
                if here[0] != next_one[0]:
                    axes.axvline(x + 0.5, color="white", linewidth=2)
            axes.set_title(f"{op}, {passed}, batch {batch_size}", loc="left", fontsize=10)
            axes.set_yticks(range(len(channels)), channels)
            axes.set_ylabel("channels")
            axes.set_xticks(range(len(samples)), [f"{p}" for _, p in samples], fontsize=7)
            axes.set_xlabel(
                "points; by levels: " + ", ".join(map(str, sorted({level for level, _ in samples}))), fontsize=8
            )
    picture.colorbar(image, ax=all_axes, label="ps per gathered byte")
    dtypes = ", ".join(sorted({f.dtype for f in figures}))
    picture.suptitle(f"{document.machine['device']}, PyTorch {document.versions['torch']}, {dtypes}", fontsize=11)
    picture.savefig(path, dpi=120)
