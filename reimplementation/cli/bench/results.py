"""What the benchmark measured, and how it is kept: JSON with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import reimplementation
from reimplementation.timing import Timing

FLOOR = "floor"


@dataclass(frozen=True)
class Result:
    """One figure.

    case, passed: what was timed, names in `cases.CASES` and of one of its passes.
    backend: one of `reimplementation.ops.backends.BACKENDS`; or "floor", the kernel that only gathers the same rows.
    dtype: of the features, such as "float32".
    gathered_bytes: of all rows that the pass gathers, see `gathers.Gathers`; None where nobody counted.
    extra_bytes: most memory that the pass held beyond its inputs; None if unknown.
    """

    case: str
    device: str
    backend: str
    dtype: str
    passed: str
    timing: Timing
    gathered_bytes: int | None = None
    extra_bytes: int | None = None

    @property
    def gather_bandwidth(self) -> float | None:
        """GB/s: `gathered_bytes` over the median time."""
        return None if self.gathered_bytes is None else self.gathered_bytes / self.timing.median_us / 1e3


@dataclass(frozen=True)
class Document:
    """The results of one machine.

    machine: "device" (its name), "cpu", "threads", and "copy_gb_per_s" (read and written; may be missing).
    versions: "reimplementation", "torch", "cuda" (None for a CPU build), "python".
    date: ISO 8601; those of merged files, joined.
    results: of one dataclass: `Result`, or a sweep's.
    """

    machine: dict
    versions: dict
    date: str
    results: list[Any]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def describe(device: torch.device, results: list, copy_gb_per_s: float | None = None) -> Document:
    """Results of today on this machine."""
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }
    if copy_gb_per_s is not None:
        machine["copy_gb_per_s"] = copy_gb_per_s
    versions = {
        "reimplementation": reimplementation.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    return Document(machine, versions, datetime.date.today().isoformat(), results)


def read(paths: Sequence[Path]) -> list[Document]:
    """The documents in files; those of one machine and its versions become one.

    Raises:
        ValueError: a file holds no results of the benchmark; the message names it.
    """
    merged: dict[str, Document] = {}
    for path in paths:
        document = read_one(path, _result)
        named = {key: document.machine[key] for key in ("device", "threads")}
        same = json.dumps([named, document.versions], sort_keys=True)
        if same in merged:
            document = _joined(merged[same], document)
        merged[same] = document
    return list(merged.values())


def read_one(path: Path, make_result: Callable[[dict], Any]) -> Document:
    """The document in a file, whose results ``make_result`` makes from the file's entries.

    Raises:
        ValueError: the file holds something else; the message names it.
    """
    try:
        fields = json.loads(path.read_text())
        results = [make_result(entry) for entry in fields["results"]]
        return Document(fields["machine"], fields["versions"], fields["date"], results)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold what this command writes: {error!r}") from error


def _result(entry: dict) -> Result:
    return Result(**{**entry, "timing": Timing(**entry["timing"])})


def _joined(first: Document, second: Document) -> Document:
    """Both documents' results; where both have a figure, the second's."""
    figures = {(r.case, r.device, r.backend, r.dtype, r.passed): r for r in first.results + second.results}
    dates = sorted({*first.date.split(", "), second.date})
    return Document(first.machine | second.machine, first.versions, ", ".join(dates), list(figures.values()))


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
