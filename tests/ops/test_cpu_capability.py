"""The CPU kernels give the same numbers on every instruction set that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from reimplementation import ops
from tests.reference import TOLERANCE, relative_error

# Run in a process of its own: the instruction set is chosen once.
SCRIPT = """
import sys, torch
from reimplementation import ops
from tests.ops.agreement import run
from tests.ops.inputs import random_attention_inputs, random_inputs
from tests.ops.pointwise import POINTWISE, output_and_gradients

results = []
with ops.use_backend("cpu"):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for function, inputs in (
            (ops.deformable_aggregation_function, random_inputs(1, channels=60)),
            (ops.ms_deform_attn, random_attention_inputs(1, channels=30)),
        ):
            results.append(run(function, inputs.to("cpu", dtype)))
    for dtype in (torch.float64, torch.float32):
        for op in POINTWISE:
            results.append(output_and_gradients(op, op.on("cpu", dtype)))
torch.save(results, sys.argv[1])
"""


def results_with(capability: str, folder) -> list[tuple[torch.Tensor, ...]] | None:
    """Outputs and gradients; None where the processor lacks the instruction set."""
    file = folder / f"{capability}.pt"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)],
        env={**os.environ, "REIMPLEMENTATION_CPU_CAPABILITY": capability, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        assert "REIMPLEMENTATION_CPU_CAPABILITY" in done.stderr, done.stderr
        return None
    return torch.load(file)


def test_every_capability_gives_the_same_numbers(tmp_path):
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    plain = results_with("default", tmp_path)
    others = [results for name in ("avx2", "avx512") if (results := results_with(name, tmp_path)) is not None]
    for results in others:
        for got, wanted in zip(results, plain):
            for a, b in zip(got, wanted):
                assert relative_error(a, b) <= TOLERANCE[got[0].dtype]


def test_an_unknown_capability_is_refused(tmp_path):
    if "cpu" not in ops.available_backends("cpu"):
        pytest.skip("the extension is not built")
    assert results_with("sse9", tmp_path) is None
