"""What `bench` measured, as JSON, as a table for the terminal, and as Markdown."""

from __future__ import annotations

import datetime
import json
import platform
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

import reimplementation
from reimplementation import untrusted
from reimplementation.timing import Timing
from reimplementation.untrusted import entries_of, numbers, require_keys, shown, text

MAX_RESULTS = 10_000
MAX_WORDS = 200  # characters of a machine's name or a version
MAX_MICROSECONDS = 1e12


@dataclass(frozen=True)
class Result:
    """One line of the table.

    passed: "forward", "backward" alone, or "training", forward and backward together through autograd.
    """

    case: str
    device: str
    backend: str
    dtype: str
    passed: str
    timing: Timing


def write_json(path: Path, device: torch.device, results: list[Result]) -> None:
    """Write the results with what is needed to read them later: the machine, the versions, the date."""
    document = {
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "reimplementation": reimplementation.__version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "date": datetime.date.today().isoformat(),
        "results": [asdict(result) for result in results],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def read_json(path: Path) -> tuple[dict, list[Result]]:
    """The document that `write_json` wrote, and its results; ValueError names what is broken in any other."""
    document = untrusted.read_json(path)
    require_keys(document, ("machine", "versions", "date", "results"), str(path))
    require_keys(document["machine"], ("device", "threads"), f"{path}: machine")
    require_keys(document["versions"], ("torch", "cuda"), f"{path}: versions")
    for key, value in (*document["machine"].items(), *document["versions"].items(), ("date", document["date"])):
        text(str(value), f"{path}: {shown(key)}", MAX_WORDS)
    entries = entries_of(document, "results", MAX_RESULTS, str(path))
    return document, [_read(Result, entry, f"{path}: results[{i}]") for i, entry in enumerate(entries)]


def _read(kind: type, entry: Any, where: str) -> Any:
    """A `Result`, or the `Timing` in it, with every field of the type that it should have."""
    read = {"str": text, "float": _microseconds, "Timing": partial(_read, Timing)}
    require_keys(entry, [field.name for field in fields(kind)], where)
    return kind(**{f.name: read[f.type](entry[f.name], f"{where}: {f.name}") for f in fields(kind)})


def _microseconds(value: Any, key: str) -> float:
    microseconds = float(numbers(value, key, (), MAX_MICROSECONDS))
    if microseconds < 0 or (microseconds == 0 and key.endswith("median_us")):  # others are compared with the median
        raise ValueError(f"{key} must be positive; got {microseconds:g}")
    return microseconds


def print_table(results: list[Result]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "dtype", "backend", "pass", title="microseconds, median of runs on rotated inputs")
    for column in ("median", "spread", "against grid_sample"):
        table.add_column(column, justify="right")
    table.add_column("timed by")
    for r in results:
        table.add_row(
            r.case,
            r.dtype,
            r.backend,
            r.passed,
            f"{r.timing.median_us:.1f}",
            f"{r.timing.spread_us:.1f}",
            speed_up(r, results),
            r.timing.method,
        )
    Console(width=None if Console().is_terminal else 120, markup=False).print(table)


def markdown(document: dict, results: list[Result]) -> str:
    """A table of cases against passes and dtypes, for the README; grid_sample's ratio in brackets."""
    native = [r for r in results if r.backend != "grid_sample"]
    if not native:
        raise ValueError("there are no figures of cuda or cpu kernels, which the table is about")
    columns = list(dict.fromkeys((r.passed, r.dtype) for r in native))
    where, versions = document["machine"], document["versions"]
    unit, scale = ("µs", 1) if native[0].device != "cpu" else ("ms", 1e-3)
    threads = f", {where['threads']} threads" if native[0].device == "cpu" else f", CUDA {versions['cuda']}"
    lines = [
        f"{where['device']}{threads}, PyTorch {versions['torch']}, {document['date']}; {unit}, "
        "in brackets how many times grid_sample takes:",
        "",
        "| case | " + " | ".join(f"{passed} {dtype}" for passed, dtype in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for case in dict.fromkeys(r.case for r in native):
        cells = []
        for column in columns:
            found = [r for r in native if r.case == case and (r.passed, r.dtype) == column]
            ratio = speed_up(found[0], results) if found else ""
            figure = _three_digits(found[0].timing.median_us * scale) if found else ""
            cells.append(f"{figure} ({ratio})" if ratio else figure)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def speed_up(result: Result, results: list[Result]) -> str:
    """How many times longer grid_sample took for the same; empty where it was not timed."""
    key = (result.case, result.dtype, result.passed)
    baseline = [r for r in results if r.backend == "grid_sample" and (r.case, r.dtype, r.passed) == key]
    if not baseline or result.backend == "grid_sample":
        return ""
    return f"{baseline[0].timing.median_us / result.timing.median_us:.1f}x"


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
