"""Device code that was compiled for an older GPU than the one it runs on, as PTX is."""

from __future__ import annotations

import pytest
import torch

from tests.csrc.compiling import CSRC, HERE, output_of, run_program, tool

ARCHITECTURES = [75, 80, 90]
TERMS = (0.125, -0.125, 0.25, -0.25, 0.0625, 0, -0.0625, 0.03125)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_architecture_traps(architecture):
    ptx = output_of(
        tool("nvcc"),
        "-std=c++17",
        f"-I{CSRC}",
        f"-arch=compute_{architecture}",
        "-ptx",
        "-o",
        "-",
        HERE / "half_atomics.cu",
    )
    assert ".entry" in ptx
    assert "trap" not in ptx


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_half_precision_atomics_of_older_ptx_add_on_this_gpu(architecture, tmp_path):
    if torch.cuda.get_device_capability() < divmod(architecture, 10):
        pytest.skip("this GPU is older")
    ptx = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    printed = run_program("half_atomics.cu", tmp_path, tool("nvcc"), ptx)
    expected = [32 * term for term in TERMS]  # exact: every partial sum is a multiple of 1/32 below 8
    assert [[float(sum_) for sum_ in line.split()] for line in printed.splitlines()] == [expected, expected]
