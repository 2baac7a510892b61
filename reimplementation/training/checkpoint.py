"""Checkpoints of a training: written so that a moment's power cut loses none, and read back whole."""

from __future__ import annotations

import io
import os
import re
import warnings
from pathlib import Path

import torch

NAME = re.compile(r"step-(\d+)\.pt")
UNFINISHED = ".unfinished"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def save(folder: Path, step: int, document: dict, keep: int) -> Path:
    """Write ``folder/step-N.pt``, and remove all but the newest ``keep``.

    The file has its name only once all of it is on the disk: whoever stops the process at whatever moment leaves the
    earlier files as they were.

    Args:
        folder: of the training; it exists.
        step: N, how many steps are done.
        document: tensors and plain values, nested.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: the disk is full, or refuses otherwise.
    """
    path = folder / f"step-{step:08d}.pt"
    unfinished = path.with_suffix(UNFINISHED)
    buffer = io.BytesIO()
    torch.save(document, buffer)
    try:
        with unfinished.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        _sync_folder(folder)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        last = newest(folder)
        kept = f"the last good checkpoint is {last}" if last else "there is no earlier one"
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}); {kept}") from error
    for old in [*found(folder)[:-keep], *folder.glob(f"step-*{UNFINISHED}")]:
        old.unlink(missing_ok=True)
    return path


def load(path: Path) -> dict:
    """Read what `save` wrote; only tensors and plain values are unpickled.

    Raises:
        ValueError: the file is no checkpoint of a training, or is damaged.
    """
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # damaged archives raise whatever their reader stumbles over
        raise ValueError(f"{path} is no checkpoint that can be read, or is damaged: {error}") from None
    if not isinstance(document, dict) or not {"step", "config", "model"} <= document.keys():
        raise ValueError(f"{path} is no checkpoint of a training: it must hold step, config and model")
    return document


def load_newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint of a folder that can be read, None where there is none; a damaged one is warned of."""
    for path in reversed(found(folder)):
        try:
            return path, load(path)
        except ValueError as error:
            warnings.warn(f"{error}; the one before is taken", stacklevel=2)
    return None


def parameters_to_judge(document: dict) -> dict:
    """A checkpoint's state of the model, with the parameters' averages in their places where it has such."""
    return document["model"] | document.get("average", {})


def found(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder."""
    return next(reversed(found(folder)), None)


def _sync_folder(folder: Path) -> None:
    """Put a new name on the disk, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
