"""Which backend runs, who may choose it, and what is said when it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

from reimplementation import ops
from reimplementation.ops import backends

CPU = torch.device("cpu")
OP = "Deformable aggregation"


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION_AVAILABLE", False)
    monkeypatch.setattr(backends, "CUDA_EXT_AVAILABLE", False)
    monkeypatch.setattr(backends, "_extension_missing", "no C++ compiler")
    monkeypatch.setattr(backends, "_warned", set())


def test_the_best_backend_runs():
    assert backends.select_backend(CPU, OP) == ops.available_backends(CPU)[0]
    assert ops.available_backends("cpu")[-1] == "grid_sample"


def test_use_backend_forces_and_gives_back():
    before = backends.select_backend(CPU, OP)
    with ops.use_backend("grid_sample"):
        assert backends.select_backend(CPU, OP) == "grid_sample"
    assert backends.select_backend(CPU, OP) == before


def test_use_backend_is_the_threads_own():
    seen = []
    with ops.use_backend("grid_sample"):
        thread = threading.Thread(target=lambda: seen.append(backends.select_backend(CPU, OP)))
        thread.start()
        thread.join()
    assert seen == [backends.select_backend(CPU, OP)]


def test_unknown_backend():
    with (
        pytest.raises(ValueError, match="backend must be one of cuda, cpu, grid_sample; got 'triton'"),
        ops.use_backend("triton"),
    ):
        pass


def test_forcing_a_missing_backend(no_extension):
    message = "Deformable aggregation CUDA extension is not available: no C.. compiler. To build it: pip install"
    with pytest.raises(RuntimeError, match=message), ops.use_backend("cuda"):
        pass


def test_forcing_the_backend_of_another_device(monkeypatch):
    monkeypatch.setattr(backends, "CUDA_EXT_AVAILABLE", True)
    monkeypatch.setattr(backends, "EXTENSION_AVAILABLE", True)
    with (
        pytest.raises(RuntimeError, match="backend 'cuda' is forced, but the tensors are on cpu"),
        ops.use_backend("cuda"),
    ):
        backends.select_backend(CPU, OP)


def test_the_first_fall_warns_once(no_extension):
    with pytest.warns(RuntimeWarning, match="running on grid_sample.*no C.. compiler.*pip install"):
        assert backends.select_backend(CPU, OP) == "grid_sample"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.select_backend(CPU, OP) == "grid_sample"


def test_build_info_names_what_is_missing(no_extension):
    info = ops.build_info()
    assert not info["cpu"] and not info["cuda"] and info["file"] is None
    assert info["reasons"] == {"cpu": "no C++ compiler", "cuda": "no C++ compiler"}


@pytest.mark.parametrize(
    ("value", "expected"), [("grid_sample", "grid_sample"), ("nonsense", "backend must be one of")]
)
def test_environment_variable(value, expected):
    code = (
        "import torch; from reimplementation.ops import backends\n"
        "try: print(backends.select_backend(torch.device('cpu'), 'op'))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "REIMPLEMENTATION_BACKEND": value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert expected in done.stdout
