"""`python -m reimplementation train`: train a detector, alone or, under torchrun, with others."""

from __future__ import annotations

import argparse
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reimplementation.training.config import TrainingConfig

from . import arguments

STOPPING = (signal.SIGTERM, signal.SIGINT)
SYNTHETIC = "synthetic"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a detector",
        description="Train what a YAML file describes. The same command goes on where it was stopped, by Ctrl+C too. "
        "Under torchrun the processes share each batch.",
    )
    parser.add_argument("--config", metavar="FILE", required=True, help="the training, as YAML")
    parser.add_argument(
        "--data",
        metavar="DIR",
        default=SYNTHETIC,
        help="a folder in nuScenes' layout, or with a rig's sample.json (default: %(default)s drives)",
    )
    parser.add_argument("--work-dir", metavar="DIR", required=True, help="for checkpoints and metrics")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    from reimplementation.training.loop import Training
    from reimplementation.training.processes import join

    config = TrainingConfig.from_yaml(options.config)
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

        yield on_step
