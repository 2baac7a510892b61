"""The pictures of results: the benchmark's as bars, a sweep's as maps. A file's format follows its name."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .goals import goal_us
from .peers import PEERS
from .results import FLOOR, Document, Result
from .sweep import outliers
from .tables import three_digits

SHADES = {"float64": 0.95, "float32": 0.8, "float16": 0.55, "bfloat16": 0.35}  # of a backend's colour
COLOR_MAPS = {
    "cuda": "Greens",
    "triton": "PuBu",
    "cpu": "Blues",
    "grid_sample": "Greys",
    FLOOR: "Oranges",
    **dict(zip(PEERS, ("Purples", "Reds"))),
}
ANOTHER_COLOR_MAP, ANOTHER_SHADE = "pink", 0.5  # of backends and dtypes that a file from elsewhere names
ORDER = [*COLOR_MAPS, *SHADES]  # of a group's bars
GROUP_WIDTH = 0.8


def draw_bars(path: Path, documents: list[Document]) -> None:
    """Write the results as bars: a panel a machine and kind of pass, a group of bars a case, a logarithmic scale.

    Host times of a call and warm passes are not in it.

    Raises:
        ValueError: there is nothing to draw.
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


def draw_map(path: Path, document: Document) -> None:
    """Write a sweep as maps of colour, channels against points and levels; shapes that stand out wear a red frame."""
    figures = document.results
    kinds = list(dict.fromkeys((f.shape.op, f.passed) for f in figures))
    columns = sorted({(f.shape.queries, f.shape.batch_size) for f in figures})
    channels = sorted({f.shape.channels for f in figures})
    samples = sorted({(f.shape.levels, f.shape.points) for f in figures})
    costs = [f.ps_per_byte for f in figures]
    picture = Figure(figsize=(1 + 6 * len(columns), 1 + 2.2 * len(kinds)), layout="constrained")
    all_axes = picture.subplots(len(kinds), len(columns), squeeze=False)
    marked = {(f.shape, f.passed) for f, _ in outliers(figures)}
    for (op, passed), row in zip(kinds, all_axes):
        for (queries, batch_size), axes in zip(columns, row):
            cells = [[float("nan")] * len(samples) for _ in channels]
            for f in figures:
                if (f.shape.op, f.passed, f.shape.queries, f.shape.batch_size) != (op, passed, queries, batch_size):
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
            axes.set_title(f"{op}, {passed}, {queries} queries, batch {batch_size}", loc="left", fontsize=10)
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


def _panel(axes: Axes, found: list[Result]) -> None:
    groups = list(dict.fromkeys(map(_group, found)))
    kinds = sorted({(r.backend, r.dtype) for r in found}, key=lambda kind: [(_place(name), name) for name in kind])
    width = GROUP_WIDTH / len(kinds)
    place = {kind: (i - (len(kinds) - 1) / 2) * width for i, kind in enumerate(kinds)}
    unit, scale = ("milliseconds", 1e-3) if found[0].device == "cpu" else ("microseconds", 1)
    for backend, dtype in kinds:
        bars = [r for r in found if (r.backend, r.dtype) == (backend, dtype)]
        drawn = axes.bar(
            [groups.index(_group(r)) + place[backend, dtype] for r in bars],
            [r.timing.median_us * scale for r in bars],
            width,
            color=colormaps[COLOR_MAPS.get(backend, ANOTHER_COLOR_MAP)](SHADES.get(dtype, ANOTHER_SHADE)),
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


def _place(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _group(result: Result) -> str:
    """A case, with the pass's second word if it has one: "rig-bs1 frozen"."""
    return " ".join([result.case, *result.passed.split()[1:]])
