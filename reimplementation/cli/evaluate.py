"""`python -m reimplementation evaluate`: nuScenes' metrics of a trained detector on drives that it has not seen."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from reimplementation.training import checkpoint
from reimplementation.training.config import TrainingConfig
from reimplementation.training.evaluate import DISTANCES, ERROR_DISTANCE, ERRORS
from reimplementation.training.held_out import Evaluation

from . import arguments

if TYPE_CHECKING:
    from reimplementation.training.held_out import Judged

SHOWN_FRAME = 4  # of the first slot: by then instances have gone from frame to frame
ERROR_NAMES = dict(zip(ERRORS, ("mATE", "mASE", "mAOE", "mAVE", "mAAE")))


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="judge a trained detector by nuScenes' metrics",
        description="Run the newest checkpoint of a training on drives that are held out, and say mAP, NDS and the "
        "five errors of boxes, and the mAP of map lines.",
    )
    parser.add_argument("--work-dir", metavar="DIR", required=True, help="of the training")
    parser.add_argument("--checkpoint", metavar="FILE", help="another than the newest one")
    parser.add_argument("--data", metavar="DIR", help="frames of files, as `train` takes them, instead of drives")
    parser.add_argument("--drives", metavar="N", type=arguments.positive, help="how many (default: the training's)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    parser.add_argument("--picture", metavar="FILE", help="draw the curves of precision over recall there")
    parser.add_argument("--frame-picture", metavar="FILE", help="draw what is there and what is found in a frame there")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    picture = arguments.picture("--picture", options.picture)
    frame_picture = arguments.picture("--frame-picture", options.frame_picture)
    output = arguments.file("--json", options.json)
    device = arguments.device(options.device)
    path, document = _read(options.work_dir, options.checkpoint)
    config = TrainingConfig.from_dict(document["config"])
    data = config.data
    if options.drives is not None:
        data = dataclasses.replace(data, num_validation_drives=options.drives)

    from rich.console import Console
    from rich.progress import track

    from reimplementation.models.sparsedrive import SparseDrive
    from reimplementation.training.building import held_out_frames
    from reimplementation.training.held_out import judge, keeping, moments

    model = SparseDrive(config.model)
    model.load_state_dict(checkpoint.parameters_to_judge(document))
    model = model.to(device)
    folder = None if options.data is None else Path(options.data)
    frames = held_out_frames(dataclasses.replace(config, data=data), folder, device)
    steps = track(
        moments(model, frames, device, config.precision),
        "driving",
        total=frames.num_batches,
        console=Console(stderr=True),
        transient=True,
    )
    kept: list[Judged] = []
    evaluation = judge(keeping(steps, min(SHOWN_FRAME, frames.num_batches - 1), kept), model.config)
    _print_tables(evaluation, f"{path}, {options.data or f'{data.num_validation_drives} drives'}")
    if output is not None:
        output.write_text(json.dumps({"step": document["step"], **evaluation.to_dict()}, indent=1) + "\n")
        print(f"numbers: {output}")
    if picture is not None:
        from reimplementation.training.drawing import draw_curves

        draw_curves(picture, evaluation.boxes)
        print(f"picture: {picture}")
    if frame_picture is not None:
        from reimplementation.training.frame_drawing import draw_found

        draw_found(frame_picture, {"found": kept[0]}, model.config.det.classes)
        print(f"picture of a frame: {frame_picture}")


def _read(folder: str, file: str | None) -> tuple[Path, dict]:
    if file is not None:
        return Path(file), checkpoint.load(Path(file))
    found = checkpoint.load_newest(Path(folder))
    if found is None:
        raise ValueError(f"{folder} holds no checkpoint of a training")
    return found


def _print_tables(evaluation: Evaluation, title: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    boxes = evaluation.boxes
    table = Table("AP at", title=title, box=SIMPLE, padding=(0, 1, 0, 0))
    table.columns[0].no_wrap = True
    for column in (*(f"{distance:g}m" for distance in DISTANCES), *ERRORS):
        table.add_column(column, justify="right")
    for name, by_distance in boxes.average_precision.items():
        values = (*by_distance.values(), *boxes.errors[name].values())
        table.add_row(name.replace("_", " "), *(_shown(value, 2) for value in values))
    console = Console()
    console.print(table)
    errors = ", ".join(f"{ERROR_NAMES[name]} {_shown(value)}" for name, value in boxes.mean_errors.items())
    console.print(f"mAP {_shown(boxes.mean_average_precision)}, NDS {_shown(boxes.nd_score)}, {errors}")
    average = _shown(evaluation.average_precision_of_present(ERROR_DISTANCE))
    console.print(f"AP at {ERROR_DISTANCE:g} m of the {len(evaluation.present)} classes that are there: {average}")
    if evaluation.lines is not None:
        console.print(f"map lines: mAP {_shown(evaluation.lines.mean_average_precision)}")


def _shown(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
