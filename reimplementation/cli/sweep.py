"""`python -m reimplementation sweep`: time per gathered byte over a grid of shapes, and the shapes that stand out."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product
from pathlib import Path

import torch

from reimplementation import ops
from reimplementation.bench import results
from reimplementation.bench.cases import op_step
from reimplementation.bench.gathers import gathers
from reimplementation.bench.results import Document
from reimplementation.bench.shapes import INPUTS, NUM_GROUPS, NUM_HEADS, STRIDES, Shape
from reimplementation.bench.tables import three_digits
from reimplementation.bench.timing import Timing, measure

from .bench import DTYPES, positive

AXES = {"channels": (32, 64, 128, 256, 512), "points": (1, 2, 4, 8, 16), "levels": (1, 2, 3, 4, 5)}
BATCH_SIZES = (1, 16)
PASSES = ("forward", "backward")
TIMES_WORSE = 2.0  # than its neighbours: a shape to look at


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


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="time the kernels over a grid of shapes",
        description="Time the kernels of this device over a grid of shapes, and name each shape whose time per "
        f"gathered byte is more than {TIMES_WORSE:g} times that of its neighbours along channels, points and levels.",
    )
    parser.add_argument("--ops", nargs="+", choices=INPUTS, default=list(INPUTS), metavar="OP", help="%(choices)s")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help="%(choices)s")
    for axis, values in (*AXES.items(), ("batch-sizes", BATCH_SIZES)):
        parser.add_argument(f"--{axis}", nargs="+", type=positive, default=list(values), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures, with the machine's name")
    parser.add_argument("--read", metavar="FILE", type=Path, help="measure nothing: show the figures in FILE")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw a map of the time per gathered byte")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.plot:  # before the work begins: a missing extra is named at once
        from reimplementation.bench.sweep_plot import draw

    if options.read:
        document = results.read_one(options.read, Figure)
    else:
        document = measure_all(options)
        if options.json:
            document.write(options.json)
    _print(document)
    if options.plot:
        draw(options.plot, document)


def measure_all(options: argparse.Namespace) -> Document:
    """Time every shape and pass that the options name.

    Raises:
        ValueError: channels are no multiple of the eight groups or heads, or there are more than five levels.
        RuntimeError: the device has no kernels.
    """
    from rich.console import Console
    from rich.progress import Progress

    if odd := [channels for channels in options.channels if channels % max(NUM_GROUPS, NUM_HEADS)]:
        raise ValueError(f"--channels must be multiples of {max(NUM_GROUPS, NUM_HEADS)}; got {odd}")
    if max(options.levels) > len(STRIDES):
        raise ValueError(f"--levels must be at most {len(STRIDES)}; got {max(options.levels)}")
    device = torch.device(options.device)
    axes = (options.ops, options.channels, options.points, options.levels, options.batch_sizes)
    shapes = [Shape(*sizes) for sizes in product(*axes)]
    figures = []
    with ops.use_backend(device.type), Progress(console=Console(stderr=True), transient=True) as progress:
        for shape in progress.track(shapes, description="shapes"):
            inputs = INPUTS[shape.op](shape, DTYPES[options.dtype], device)
            gathered_bytes = gathers(inputs).gathered_bytes
            for passed in options.passes:
                timing = measure([op_step(inputs, device.type, passed)], device, options.repeats)
                figures.append(Figure(shape, options.dtype, passed, timing, gathered_bytes))
    return results.describe(device, figures)


def outliers(figures: list[Figure]) -> list[tuple[Figure, float]]:
    """The figures that stand out, and how many times worse than their neighbours they are per gathered byte.

    Neighbours are one step away along channels, points or levels; a figure is held against the median of theirs. One
    that takes less than twice its op's fastest is bound by the launch and not judged.
    """
    found = []
    by_key = {_key(figure): figure for figure in figures}
    steps = {axis: sorted({getattr(figure.shape, axis) for figure in figures}) for axis in AXES}
    for figure in figures:
        alike = [
            f for f in figures if (f.shape.op, f.dtype, f.passed) == (figure.shape.op, figure.dtype, figure.passed)
        ]
        if figure.timing.median_us < 2 * min(f.timing.median_us for f in alike):
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
            yield replace(shape, **{axis: value})


def _key(figure: Figure) -> tuple:
    return (*astuple(figure.shape), figure.dtype, figure.passed)


def _print(document: Document) -> None:
    """Each op and pass in a line, then the shapes that stand out."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 120, markup=False)
    table = Table("op", "pass", "dtype", title=f"{document.machine['device']}; picoseconds per gathered byte")
    for column in ("shapes", "least", "median", "most"):
        table.add_column(column, justify="right")
    groups: dict[tuple[str, str, str], list[float]] = {}
    for figure in document.results:
        groups.setdefault((figure.shape.op, figure.passed, figure.dtype), []).append(figure.ps_per_byte)
    for names, costs in groups.items():
        numbers = (min(costs), statistics.median(costs), max(costs))
        table.add_row(*names, str(len(costs)), *map(three_digits, numbers))
    console.print(table)
    found = outliers(document.results)
    console.print(
        f"{len(found)} of {len(document.results)} are more than {TIMES_WORSE:g} times worse than their neighbours"
    )
    for figure, times in sorted(found, key=lambda pair: -pair[1]):
        shape = figure.shape
        console.print(
            f"  {shape.op} {figure.passed}, {shape.channels} channels, {shape.points} points, {shape.levels} levels, "
            f"batch {shape.batch_size}: {three_digits(figure.timing.median_us)} us, {times:.1f} times worse",
            highlight=False,
        )
