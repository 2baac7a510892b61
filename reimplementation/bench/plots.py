"""The results as bars: a panel per machine and kind of pass, a group of bars per case, a logarithmic scale."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .goals import goal_us
from .results import FLOOR, Document, Result
from .tables import three_digits

SHADES = {"float64": 0.95, "float32": 0.8, "float16": 0.55, "bfloat16": 0.35}  # of a backend's colour
COLOR_MAPS = {"cuda": "Greens", "cpu": "Blues", "grid_sample": "Greys", FLOOR: "Oranges"}
ORDER = (list(COLOR_MAPS), list(SHADES))  # of a group's bars: backend, dtype
GROUP_WIDTH = 0.8


def draw(path: Path, documents: list[Document]) -> None:
    """Write the picture; its format follows the file's name. Host times of a call and warm passes are not in it.

    Raises:
        ValueError: there is nothing to draw, or the format is unknown.
    """
    panels = [
        (document, kind, [r for r in timed if r.passed.split()[0] == kind])
        for document in documents
        if (timed := [r for r in document.results if r.timing.method != "host" and not r.passed.endswith("warm")])
        for kind in dict.fromkeys(r.passed.split()[0] for r in timed)
    ]
    if not panels:
        raise ValueError("--plot has nothing to draw: no case of these was timed")
    figure = Figure(figsize=(12, 0.6 + 3.2 * len(panels)), layout="constrained")
    for axes, (document, kind, found) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        _panel(axes, found)
        axes.set_title(f"{kind}: {document.machine['device']}, PyTorch {document.versions['torch']}", loc="left")
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, found: list[Result]) -> None:
    groups = list(dict.fromkeys(map(_group, found)))
    kinds = sorted({(r.backend, r.dtype) for r in found}, key=lambda kind: [*map(list.index, ORDER, kind)])
    width = GROUP_WIDTH / len(kinds)
    place = {kind: (i - (len(kinds) - 1) / 2) * width for i, kind in enumerate(kinds)}
    unit, scale = ("milliseconds", 1e-3) if found[0].device == "cpu" else ("microseconds", 1)
    for backend, dtype in kinds:
        bars = [r for r in found if (r.backend, r.dtype) == (backend, dtype)]
        drawn = axes.bar(
            [groups.index(_group(r)) + place[backend, dtype] for r in bars],
            [r.timing.median_us * scale for r in bars],
            width,
            color=colormaps[COLOR_MAPS[backend]](SHADES[dtype]),
            label=f"{backend}, {dtype}",
        )
        labels = [three_digits(r.timing.median_us * scale) for r in bars]
        axes.bar_label(drawn, labels, fontsize=6, rotation=90, padding=2)
    goals = [(r, goal) for r in found if (goal := goal_us(r)) is not None]
    if goals:
        left = [groups.index(_group(r)) + place[r.backend, r.dtype] - width / 2 for r, _ in goals]
        axes.hlines(
            [goal * scale for _, goal in goals],
            left,
            [x + width for x in left],
            colors="red",
            linewidth=1.5,
            label="goal",
        )
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set_ylabel(unit)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _group(result: Result) -> str:
    """A case, with the pass's second word if it has one: "rig-bs1 frozen"."""
    return " ".join([result.case, *result.passed.split()[1:]])
