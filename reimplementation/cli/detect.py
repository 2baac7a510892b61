"""`python -m reimplementation detect`: the boxes and map lines that a detector finds around a car, as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from reimplementation.demo.detection import build, detect, look_around

from . import arguments

MIN_SCORE = 0.3  # of a box or line of a trained detector
MOST_BOXES, MOST_LINES = 60, 40
UNTRAINED = "random weights: nothing was learnt, and what is drawn means nothing"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "detect",
        help="detect boxes and map lines around a car, and draw them",
        description="Run SparseDrive's perception on the images of one moment and draw what it finds, in the images "
        "and from above. Without a checkpoint the weights are random, and the picture says so.",
    )
    parser.add_argument(
        "--rig", metavar="DIR", help="a folder with sample.json and images (default: a built-in street)"
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="the parameters (default: random ones)")
    parser.add_argument("--config", metavar="FILE", help="the detector, as YAML (default: SparseDrive-S)")
    parser.add_argument(
        "--output", metavar="FILE", default="detect.png", help="the picture, as PNG, SVG, … (default: %(default)s)"
    )
    parser.add_argument(
        "--min-score",
        metavar="S",
        type=_score,
        help=f"leave out what scores less (default: {MIN_SCORE} with a checkpoint, 0 without)",
    )
    parser.add_argument("--device", default="cpu", help="that the detector runs on (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    output = arguments.picture("--output", options.output)  # before the work begins
    device = arguments.device(options.device)
    rig = look_around(options.rig)
    model = build(options.config, options.checkpoint, rig).to(device)
    least = options.min_score
    if least is None:
        least = 0.0 if options.checkpoint is None else MIN_SCORE
    found = detect(model, rig).best(least, MOST_BOXES, MOST_LINES)

    from reimplementation.demo.detection_drawing import draw

    weights = UNTRAINED if options.checkpoint is None else f"weights of {Path(options.checkpoint).name}"
    said = f"{_count(len(found.boxes), 'box', 'boxes')} and {_count(len(found.lines), 'line', 'lines')}"
    draw(output, rig, found, said, weights, warning=options.checkpoint is None)
    print(f"{said} that score at least {least:g}; {weights}")
    print(f"picture: {output}")


def _count(number: int, one: str, many: str) -> str:
    return f"{number or 'no'} {one if number == 1 else many}"


def _score(text: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1; got {text!r}")
    return score
