"""`python -m reimplementation demo`: see the op at work, then time the module on every backend here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import reimplementation
from reimplementation.bench.inputs import EMBED_DIMS, aggregation_problem
from reimplementation.bench.modules import Timing, cases, measure, module_document, reference
from reimplementation.data.rig import Rig
from reimplementation.data.scene import IMAGE_HEIGHT, IMAGE_WIDTH, View, built_in_scene, trace_boxes
from reimplementation.demo import attention
from reimplementation.demo.recovery import MIN_PIXELS_ACROSS, Recovery, recover_colors

from .demo_tables import print_report

OPS = ("aggregation", "msda")
MAX_QUERIES = 100_000
STEPS_BESIDE_TIMING = 4


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What the demo looks at. painted: (num_boxes, 3) uint8, the truth; None for real images."""

    rig: Rig
    views: tuple[View, ...]
    painted: np.ndarray | None


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="read colours from images through an op, and time its module on every backend",
        description="Read the colours of the boxes around a car through deformable aggregation, or those around "
        "a grid of queries in one image through multi-scale deformable attention; draw what was read and where; "
        "and time the op's whole module on every backend of this machine.",
    )
    parser.add_argument("--op", choices=OPS, default="aggregation", help="which op (default: %(default)s)")
    parser.add_argument(
        "--rig", metavar="DIR", help="a folder with sample.json and images (default: a built-in street)"
    )
    parser.add_argument("--output", metavar="FILE", default="demo.png", help="the picture (default: %(default)s)")
    parser.add_argument(
        "--queries",
        metavar="N",
        type=_query_count,
        default=900,
        help="queries of the timed module (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout, and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    # Here as in the functions that draw, extras are imported before the work begins: a missing one is named at once.
    from rich.console import Console
    from rich.progress import Progress

    output = Path(options.output)
    if output.is_dir() or not output.resolve().parent.is_dir():
        raise ValueError(f"--output {output} must name a file in a folder that exists")

    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        task = progress.add_task("looking around", total=len(cases()) + STEPS_BESIDE_TIMING)

        def step(description: str) -> None:
            progress.update(task, advance=1, description=description)

        show = {"aggregation": _show, "msda": attention.show}[options.op]
        found = show(options, output, step)

    document = {
        "reimplementation": reimplementation.__version__,
        "op": options.op,
        "picture": str(output),
        **found,
    }
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        print_report(document, Console())


def _show(options: argparse.Namespace, output: Path, step: Callable[[str], None]) -> dict:
    """Draw the picture, time the module; returns everything that was found. ``step`` is told what comes next."""
    from reimplementation.demo.drawing import draw

    surroundings = look_around(options.rig)
    step("reading colours")
    recovery = recover_colors(surroundings.rig, surroundings.views)
    step("drawing")
    draw(output, surroundings.rig, surroundings.views, recovery, surroundings.painted)
    step("the module in float64")
    batch = aggregation_problem(surroundings.rig, options.queries)
    expected = reference(batch)
    timings = []
    for case in cases():
        step(f"the module on {case.backend}, {case.dtype_name}")
        timings.append(measure(batch, expected, case))
    return _document(surroundings, recovery, timings, options.queries)


def look_around(folder: str | None = None) -> Surroundings:
    """The built-in street, or the rig in a folder at 704 x 256 pixels, and the box behind every pixel."""
    if folder is None:
        scene = built_in_scene()
        return Surroundings(scene.rig, scene.views, scene.colors)
    rig = Rig.load(folder).scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT)
    return Surroundings(rig, tuple(trace_boxes(camera, rig.boxes) for camera in rig.cameras), None)


def color_errors(recovered: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """(num_boxes,) mean absolute error over the three channels, in 1/255; NaN where nothing was recovered."""
    return np.abs(recovered - painted).mean(axis=1)


def _document(surroundings: Surroundings, recovery: Recovery, timings: list[Timing], queries: int) -> dict:
    """Everything the demo found, ready for JSON."""
    painted = surroundings.painted
    boxes = []
    for i, box in enumerate(surroundings.rig.boxes):
        unseen = np.isnan(recovery.colors[i, 0])
        entry = {
            "label": box.label,
            "recovered_rgb": None if unseen else recovery.colors[i].tolist(),
            "key_points_seen": int(recovery.seen[i].any(axis=1).sum()),
        }
        if painted is not None:
            error = color_errors(recovery.colors, painted)[i]
            entry |= {
                "painted_rgb": painted[i].tolist(),
                "error": None if unseen else float(error),
                "counted": bool(recovery.counted[i]),
            }
        boxes.append(entry)
    document = {
        "cameras": [camera.name for camera in surroundings.rig.cameras],
        "boxes": boxes,
        "module": module_document(
            "DeformableFeatureAggregation",
            queries,
            f"{len(surroundings.rig.cameras)} cameras, {EMBED_DIMS} channels",
            timings,
        ),
    }
    if painted is not None:
        counted = [box["error"] for box in boxes if box["counted"]]
        document["colors"] = {
            "counted_boxes": len(counted),
            "rule": f"one view shows every key point, and the box at least {MIN_PIXELS_ACROSS} pixels across",
            "mean_absolute_error": float(np.mean(counted)),
            "unit": "1/255",
        }
    return document


def _query_count(text: str) -> int:
    count = int(text)
    if not 1 <= count <= MAX_QUERIES:
        raise argparse.ArgumentTypeError(f"must be between 1 and {MAX_QUERIES}")
    return count
