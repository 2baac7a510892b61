"""What the benchmark measured, and how it is kept: JSON with the machine, the versions and the date."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

import reimplementation
from reimplementation.bench.timing import Timing
from reimplementation.data import documents
from reimplementation.data.documents import entries_of, numbers, require_keys, shown, text

FLOOR = "floor"
OF_THE_EXTENSION = ("cuda", "cpu")  # backends
MAX_RESULTS = 10_000
MAX_WORDS = 200  # characters of a machine's name or a version
MAX_NUMBER = 1e15  # bytes, microseconds


@dataclass(frozen=True)
class Result:
    """One figure.

    case, passed: what was timed, names in `cases.CASES` and of one of its passes.
    backend: one of `reimplementation.ops.backends.BACKENDS`; or "floor", the kernel that only gathers the same rows; or
        a peer, a name in `peers.PEERS`.
    dtype: of the features, such as "float32".
    gathered_bytes: of all rows that the pass gathers, see `gathers.Gathers`; None where nobody counted.
    extra_bytes: most memory that the pass held beyond its inputs; None if unknown.
    kept_bytes: what its forward leaves for its backward, the output not counted; None where nobody counted.
    """

    case: str
    device: str
    backend: str
    dtype: str
    passed: str
    timing: Timing
    gathered_bytes: int | None = None
    extra_bytes: int | None = None
    kept_bytes: int | None = None

    @property
    def key(self) -> tuple[str, ...]:
        """What is timed how: of two figures with the same, the later one counts."""
        return self.case, self.device, self.backend, self.dtype, self.passed

    @property
    def is_ours(self) -> bool:
        """Whether kernels of the extension ran, with which Triton's, plain PyTorch and peers are compared."""
        return self.backend in OF_THE_EXTENSION

    @property
    def gather_bandwidth(self) -> float | None:
        """GB/s: `gathered_bytes` over the median time."""
        return None if self.gathered_bytes is None else self.gathered_bytes / self.timing.median_us / 1e3


@dataclass(frozen=True)
class Document:
    """The results of one machine.

    machine: "device" (its name), "cpu", "threads", and "copy_gb_per_s" (read and written; may be missing).
    versions: "reimplementation", "torch", "cuda" (None for a CPU build), "python", and packages of peers.
    date: ISO 8601; those of merged files, joined.
    results: of one dataclass: `Result`, or a sweep's.
    """

    machine: dict
    versions: dict
    date: str
    results: list[Any]

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def describe(
    device: torch.device,
    results: list,
    copy_gb_per_s: float | None = None,
    packages: Mapping[str, str] = MappingProxyType({}),
) -> Document:
    """Results of today on this machine; ``packages`` are others' that were timed, with their versions."""
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
        **packages,
    }
    return Document(machine, versions, datetime.date.today().isoformat(), results)


def read(paths: Sequence[Path], kind: type = Result) -> list[Document]:
    """The documents in files; those of one machine and its versions become one, on a GPU whatever the host's threads.

    Their results are of the dataclass ``kind``, which has a key, whose first part is what belongs together.

    Raises:
        ValueError: a file holds no results of the benchmark; the message names it.
    """
    merged: list[Document] = []
    for document in (read_one(path, kind) for path in paths):
        for i, other in enumerate(merged):
            if _belong_together(other, document):
                merged[i] = _joined(other, document)
                break
        else:
            merged.append(document)
    return merged


def read_one(path: Path, kind: type) -> Document:
    """The document in a file, whose results are of the dataclass ``kind``.

    Raises:
        ValueError: the file holds something else; the message names it and what is wrong in it.
    """
    document = documents.read_json(path)
    require_keys(document, ("machine", "versions", "date", "results"), str(path))
    require_keys(document["machine"], ("device", "threads"), f"{path}: machine")
    require_keys(document["versions"], ("torch", "cuda"), f"{path}: versions")
    for key, value in (*document["machine"].items(), *document["versions"].items(), ("date", document["date"])):
        text(str(value), f"{path}: {shown(key)}", MAX_WORDS)
    entries = entries_of(document, "results", MAX_RESULTS, str(path))
    results = [read_entry(kind, entry, f"{path}: results[{i}]") for i, entry in enumerate(entries)]
    return Document(document["machine"], document["versions"], document["date"], results)


def read_entry(kind: type, entry: Any, where: str) -> Any:
    """A dataclass of numbers, text and other dataclasses, from JSON; fields with a default may be missing."""
    require_keys(entry, [field.name for field in fields(kind) if field.default is MISSING], where)
    types = get_type_hints(kind)
    return kind(**{name: _value(types[name], entry[name], f"{where}: {name}") for name in types if name in entry})


def _value(kind: type, value: Any, where: str) -> Any:
    if is_dataclass(kind):
        return read_entry(kind, value, where)
    if kind is str:
        return text(value, where, MAX_WORDS)
    if isinstance(kind, UnionType):  # such as int | None
        if value is None and NoneType in get_args(kind):
            return None
        (kind,) = (member for member in get_args(kind) if member is not NoneType)
        return _value(kind, value, where)
    if get_origin(kind) is list:
        (member,) = get_args(kind)
        if not isinstance(value, list) or len(value) > MAX_RESULTS:
            raise ValueError(f"{where} must be a list of at most {MAX_RESULTS} entries; got {shown(value)}")
        return [_value(member, entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    number = float(numbers(value, where, (), MAX_NUMBER))
    if number < 0 or (number == 0 and where.endswith("median_us")):  # others are compared with the median
        raise ValueError(f"{where} must be positive; got {number:g}")
    return number if kind is float else int(number)


def _belong_together(first: Document, second: Document) -> bool:
    """Whether two documents are of one machine, and no version that both name differs."""
    machines = first.machine, second.machine
    on_cpu = any(machine["device"] == machine.get("cpu") for machine in machines)
    same_machine = len({(machine["device"], machine["threads"] if on_cpu else None) for machine in machines}) == 1
    shared = first.versions.keys() & second.versions.keys()
    return same_machine and all(first.versions[name] == second.versions[name] for name in shared)


def _joined(first: Document, second: Document) -> Document:
    """Both documents' results, case by case; where both have a figure, the second's."""
    cases = list(dict.fromkeys(r.key[0] for r in first.results + second.results))
    figures = {r.key: r for r in first.results + second.results}
    ordered = sorted(figures.values(), key=lambda r: cases.index(r.key[0]))
    dates = sorted({*first.date.split(", "), second.date})
    versions = first.versions | second.versions
    return Document(first.machine | second.machine, versions, ", ".join(dates), ordered)


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
