"""`python -m tests.install.matrix`: install the package in every way and in every surroundings, and call it.

Each row runs its command in a fresh copy of the project and a fresh virtual environment, then calls every op there and
compares them with plain PyTorch (tests/install/first_call.py). That takes many minutes, so pytest does not run it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tests.install.workshop import NotAvailable, Workshop

FORCE = "FORCE_CUDA=1"
PIP = "python -m pip install --no-build-isolation"
NATIVE = ("cpu", "grid_sample")
FALLBACK = ("grid_sample",)


@dataclass(frozen=True)
class Row:
    """One installation.

    name      what is special about it
    command   run by bash in a copy of the project. python is the new environment's; WHEEL and SDIST, the toolkits
              BROKEN_NVCC, FAILING_NVCC and OLD_NVCC, and the folder TORCH_LIB of this process's libtorch are paths
    says      a pattern to find in what the command and then `info` print
    backends  those that CPU tensors have afterwards; none: nothing is called
    fails     whether the command must fail
    python    a version such as "3.12", and a release of PyTorch; None: those of this process
    torch     "" for an environment without PyTorch
    lacks     tools that are not on the PATH
    needs     tools without which the row is not available
    call      what is put before the call, such as "VARIABLE=value"
    """

    name: str
    command: str
    says: str = ""
    backends: tuple[str, ...] = NATIVE
    fails: bool = False
    python: str | None = None
    torch: str | None = None
    lacks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    call: str = ""


WHEEL = 'python -m pip install "$WHEEL"'
UNINSTALL = (
    f"{WHEEL} && python -m pip uninstall --yes reimplementation && cd .. && ! python -c 'import reimplementation'"
)
LOAD = (  # nothing of PyTorch's own Python part is needed to load the extension, only libtorch
    'python -m pip install --no-deps "$WHEEL" && cd .. && python -c "import ctypes, os; '
    "ctypes.CDLL(os.environ['TORCH_LIB'] + '/libtorch_cpu.so', ctypes.RTLD_GLOBAL); import reimplementation._C\""
)
ROWS = (
    Row("wheel: its files and symbols", 'python -m tests.install.artifacts "$WHEEL"', backends=(), needs=("nm",)),
    Row("sdist: its files", 'python -m tests.install.artifacts "$SDIST"', backends=()),
    Row("wheel", WHEEL),
    Row("sdist", f'{PIP} "$SDIST"'),
    Row("folder", f"{PIP} ."),
    Row("folder, editable", f"{PIP} --editable ."),
    Row("folder with spaces", f"cp -r . '../a b' && {PIP} '../a b'"),
    Row("uninstalled", UNINSTALL, backends=()),
    Row("build isolation", "python -m pip install --no-deps ."),
    Row("NO_EXT", f"REIMPLEMENTATION_NO_EXT=1 {PIP} .", "REIMPLEMENTATION_NO_EXT=1", FALLBACK),
    Row("REQUIRE_EXT", f"REQUIRE_EXT=1 {PIP} ."),
    Row("CUDA_VISIBLE_DEVICES empty", WHEEL, call='CUDA_VISIBLE_DEVICES=""'),
    Row(
        "no compiler on the PATH",
        f"{PIP} .",
        "neither c\\+\\+ nor g\\+\\+ is on the PATH",
        FALLBACK,
        lacks=("c++", "g++"),
    ),
    Row(
        "REQUIRE_EXT, no compiler",
        f"REQUIRE_EXT=1 {PIP} .",
        "REQUIRE_EXT=1, but CPU and CUDA kernels",
        (),
        fails=True,
        lacks=("c++", "g++"),
    ),
    *(
        Row(name, f"{settings} {PIP} .", says, (), fails=True)
        for name, settings, says in (
            ("CXX that is not there", "CXX=/nonexistent/c++", "CXX=/nonexistent/c\\+\\+ is not an executable"),
            ("CXX that fails", "CXX=false", "the C\\+\\+ compiler false is broken"),
            ("no nvcc", f"{FORCE} CUDA_HOME=/nonexistent", "/nonexistent is broken: it holds no bin/nvcc"),
            ("nvcc that does not run", f"{FORCE} CUDA_HOME=$BROKEN_NVCC", "libstdc\\+\\+ went missing"),
            ("nvcc that does not compile", f"{FORCE} CUDA_HOME=$FAILING_NVCC", "error: no such warp"),
            ("nvcc too old", f"{FORCE} CUDA_HOME=$OLD_NVCC", "nvcc compiles for none of 7.5, 8.0"),
        )
    ),
    Row("NO_CUDA", f"{FORCE} CUDA_HOME=$BROKEN_NVCC REIMPLEMENTATION_NO_CUDA=1 {PIP} .", "REIMPLEMENTATION_NO_CUDA=1"),
    Row(
        "no torch",
        "python -m pip install --no-deps .",
        "torch cannot be imported by .* \\(install torch first",
        (),
        fails=True,
        torch="",
    ),
    Row(
        "nvcc",
        f"REQUIRE_EXT=1 {FORCE} TORCH_CUDA_ARCH_LIST=9.0+PTX {PIP} .",
        "architectures +9.0\\+PTX",
        needs=("nvcc",),
    ),
    *(Row(f"the wheel in Python {python}", WHEEL, python=python) for python in ("3.10", "3.11", "3.12", "3.13")),
    *(
        Row(f"the extension in Python {python}", LOAD, backends=(), python=python, torch="")
        for python in ("3.10", "3.11", "3.12", "3.13")
    ),
    *(Row(f"the wheel on PyTorch {torch}", WHEEL, torch=torch) for torch in ("2.10.0", "2.11.0", "2.12.0", "2.13.0")),
)


@dataclass(frozen=True)
class Outcome:
    """What became of a row: "pass", "FAIL" or "not available", and why."""

    name: str
    command: str
    outcome: str
    why: str
    seconds: float


def main() -> int:
    options = _parser().parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="install-matrix-") as folder:
        workshop = Workshop(Path(folder), options.torch_index, options.wheel)
        for row in (row for row in ROWS if re.search(options.only, row.name)):
            outcomes.append(_outcome(row, workshop))
            print(f"{outcomes[-1].outcome:13}  {row.name}  ({outcomes[-1].seconds:.0f} s)", file=sys.stderr, flush=True)
    if options.json:
        machine = {"python": platform.python_version(), "torch": torch.__version__, "platform": platform.platform()}
        document = {"machine": machine, "rows": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if options.markdown:
        print(_markdown(outcomes))
    else:
        _print_table(outcomes)
    return int(any(outcome.outcome == "FAIL" for outcome in outcomes))


def _outcome(row: Row, workshop: Workshop) -> Outcome:
    start = time.monotonic()
    try:
        run(row, workshop)
        outcome, why = "pass", ""
    except NotAvailable as missing:
        outcome, why = "not available", str(missing)
    except AssertionError as failed:
        outcome, why = "FAIL", str(failed)
    return Outcome(row.name, row.command, outcome, why, round(time.monotonic() - start, 1))


def run(row: Row, workshop: Workshop) -> None:
    """Raises AssertionError where the installation is not as the row says, NotAvailable where it cannot be tried."""
    workshop.require(row.needs)
    room = workshop.room(row.python, row.torch, row.lacks)
    said = room.run(row.command, fails=row.fails)
    if row.backends:
        said += room.run("python -m reimplementation info", elsewhere=True)
    assert re.search(row.says, said), f"it does not say {row.says!r}: {said[-1500:]}"
    if row.backends:
        room.run(f'{row.call} python "$FIRST_CALL" {" ".join(row.backends)}', elsewhere=True)


def _print_table(outcomes: list[Outcome]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("installation", "outcome", "s", "command, or why not")
    styles = {"pass": "green", "FAIL": "bold red", "not available": "dim"}
    for outcome in outcomes:
        verdict = Text(outcome.outcome, styles[outcome.outcome])
        table.add_row(outcome.name, verdict, f"{outcome.seconds:.0f}", Text(outcome.why or outcome.command))
    Console(width=None if Console().is_terminal else 160).print(table)


def _markdown(outcomes: list[Outcome]) -> str:
    lines = ["| installation | command | outcome |", "| --- | --- | --- |"]
    for row in outcomes:
        why = f": {row.why.splitlines()[0]}" if row.why else ""
        lines.append(f"| {row.name} | `{row.command}` | {row.outcome}{why} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.install.matrix", description=__doc__.partition("\n")[2])
    parser.add_argument("--only", default="", metavar="REGEX", help="only rows whose name matches")
    parser.add_argument(
        "--wheel",
        metavar="FILE",
        type=lambda file: Path(file).resolve(),
        help="the wheel to try (default: one is built)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the outcomes")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        default="https://download.pytorch.org/whl/cpu",
        help="where other releases of PyTorch come from (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
