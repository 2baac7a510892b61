"""`kill -9` at any moment, in the middle of a checkpoint too, costs nothing but the steps since the last one."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from reimplementation.training import checkpoint, journal
from reimplementation.training.loop import Training
from tests.markdown import ROOT
from tests.training.tiny import ALONE, TINY, numbers, written

pytest.importorskip("scipy")
pytest.importorskip("rich")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL"),
]
KILLS = 20

# The process kills itself where it would call the function that is named, once its first checkpoint is written.
DIES_IN = """
import os, signal, sys
from pathlib import Path
from reimplementation.training import checkpoint

folder, (owner, name) = Path(sys.argv[1]), sys.argv[2].split(".")
checkpoint.save(folder, 1, {"step": 1, "config": {}, "model": {}}, keep=2)
owner = {"os": os, "Path": Path, "checkpoint": checkpoint}[owner]
setattr(owner, name, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
checkpoint.save(folder, 2, {"step": 2, "config": {}, "model": {}}, keep=2)
"""


@pytest.mark.parametrize(
    ("function", "step", "unfinished"),
    [("os.fsync", 1, 1), ("Path.replace", 1, 1), ("checkpoint._sync_folder", 2, 0)],
)
def test_killed_in_the_middle_of_a_checkpoint(function, step, unfinished, tmp_path):
    """The moments are before the bytes are on the disk, before the file has its name, and right after it has."""
    process = subprocess.run([sys.executable, "-c", DIES_IN, tmp_path, function], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(f"step-*{checkpoint.UNFINISHED}"))) == unfinished
    assert checkpoint.load_newest(tmp_path)[1]["step"] == step

    checkpoint.save(tmp_path, step + 1, {"step": step + 1, "config": {}, "model": {}}, keep=2)
    assert checkpoint.load_newest(tmp_path)[1]["step"] == step + 1
    assert not list(tmp_path.glob(f"step-*{checkpoint.UNFINISHED}"))


def test_twenty_kills(tmp_path):
    """Each run writes a checkpoint every step; how many kills meet one being written is left to the machine's disk."""
    config = dataclasses.replace(TINY, num_steps=200, checkpoint_every=1)
    path, folder = written(config, tmp_path / "config.yaml"), tmp_path / "killed"
    command = [sys.executable, "-m", "reimplementation", "train", "--config", path, "--work-dir", folder]
    moments, last, in_the_middle = random.Random(0), 0, 0
    for _ in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # The row of step `last` may be there from the run before; the next one comes after a checkpoint of this run.
        while not any(row["step"] > last for row in journal.read(folder)) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it was still at work
        in_the_middle += any(file.suffix == checkpoint.UNFINISHED for file in folder.glob("step-*"))
        rows = journal.read(folder)
        found = checkpoint.load_newest(folder)
        step = found[1]["step"] if found else 0
        assert step > last and step >= len(rows) - 1  # at most the step whose checkpoint was being written is lost
        last = step
    print(f"{in_the_middle} of {KILLS} kills left a checkpoint unfinished; {last} steps were done in between")

    short = dataclasses.replace(config, checkpoint_every=100)
    whole = Training(short, tmp_path / "whole", ALONE)
    whole.run(lambda row: None, lambda: whole.step + 1 >= last)
    assert numbers(tmp_path / "whole")[:last] == numbers(folder)[:last]
