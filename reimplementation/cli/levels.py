"""`python -m reimplementation levels`: one op at five levels, from eager PyTorch to kernels of our own."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from reimplementation.bench import results
from reimplementation.bench.floor import copy_bandwidth
from reimplementation.bench.levels import page
from reimplementation.bench.levels.catalogue import LEVELS, OPS
from reimplementation.bench.levels.measure import Figure, measure_all
from reimplementation.bench.levels.tables import print_tables
from reimplementation.bench.results import Document

from . import arguments


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "levels",
        help="time one op at five levels, from eager PyTorch to CUDA",
        description="Time the same function on the same inputs as eager PyTorch, TorchScript, torch.compile, Triton "
        "and kernels of the extension, forward and backward, and say what each level costs and how exact it is. "
        "docs/levels.md explains what comes out.",
    )
    parser.add_argument("--op", choices=OPS, help="default: both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--repeats", type=arguments.positive, default=5, help="timed runs (default: %(default)s)")
    parser.add_argument(
        "--limit",
        type=arguments.positive,
        default=120,
        metavar="SECONDS",
        help="leave out a level that takes longer, a compiler most likely (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures, with the machine's name")
    parser.add_argument("--picture", metavar="FILE", help="draw where time and memory go, as PNG, SVG, …")
    parser.add_argument("--read", metavar="FILE", type=Path, help="measure nothing: show the figures in FILE")
    parser.add_argument(
        "--page",
        metavar="FOLDER",
        type=Path,
        help="measure nothing: print docs/levels.md, with the figures in FOLDER (benchmarks/levels)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.page:
        print(page.render(options.page), end="")
        return
    # Before the work begins: a missing extra or a wrong file name is said at once.
    figures, picture = arguments.file("--json", options.json), arguments.picture("--picture", options.picture)
    document = results.read_one(options.read, Figure) if options.read else _measure(options)
    if figures:
        document.write(figures)
    print_tables(document)
    if picture:
        from reimplementation.bench.levels.picture import draw

        draw(picture, document)


def _measure(options: argparse.Namespace) -> Document:
    from rich.console import Console
    from rich.progress import Progress

    device = arguments.device(options.device)
    ops = [options.op] if options.op else OPS
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(ops) * len(LEVELS))

        def begins(what: str) -> None:
            progress.update(task, advance=1, description=what)

        found = []
        for op in ops:
            began = time.perf_counter()
            for figure in measure_all(op, device, options.repeats, options.limit, begins):
                seconds, began = time.perf_counter() - began, time.perf_counter()
                progress.console.print(f"{op}, level {figure.level}, {figure.name}: {seconds:.1f} s")
                found.append(figure)
        return results.describe(device, found, copy_bandwidth(device, options.repeats))
