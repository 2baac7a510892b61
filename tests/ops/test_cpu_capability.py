"""The CPU kernels give the same numbers on every instruction set that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from reimplementation import ops
from tests.ops.agreement import assert_close
from tests.ops.table import OPS
from tests.reference import TOLERANCE

# An instruction set is chosen once in a process, when the first kernel runs: one process imports for all, and forks.
SCRIPT = """
import os, sys, torch
from reimplementation import ops
from tests.ops.agreement import run
from tests.ops.table import OPS, SAMPLING_OPS

def results():
    for op in OPS:
        sizes = {"channels": 60} if op in SAMPLING_OPS else {}  # fills no vector
        for dtype in op.kernel_dtypes:
            yield (op.name, dtype), run(op, op.on("cpu", dtype, 1, **sizes))

for capability in sys.argv[2:]:
    if os.fork() == 0:
        os.environ["REIMPLEMENTATION_CPU_CAPABILITY"] = capability
        try:
            with ops.use_backend("cpu"):
                found = dict(results())
        except RuntimeError as error:
            found = str(error)
        torch.save(found, f"{sys.argv[1]}/{capability}.pt")
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """Outputs and gradients by what is in REIMPLEMENTATION_CPU_CAPABILITY; or the error."""
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    folder, names = tmp_path_factory.mktemp("capability"), ("default", "avx2", "avx512", "sse9")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder), *names], env=environment, check=True)
    return {name: torch.load(folder / f"{name}.pt") for name in names}


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_every_capability_gives_the_same_numbers(found, name):
    """A processor that lacks an instruction set runs the best one that it has."""
    for op in OPS:
        for dtype in op.kernel_dtypes:
            key = op.name, dtype
            assert_close(op, found[name][key], found["default"][key], TOLERANCE[dtype])


def test_an_unknown_capability_is_refused(found):
    assert "REIMPLEMENTATION_CPU_CAPABILITY must be default, avx2 or avx512; got sse9" in found["sse9"]
