"""A comparison with other people's code that was made by hand on one machine: ops, modules, and whole models.

`bench --peers` compares with what pip installs; what needs a clone, a patch or a large package is kept in such a
document.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reimplementation.bench.results import MAX_WORDS, read_entry
from reimplementation.data.documents import entries_of, numbers, read_json, require_keys, shown, text

MAX_ENTRIES = 1000
MAX_SIDE = 1e5  # pixels of an image
MAX_HOW = 1000  # characters that say how the figures were taken
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
OURS = "ours"
T = TypeVar("T")


@dataclass(frozen=True)
class OpTimes:
    """Microseconds of an op: its forward, and its backward."""

    fwd: float
    bwd: float


@dataclass(frozen=True)
class ModuleTimes:
    """Microseconds of a module's forward, and of forward and backward; megabytes kept in between, and held at most."""

    fwd_us: float
    train_us: float
    kept_mb: float
    peak_mb: float


@dataclass(frozen=True)
class ModelRun:
    """A whole model as it comes (original), and with our op in it (fused): milliseconds, and megabytes held at most.

    mode: "float32", or "bfloat16-autocast" and the like. passed: "forward" or "training".
    """

    model: str
    mode: str
    batch: int
    passed: str
    original_ms: float
    fused_ms: float
    original_peak_mb: float
    fused_peak_mb: float
    height: int
    width: int


@dataclass(frozen=True)
class Comparison:
    """What was measured on one machine.

    machine, date, how: where, when and in which way, in words.
    versions: of what was compared with, by name.
    ops: by case, then by whose kernels ("ours", …) and dtype ("float32", …).
    events: the op of SparseDrive, by case, in float32; by CUDA events around a call, on ``events_date``.
    modules: by a name that says which, whose, and in which dtype.
    models: every model, mode, batch and pass.
    """

    machine: str
    date: str
    how: str
    versions: dict[str, str]
    ops: dict[str, dict[tuple[str, str], OpTimes]]
    events: dict[str, OpTimes]
    events_date: str
    modules: dict[str, ModuleTimes]
    models: list[ModelRun]


def read_comparison(path: Path) -> Comparison:
    """The comparison in a file.

    Raises:
        ValueError: the file holds something else; the message names it and what is wrong in it.
    """
    document = read_json(path)
    events_key = next((key for key in document if key.startswith("sparsedrive_op_events_")), "sparsedrive_op_events_…")
    require_keys(document, ("machine", "date", "how", "versions", "ops", "modules", "models", events_key), str(path))
    ops = _by_name(document["ops"], f"{path}: ops", lambda found, where: _by_name(found, where, _entry_of(OpTimes)))
    return Comparison(
        text(document["machine"], f"{path}: machine", MAX_WORDS),
        text(document["date"], f"{path}: date"),
        text(document["how"], f"{path}: how", MAX_HOW),
        _by_name(document["versions"], f"{path}: versions", text),
        {case: {_whose(name, path): times for name, times in found.items()} for case, found in ops.items()},
        _by_name(document[events_key], f"{path}: {events_key}", _pair),
        text(events_key.rpartition("_")[2], f"{path}: the date in {events_key}"),
        _by_name(document["modules"], f"{path}: modules", _entry_of(ModuleTimes)),
        [
            _model_run(entry, f"{path}: models[{i}]")
            for i, entry in enumerate(entries_of(document, "models", MAX_ENTRIES, str(path)))
        ],
    )


def _by_name(found: Any, where: str, read: Callable[[Any, str], T]) -> dict[str, T]:
    """An object whose keys are names, each value read."""
    require_keys(found, (), where)
    if len(found) > MAX_ENTRIES:
        raise ValueError(f"{where} must have at most {MAX_ENTRIES} entries; got {len(found)}")
    return {text(name, where): read(value, f"{where}: {shown(name)}") for name, value in found.items()}


def _entry_of(kind: type[T]) -> Callable[[Any, str], T]:
    return lambda entry, where: read_entry(kind, entry, where)


def _pair(found: Any, where: str) -> OpTimes:
    forward, backward = numbers(found, where, (2,), 1e9).tolist()
    return OpTimes(forward, backward)


def _whose(name: str, path: Path) -> tuple[str, str]:
    """Whose kernels a name like "ddetr fp32" means, and their dtype; what follows the dtype belongs to whose."""
    match = re.fullmatch(r"(.+?) (fp32|fp16|bf16)((?: .+)?)", name)
    if match is None:
        raise ValueError(f"{path}: ops must be named like 'ours fp32'; got {shown(name)}")
    whose, dtype, rest = match.groups()
    return whose + rest, DTYPES[dtype]


def _model_run(entry: Any, where: str) -> ModelRun:
    require_keys(entry, ("pass", "size"), where)
    height, width = numbers(entry["size"], f"{where}: size", (2,), MAX_SIDE).tolist()
    return read_entry(ModelRun, {**entry, "passed": entry["pass"], "height": height, "width": width}, where)
