"""Runs the commands of a build: those whose inputs have changed, several at a time.

Ninja would do the same. But pip installs nothing for a build without isolation, so whoever lacked ninja would get no
kernels; this is short enough to have no such need.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


class StepFailed(Exception):
    """A command failed; the message is what it printed."""


@dataclass(frozen=True)
class Step:
    """One command, making `output` from `inputs`; a compiler lists the headers that it read in `depfile`."""

    command: list[str]
    output: Path
    inputs: list[Path]
    depfile: Path | None = None

    @property
    def record(self) -> Path:
        """The file that holds the command which made the output, once it has succeeded."""
        return self.output.with_name(f"{self.output.name}.command")

    def is_current(self) -> bool:
        """Whether the output was made by this command, and later than all that it was made from."""
        if not (self.output.exists() and self.record.exists() and self.record.read_text() == shlex.join(self.command)):
            return False
        made = self.output.stat().st_mtime_ns
        read = [*self.inputs, *(_files_in(self.depfile) if self.depfile else [])]
        return all(path.exists() and path.stat().st_mtime_ns < made for path in read)

    def run(self) -> None:
        """Raises `StepFailed` where the command fails; its output then counts as not made."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        done = subprocess.run(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise StepFailed(done.stdout)
        self.record.write_text(shlex.join(self.command))
        print(f"{self.output}\n{done.stdout}", end="", flush=True)


def run_steps(steps: list[Step], jobs: int) -> None:
    """Runs those steps that are not current, `jobs` at a time; none of them may need another's output.

    Raises:
        StepFailed: a command failed; no further ones were begun then.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(step.run) for step in steps if not step.is_current()]
        try:
            for one in running:
                one.result()
        except StepFailed:
            pool.shutdown(cancel_futures=True)
            raise


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def _files_in(depfile: Path) -> list[Path]:
    """The files that a compiler read: a rule of make, whose spaces within names have a backslash before them."""
    if not depfile.exists():
        return []
    names = depfile.read_text().replace("\\\n", " ").partition(": ")[2]
    return [Path(re.sub(r"\\(.)", r"\1", name)) for name in re.findall(r"(?:\\.|\S)+", names)]
