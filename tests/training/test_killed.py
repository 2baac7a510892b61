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
KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
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
