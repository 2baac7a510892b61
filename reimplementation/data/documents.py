"""Reading what comes from anywhere: documents, paths, numbers and text that may be broken or meant to harm.

Each function raises ValueError with a message of one printable line: what was expected, and what came.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

MAX_JSON_BYTES = 16 * 2**20
MAX_TEXT_LENGTH = 64
MAX_SHOWN = 80


def read_json(path: Path) -> dict:
    """The object in a JSON file, of at most `MAX_JSON_BYTES`; OSError where the file cannot be read."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object; got {shown(document)}")
    return document


def require_keys(entry: Any, keys: Iterable[str], where: str) -> None:
    """`entry` is a dict with those keys, and perhaps others."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object; got {shown(entry)}")
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")


def entries_of(document: dict, key: str, limit: int, where: str) -> list:
    """The list under a key, of at most `limit` entries."""
    entries = document.get(key)
    if not isinstance(entries, list):
        came = f"got {shown(entries)}" if key in document else "the key is missing"
        raise ValueError(f"{where}: {key} must be a list; {came}")
    if len(entries) > limit:
        raise ValueError(f"{where}: {key} must have at most {limit} entries; got {len(entries)}")
    return entries


def numbers(value: Any, key: str, shape: tuple[int, ...], limit: float) -> np.ndarray:
    """An array of that shape, float64, of numbers between -limit and limit."""
    if not _are_numbers(value, shape):
        raise ValueError(f"{key} must be numbers of the shape {shape}; got {shown(value)}")
    try:
        array = np.array(value, dtype=np.float64)
    except OverflowError:  # a whole number that no float holds
        array = np.full(shape, np.inf)
    if not (np.abs(array) < limit).all():
        raise ValueError(f"{key} must be finite and below {limit:g}; got {shown(value)}")
    return array


def text(value: Any, key: str, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Printable text: what is shown on a terminal must not command it."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= max_length:
        raise ValueError(f"{key} must be 1 to {max_length} printable characters; got {shown(value)}")
    return value


def file_below(folder: Path, name: str) -> Path:
    """The regular file `name` below `folder`; a path, or a link, that leads out of the folder is refused."""
    if not name.isprintable() or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{shown(name)} must be a printable path below {folder}, neither absolute nor with ..")
    path = folder / name
    try:
        leads_out = not path.resolve().is_relative_to(folder.resolve())
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise ValueError(f"{shown(name)} cannot be read: {type(error).__name__}") from None
    if leads_out:
        raise ValueError(f"{path} is a link that leads out of {folder}")
    if not is_file:
        raise ValueError(f"{path} does not exist or is not a file")
    return path


def shown(value: Any) -> str:
    """A value as ASCII, cut to a length that fits a message."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    try:
        line = ascii(value)
    except RecursionError:
        line = f"a deeply nested {type(value).__name__}"
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 3] + "..."


def _are_numbers(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether these are numbers, nested in that shape.

    NumPy would make an array of whatever comes: of gigabytes, where a list holds one long text among short ones.
    """
    if not shape:
        return isinstance(value, Real) and not isinstance(value, bool)
    if isinstance(value, np.ndarray):
        return value.shape == shape and value.dtype.kind in "iuf"
    return (
        isinstance(value, (list, tuple))
        and len(value) == shape[0]
        and all(_are_numbers(entry, shape[1:]) for entry in value)
    )
