"""The levels as a picture: where the time of each goes, kernel by kernel, and the memory that it takes beside it."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture

from reimplementation.bench.results import Document
from reimplementation.bench.tables import machine_line, three_digits

from .measure import PASSES, REST, Figure, Pass
from .tables import by_op

COLORS = [colormaps["tab20"](number) for number in range(20)]
REST_COLOR = "lightgrey"
MOST_NAMES = 19  # in a legend; kernels beyond are drawn as the rest
NAME_LENGTH = 40
# What a legend says of Inductor's kernels: the operators that move numbers, and whether the kind of kernel has a sum.
TELLING = {"grid_sampler": "grid_sample", "gather": "gather", "scatter_add": "scatter"}
KINDS = {"triton_poi": (), "triton_per": ("sum",), "triton_red": ("sum",)}


def draw(path: Path, document: Document) -> None:
    """Write the picture: a row an op and pass, times on the left and memory on the right.

    Raises:
        ValueError: there is nothing to draw.
    """
    timed = {op: kept for op, figures in by_op(document).items() if (kept := [f for f in figures if f.passes])}
    if not timed:
        raise ValueError("--picture has nothing to draw: no level was timed")
    panels = [(op, i, name) for op in timed for i, name in enumerate(PASSES)]
    picture = Picture(figsize=(14, 1 + 2.9 * len(panels)), layout="constrained")
    all_axes = picture.subplots(len(panels), 2, squeeze=False, width_ratios=(3, 1))
    for (op, i, name), (times, memory) in zip(panels, all_axes):
        figures = timed[op]
        _draw_times(times, figures, [figure.passes[i] for figure in figures])
        _draw_memory(memory, [figure.passes[i] for figure in figures])
        times.set_title(f"{op}, {name}", loc="left", fontsize=10)
    picture.suptitle(machine_line(document), fontsize=11)
    picture.savefig(path, dpi=110)


def _draw_times(axes: Axes, figures: list[Figure], passes: list[Pass]) -> None:
    """Bars as long as the pass takes, divided in proportion to what the profiler saw of each kernel."""
    parts = [_milliseconds(passed) for passed in passes]
    totals = {name: sum(part.get(name, 0) for part in parts) for part in parts for name in part}
    named = sorted(totals.keys() - {REST}, key=lambda name: -totals[name])[:MOST_NAMES]
    for part in parts:
        part[REST] = sum(ms for name, ms in part.items() if name not in named)
    left = [0.0] * len(passes)
    for name, color in zip([*named, REST], [*COLORS[: len(named)], REST_COLOR]):
        widths = [part.get(name, 0) for part in parts]
        if any(widths):
            label = name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}"
            axes.barh(range(len(passes)), widths, left=left, color=color, label=label)
            left = [start + width for start, width in zip(left, widths)]
    for place, passed in enumerate(passes):
        axes.text(passed.us / 1e3, place, f" {three_digits(passed.us / 1e3)} ms", va="center", fontsize=8)
    axes.set_yticks(range(len(figures)), [f"{figure.level} {figure.name}" for figure in figures])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_xlim(0, 1.15 * max(passed.us for passed in passes) / 1e3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def _milliseconds(passed: Pass) -> dict[str, float]:
    """The milliseconds of a pass, by what a legend calls its kernels."""
    whole = sum(kernel.us for kernel in passed.kernels)
    parts: dict[str, float] = {}
    for kernel in passed.kernels:
        label = _label(kernel.name)
        parts[label] = parts.get(label, 0) + kernel.us / whole * passed.us / 1e3
    return parts


def _label(name: str) -> str:
    """A kernel's name; of Inductor's, which lists operators in the alphabet's order, those that move numbers."""
    kind, _, operators = name.partition("_fused_")
    if kind not in KINDS:
        return name
    does = [word for operator, word in TELLING.items() if operator in operators] or ["arithmetic"]
    return f"Inductor: {', '.join([*does, *KINDS[kind]])}"


def _draw_memory(axes: Axes, passes: list[Pass]) -> None:
    megabytes = [(passed.extra_bytes or 0) / 1e6 for passed in passes]
    bars = axes.barh(range(len(passes)), megabytes, color="slategrey")
    axes.bar_label(bars, [three_digits(value) for value in megabytes], fontsize=8, padding=2)
    axes.set_yticks([])
    axes.invert_yaxis()
    axes.set_xlabel("MB beyond the inputs")
    axes.set_xlim(0, 1.25 * max(megabytes) or 1)
    axes.spines[["top", "right"]].set_visible(False)
