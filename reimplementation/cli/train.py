"""`python -m reimplementation train`: train a detector, alone or, under torchrun, with others."""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reimplementation.training.config import TrainingConfig

from . import arguments

if TYPE_CHECKING:
    from reimplementation.training.held_out import Judged
    from reimplementation.training.loop import Training

STOPPING = (signal.SIGTERM, signal.SIGINT)
SYNTHETIC = "synthetic"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a detector",
        description="Train what a YAML file describes. The same command goes on where it was stopped, by Ctrl+C too. "
        "Under torchrun the processes share each batch.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="the training, as YAML")
    what.add_argument("--preset", metavar="NAME", help="a training that comes with the package: tiny")
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=SYNTHETIC,
        help="a folder in nuScenes' layout, or with a rig's sample.json (default: %(default)s drives)",
    )
    parser.add_argument("--work-dir", metavar="DIR", required=True, help="for checkpoints and metrics")
    parser.add_argument(
        "--show", metavar="FILE", help="at the end, judge the detector before and after the training, and draw both"
    )
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from reimplementation.training.loop import Training
    from reimplementation.training.processes import join

    Path(options.work_dir).mkdir(parents=True, exist_ok=True)
    show = arguments.picture("--show", options.show)
    config = TrainingConfig.preset(options.preset) if options.preset else TrainingConfig.from_yaml(options.config)
    with join(arguments.device(options.device)) as process, asked_to_stop() as is_stopped:
        data = None if options.data == SYNTHETIC else Path(options.data)
        training = Training(config, Path(options.work_dir), process, data)
        if process.is_first and training.step > 0:
            print(f"going on after step {training.step} of {config.num_steps}")
        with progress(config.num_steps, training.step, process.is_first) as on_step:
            outcome = training.run(on_step, is_stopped)
    if process.is_first:
        done = "finished" if outcome.is_finished else "stopped; the same command goes on from there"
        print(f"step {outcome.step} of {config.num_steps}: {done}")
        print(f"checkpoint: {outcome.checkpoint}")
        if show is not None and outcome.is_finished:
            _show(show, training)


def _show(path: Path, training: Training) -> None:
    """Judge the detector as the training began and as it ended, and draw what each finds in one frame."""
    from reimplementation.training.building import new_model
    from reimplementation.training.frame_drawing import draw_found
    from reimplementation.training.held_out import judge, keeping, moments

    config, device, frames = training.config, training.process.device, training.held_out
    models = {"before": new_model(config, training.frames).to(device), "after": training.judged_model()}
    found = {}
    for title, model in models.items():
        kept: list[Judged] = []
        steps = keeping(moments(model, frames, device, config.precision), frames.num_batches - 1, kept)
        boxes = judge(steps, config.model).boxes
        print(f"{title}: mAP {boxes.mean_average_precision:.3f}, NDS {boxes.nd_score:.3f}")
        found[f"{title}, mAP {boxes.mean_average_precision:.2f}"] = kept[0]
    draw_found(path, found, config.model.det.classes)
    print(f"picture: {path}")


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """While this lasts, SIGTERM and SIGINT only ask; the callable says whether they did. A second SIGINT interrupts."""
    asked: list[int] = []

    def remember(number: int, _frame: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in STOPPING}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(num_steps: int, first_step: int, is_shown: bool) -> Iterator[Callable[[dict], None]]:
    """A bar on the terminal with the loss beside it; the callable is told of every step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  rate {task.fields[lr]:.2g}  {task.fields[seconds]:.2f} s a step"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not is_shown) as bar:
        task = bar.add_task("", total=num_steps, completed=first_step, loss=math.nan, lr=math.nan, seconds=math.nan)

        def on_step(row: dict) -> None:
            bar.update(task, advance=1, **{name: row[name] for name in ("loss", "lr", "seconds")})
            if "mAP" in row:
                bar.console.print(f"after step {row['step'] + 1}: mAP {row['mAP']:.3f}, NDS {row['NDS']:.3f}")

        yield on_step
