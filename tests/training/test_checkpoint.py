"""Checkpoints survive whatever happens while they are written."""

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from reimplementation.training import checkpoint


def document(step: int) -> dict:
    """NumPy fills it: a child that was forked would wait for ever for the threads that PyTorch shares out to."""
    weight = torch.from_numpy(np.full(200_000, float(step), dtype=np.float32))
    return {"step": step, "config": {}, "model": {"weight": weight}}


def forked(work: Callable[[], object]) -> int:
    """The number of a child of this process, which does the work and nothing else."""
    if (child := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def was_killed(child: int) -> bool:
    """Whether a signal ended the child, which is waited for."""
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def test_the_newest_are_kept(tmp_path):
    for step in (1, 9, 10, 100):
        checkpoint.save(tmp_path, step, document(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010.pt", "step-00000100.pt"]
    path, loaded = checkpoint.load_newest(tmp_path)
    assert path == checkpoint.newest(tmp_path) and loaded["step"] == 100
    assert torch.equal(loaded["model"]["weight"], document(100)["model"]["weight"])


def test_there_is_none(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None is checkpoint.newest(tmp_path)


def test_a_damaged_one_is_passed_over(tmp_path):
    checkpoint.save(tmp_path, 1, document(1), keep=3)
    damaged = checkpoint.save(tmp_path, 2, document(2), keep=3)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="step-00000002.pt is no checkpoint .* the one before is taken"):
        _, loaded = checkpoint.load_newest(tmp_path)
    assert loaded["step"] == 1


def test_something_else_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="must hold step, config and model"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_full_disk(tmp_path, monkeypatch):
    first = checkpoint.save(tmp_path, 1, document(1), keep=1)

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device.*last good checkpoint is .*0001.pt"):
        checkpoint.save(tmp_path, 2, document(2), keep=1)
    assert list(tmp_path.iterdir()) == [first]


@needs_fork
@pytest.mark.parametrize(
    ("owner", "function", "newest", "unfinished"),
    [(os, "fsync", 1, 1), (Path, "replace", 1, 1), (checkpoint, "_sync_folder", 2, 0)],
    ids=["fsync", "replace", "sync_folder"],
)
def test_killed_at_a_moment(owner, function, newest, unfinished, tmp_path):
    """Before the bytes are on the disk, before the file has its name, and right after it has."""

    def die_while_saving():
        setattr(owner, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.save(tmp_path, 2, document(2), keep=2)

    checkpoint.save(tmp_path, 1, document(1), keep=2)
    assert was_killed(forked(die_while_saving))
    assert len(list(tmp_path.glob(f"step-*{checkpoint.UNFINISHED}"))) == unfinished
    assert checkpoint.load_newest(tmp_path)[1]["step"] == newest
    checkpoint.save(tmp_path, newest + 1, document(newest + 1), keep=2)
    assert checkpoint.load_newest(tmp_path)[1]["step"] == newest + 1
    assert not list(tmp_path.glob(f"step-*{checkpoint.UNFINISHED}"))


@needs_fork
def test_killed_while_it_writes(tmp_path):
    """Twenty times at some moment after a first one: the newest checkpoint is always whole, and newer than before."""
    delays = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 0.06
    checkpoint.save(tmp_path, 1, document(1), keep=2)
    last = 1

    def save_on():
        for step in range(last + 1, last + 1000):
            checkpoint.save(tmp_path, step, document(step), keep=2)

    for delay in delays.tolist():
        child = forked(save_on)
        before, latest = checkpoint.newest(tmp_path), time.monotonic() + 60
        while checkpoint.newest(tmp_path) == before and time.monotonic() < latest:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        path, loaded = checkpoint.load_newest(tmp_path)
        assert path.name == f"step-{loaded['step']:08d}.pt" and loaded["step"] > last
        assert torch.equal(loaded["model"]["weight"], document(loaded["step"])["model"]["weight"])
        last = loaded["step"]
    checkpoint.save(tmp_path, last + 1, document(last + 1), keep=2)
    assert sum(path.suffix != ".pt" for path in tmp_path.iterdir()) == 0  # what was left unfinished is gone
