"""Small programs on the headers of csrc, compiled with the tools of this machine and run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "reimplementation" / "ops" / "csrc"


def tool(*names: str) -> str:
    """The first of these compilers that is here; skips the test where none is."""
    found = next((path for path in map(shutil.which, names) if path is not None), None)
    if found is None:
        pytest.skip(f"needs {' or '.join(names)}")
    return found


def output_of(*command: str | Path, reads: str = "") -> str:
    """What a command prints; an AssertionError with its errors where it fails."""
    done = subprocess.run([str(part) for part in command], input=reads, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_program(source: str, folder: Path, compiler: str, *flags: str, reads: str = "") -> str:
    """Compiles a program of this folder, and returns what it prints."""
    program = folder / Path(source).stem
    output_of(compiler, "-std=c++17", f"-I{CSRC}", *flags, "-o", program, HERE / source)
    return output_of(program, reads=reads)
