"""What the floor's kernel needs to be built, and that an installed package has it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reimplementation.bench import floor


def test_floor_names_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(floor, "TOOLKIT", tmp_path)
    with pytest.raises(RuntimeError, match="--floor needs nvcc"):
        floor.find_nvcc()


def test_floor_is_built_by_nvcc(monkeypatch):
    try:
        floor.find_nvcc()
    except RuntimeError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert callable(floor.build.__wrapped__(torch.device("cuda")))


def test_a_wheel_holds_the_kernel(tmp_path):
    """What setuptools collects for a wheel has gather.cu at the place in the package where the module looks for it."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / floor.SOURCE.relative_to(root)).read_text() == floor.SOURCE.read_text()
