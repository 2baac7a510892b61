"""`python -m reimplementation sweep`: time per gathered byte over a grid of shapes, and the shapes that stand out."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from reimplementation.bench import results
from reimplementation.bench.cases import DTYPES
from reimplementation.bench.results import Document
from reimplementation.bench.shapes import INPUTS
from reimplementation.bench.sweep import AXES, PASSES, TIMES_WORSE, Figure, measure_shapes, outliers, shapes_of
from reimplementation.bench.tables import three_digits

from . import arguments

OPTIONS = {"batch_size": "--batch-sizes"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="time the kernels over a grid of shapes",
        description="Time the kernels of this device over a grid of shapes, and name each shape whose time per "
        f"gathered byte is more than {TIMES_WORSE:g} times that of its neighbours along channels, points, levels and "
        "queries. Without sizes: a grid around 900 queries, and one of 10 to 10 000 queries with 1 to 500 points.",
    )
    parser.add_argument("--ops", nargs="+", choices=INPUTS, default=list(INPUTS), metavar="OP", help="%(choices)s")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS", help="%(choices)s")
    for axis, values in AXES.items():
        default = " ".join(map(str, values))
        parser.add_argument(
            OPTIONS.get(axis, f"--{axis}"),
            dest=axis,
            nargs="+",
            type=arguments.positive,
            help=f"default beside other sizes: {default}",
        )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=arguments.positive, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures, with the machine's name")
    parser.add_argument("--read", metavar="FILE", type=Path, help="measure nothing: show the figures in FILE")
    parser.add_argument("--plot", metavar="FILE", help="draw a map of the time per gathered byte, as PNG, SVG, …")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    # Before the work begins: a missing extra or a wrong file name is said at once.
    figures, picture = arguments.file("--json", options.json), arguments.picture("--plot", options.plot)
    if options.read:
        document = results.read_one(options.read, Figure)
    else:
        document = _measure(options)
        if figures:
            document.write(figures)
    _print(document)
    if picture:
        from reimplementation.bench.plots import draw_map

        draw_map(picture, document)


def _measure(options: argparse.Namespace) -> Document:
    from rich.console import Console
    from rich.progress import Progress

    device = arguments.device(options.device)
    chosen = {axis: getattr(options, axis) for axis in AXES}
    shapes = [shape for op in options.ops for shape in shapes_of(op, chosen)]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("shapes", total=len(shapes))
        return measure_shapes(
            shapes,
            options.passes,
            options.dtype,
            device,
            options.repeats,
            begins=lambda _: progress.advance(task),
        )


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
            f"batch {shape.batch_size}, {shape.queries} queries: {three_digits(figure.timing.median_us)} us, "
            f"{times:.1f} times worse",
            highlight=False,
        )
