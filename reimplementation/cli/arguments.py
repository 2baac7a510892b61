"""What several commands ask of their arguments; each message says what was expected, and what came."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import overload

import torch


def positive(text: str) -> int:
    """An argument's type: a whole number from 1 on."""
    return _whole(text, None)


def at_most(limit: int) -> Callable[[str], int]:
    """An argument's type: a whole number from 1 to a limit."""
    return lambda text: _whole(text, limit)


def device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        ValueError: it is neither the CPU nor a GPU that this PyTorch can use.
    """
    try:
        found = torch.device(name)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if found.type == "cpu":
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise ValueError(f"--device {name} needs a PyTorch with CUDA; {torch.__version__} is a build without it")
    count = torch.cuda.device_count()
    if (found.index or 0) >= count:
        raise ValueError(f"--device {name} is not there: PyTorch sees {count or 'no'} GPU{'' if count == 1 else 's'}")
    return found


def file(option: str, path: str | None) -> Path | None:
    """The file that an option names to be written, None where it names none.

    Raises:
        ValueError: it is a folder, or lies in none that exists.
    """
    if path is None:
        return None
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise ValueError(f"{option} {path} must name a file in a folder that exists")
    return Path(path)


@overload
def picture(option: str, path: str) -> Path: ...


@overload
def picture(option: str, path: None) -> None: ...


def picture(option: str, path: str | None) -> Path | None:
    """The file that an option names for a picture, None where it names none.

    Raises:
        ModuleNotFoundError: matplotlib, which draws, is missing.
        ValueError: as for `file`; or the file's name has no suffix of a format that matplotlib writes.
    """
    if (found := file(option, path)) is None:
        return None
    from matplotlib.figure import Figure

    suffixes = [f".{name}" for name in sorted(Figure().canvas.get_supported_filetypes())]
    if found.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path} must end in one of {' '.join(suffixes)}")
    return found


def _whole(text: str, limit: int | None) -> int:
    if not text.isdecimal() or int(text) == 0 or (limit is not None and int(text) > limit):
        wanted = "a positive whole number" if limit is None else f"a whole number between 1 and {limit}"
        raise argparse.ArgumentTypeError(f"expected {wanted}; got {text!r}")
    return int(text)
