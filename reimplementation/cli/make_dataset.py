"""`python -m reimplementation make-dataset`: synthetic drives as files in nuScenes' layout."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from reimplementation.data.nuscenes_writer import VERSION, Writer
from reimplementation.data.synthetic import FRAMES_PER_DRIVE, Drive, Moment, synthetic_rig

from . import arguments

WIDTH, HEIGHT = 704, 256


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "make-dataset",
        help="write synthetic drives in nuScenes' layout",
        description=f"Draw synthetic drives and write their tables and images as nuScenes' {VERSION} has them, for "
        "programs that read that. Map lines and clouds of points are not written.",
    )
    parser.add_argument("folder", metavar="DIR", help="a new folder")
    parser.add_argument("--drives", metavar="N", type=arguments.positive, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--frames",
        metavar="N",
        type=arguments.positive,
        default=FRAMES_PER_DRIVE,
        help="of each drive, two a second (default: %(default)s)",
    )
    parser.add_argument("--width", metavar="N", type=arguments.positive, default=WIDTH, help="(default: %(default)s)")
    parser.add_argument("--height", metavar="N", type=arguments.positive, default=HEIGHT, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="that draws: cpu, cuda or cuda:N (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    device = arguments.device(options.device)
    rig = synthetic_rig(options.width, options.height)
    writer = Writer(Path(options.folder), rig)

    def frames(drive: Drive) -> Iterator[tuple[Moment, np.ndarray, np.ndarray]]:
        from reimplementation.data.rendering import render

        for frame in range(options.frames):
            moment = drive.moment(frame)
            rendering = render([moment], rig, device)
            yield moment, rendering.images[0].cpu().numpy(), rendering.num_points[0].cpu().numpy()

    console = Console(stderr=True)
    for index in track(range(options.drives), "drawing", console=console, transient=True):
        writer.add_drive(f"scene-{index:04d}", frames(Drive(index, num_frames=options.frames)))
    writer.close()
    print(f"{options.drives} drives of {options.frames} frames: {options.folder}")
