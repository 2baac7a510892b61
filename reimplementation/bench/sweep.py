"""A sweep over the shapes of the ops: the time of each per gathered byte, and the shapes that stand out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product
from typing import Any

import torch

from reimplementation import ops
from reimplementation.bench import results
from reimplementation.bench.cases import DTYPES
from reimplementation.bench.gathers import gathers
from reimplementation.bench.results import Document
from reimplementation.bench.shapes import INPUTS, NUM_GROUPS, NUM_HEADS, STRIDES, Shape
from reimplementation.bench.steps import op_step
from reimplementation.bench.timing import Timing, measure

AXES = {
    "channels": (32, 64, 128, 256, 512),
    "points": (1, 2, 4, 8, 16),
    "levels": (1, 2, 3, 4, 5),
    "batch_size": (1, 16),
    "queries": (900,),
}
FEW_AND_MANY = {  # the other way: models with few queries of many points, or many of few
    "channels": (256,),
    "points": (1, 2, 4, 8, 16, 50, 150, 500),
    "levels": (4,),
    "batch_size": (1,),
    "queries": (10, 100, 900, 10_000),
}
NEIGHBOURS_ALONG = ("channels", "points", "levels", "queries")
PASSES = ("forward", "backward")
TIMES_WORSE = 2.0  # than its neighbours: a shape to look at


def shapes_of(op: str, chosen: dict[str, Sequence[int] | None]) -> list[Shape]:
    """The shapes of an op along axes that are chosen, the others as in `AXES`; where none is, those of both grids."""
    grids: list[Mapping[str, Sequence[int]]] = [{axis: chosen[axis] or values for axis, values in AXES.items()}]
    if not any(chosen.values()):
        grids.append(FEW_AND_MANY)
    return list(dict.fromkeys(Shape(op, *sizes) for grid in grids for sizes in product(*grid.values())))


@dataclass(frozen=True)
class Figure:
    """What a pass took on a shape."""

    shape: Shape
    dtype: str
    passed: str
    timing: Timing
    gathered_bytes: int

    @property
    def ps_per_byte(self) -> float:
        """Picoseconds for each byte that the forward gathers; 1 is 1 TB/s."""
        return self.timing.median_us * 1e6 / max(self.gathered_bytes, 1)


def measure_shapes(
    shapes: Sequence[Shape],
    passes: Sequence[str],
    dtype: str,
    device: torch.device,
    repeats: int,
    *,
    begins: Callable[[str], None] = lambda _: None,
) -> Document:
    """Time the kernels of a device on each shape; ``begins`` is told which comes next.

    Args:
        shapes: what to time.
        passes: some of `PASSES`.
        dtype: of the features, a name in `cases.DTYPES`.
        device: the CPU or a GPU.
        repeats: timed runs of each.

    Raises:
        ValueError: channels are no multiple of the eight groups or heads, or there are more than five levels.
        RuntimeError: the device has no kernels.
    """
    multiple = max(NUM_GROUPS, NUM_HEADS)
    if odd := sorted({shape.channels for shape in shapes if shape.channels % multiple}):
        raise ValueError(f"channels must be multiples of {multiple}; got {odd}")
    if (most := max(shape.levels for shape in shapes)) > len(STRIDES):
        raise ValueError(f"levels must be at most {len(STRIDES)}; got {most}")
    figures = []
    with ops.use_backend(device.type):
        for shape in shapes:
            begins(str(shape))
            inputs = INPUTS[shape.op](shape, DTYPES[dtype], device)
            gathered_bytes = gathers(inputs).gathered_bytes
            for passed in passes:
                timing = measure([op_step(inputs, device.type, passed)], device, repeats)
                figures.append(Figure(shape, dtype, passed, timing, gathered_bytes))
    return results.describe(device, figures)


def outliers(figures: list[Figure]) -> list[tuple[Figure, float]]:
    """The figures that stand out, and how many times worse than their neighbours they are per gathered byte.

    Neighbours are one step away along channels, points, levels or queries; a figure is held against the median of
    theirs. One that takes less than twice its op's fastest is bound by the launch and not judged.
    """
    found = []
    by_key = {_key(figure): figure for figure in figures}
    steps = {axis: sorted({getattr(figure.shape, axis) for figure in figures}) for axis in NEIGHBOURS_ALONG}
    fastest: dict[tuple, float] = {}
    for figure in figures:
        kind = figure.shape.op, figure.dtype, figure.passed
        fastest[kind] = min(fastest.get(kind, float("inf")), figure.timing.median_us)
    for figure in figures:
        if figure.timing.median_us < 2 * fastest[figure.shape.op, figure.dtype, figure.passed]:
            continue
        keys = (_key(replace(figure, shape=shape)) for shape in _neighbours(figure.shape, steps))
        around = [by_key[key].ps_per_byte for key in keys if key in by_key]
        if around and (times := figure.ps_per_byte / statistics.median(around)) > TIMES_WORSE:
            found.append((figure, times))
    return found


def _neighbours(shape: Shape, steps: dict[str, list[int]]) -> Iterator[Shape]:
    for axis, values in steps.items():
        place = values.index(getattr(shape, axis))
        for value in values[max(place - 1, 0) : place] + values[place + 1 : place + 2]:
            changed: dict[str, Any] = {axis: value}
            yield replace(shape, **changed)


def _key(figure: Figure) -> tuple:
    return (*astuple(figure.shape), figure.dtype, figure.passed)
