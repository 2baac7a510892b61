"""The figures of other people's models as a picture: how many times as fast each is."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line

COLORS = {"forward": "tab:blue", "training": "tab:orange"}
BAR = 0.8


def draw(path: Path, document: Document) -> None:
    """Write a bar a result, grouped by model; a line marks the speed of the original."""
    models = list(dict.fromkeys(r.model for r in document.results))
    kinds = list(dict.fromkeys((r.passed, r.dtype, r.batch) for r in document.results))
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(models) * max(2, len(kinds))), layout="constrained")
    axes = figure.subplots()
    for number, (passed, dtype, batch) in enumerate(kinds):
        found = [r for r in document.results if (r.passed, r.dtype, r.batch) == (passed, dtype, batch)]
        height = BAR / len(kinds)
        places = [models.index(r.model) + (number + 0.5) * height - BAR / 2 for r in found]
        shade = 1 - 0.6 * number / len(kinds)
        label = f"{passed}, {dtype}, batch {batch}"
        bars = axes.barh(places, [r.speedup for r in found], height, color=COLORS[passed], alpha=shade, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the original")
    axes.set_title(machine_line(document), loc="left", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
