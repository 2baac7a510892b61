"""The floors to hold figures against: a kernel that only gathers the same rows, and a copy of device memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import torch
from torch import Tensor

from reimplementation.bench.gathers import Gathers
from reimplementation.bench.timing import Timing, measure

SOURCE = files(__package__) / "gather.cu"
TOOLKIT = Path("/usr/local/cuda")  # where NVIDIA's installer puts it
VECTOR_BYTES = 16  # of one load
THREADS, WARP = 256, 32  # a block of the kernel, and its longest team
COPIED_BYTES = {"cuda": 2**31, "cpu": 2**27}  # far more than any cache holds


def measure_floor(gathers: Sequence[Gathers], device: torch.device, repeats: int) -> Timing | None:
    """The least time that gathering these rows took, over the ways to share a bag's rows among teams of lanes.

    Returns:
        None where a row is no multiple of 16 bytes: the kernel reads whole vectors.

    Raises:
        RuntimeError: the kernel cannot be built, or not be launched.
    """
    if any(g.row_bytes % VECTOR_BYTES or g.table.data_ptr() % VECTOR_BYTES for g in gathers):
        return None
    splits, timings = 1, []
    while splits * team_lanes(gathers[0]) <= THREADS:
        timings.append(measure([gather_step(g, splits) for g in gathers], device, repeats))
        splits *= 2
    return min(timings, key=lambda timing: timing.median_us)


def gather_step(gathers: Gathers, splits: int) -> Callable[[], Tensor]:
    """A call of the kernel: (num_bags, row_bytes / 4) int32, the sum of each bag's rows, read as int32 words.

    Args:
        gathers: on a CUDA device, rows a multiple of 16 bytes.
        splits: teams that share a bag's rows; a power of two, at most 256 / `team_lanes`.
    """
    kernel = build(gathers.table.device)
    num_bags = len(gathers.starts) - 1
    output = gathers.table.new_empty(num_bags, gathers.row_bytes // 4, dtype=torch.int32)

    def step() -> Tensor:
        error = kernel(
            gathers.table.data_ptr(),
            gathers.rows.data_ptr(),
            gathers.starts.data_ptr(),
            output.data_ptr(),
            num_bags,
            gathers.row_bytes // VECTOR_BYTES,
            team_lanes(gathers),
            splits,
            torch.cuda.current_stream(output.device).cuda_stream,
        )
        if error:
            raise RuntimeError(f"the floor's kernel could not be launched: CUDA error {error}")
        return output

    return step


def team_lanes(gathers: Gathers) -> int:
    """The power of two of lanes that spans a row, or as many as a warp has."""
    vectors = gathers.row_bytes // VECTOR_BYTES
    return min(WARP, 1 << (vectors - 1).bit_length())


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s that a copy of a large tensor reads and writes."""
    source = torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    timing = measure([lambda: target.copy_(source)], device, repeats)
    return 2 * source.numel() / timing.median_us / 1e3


@cache
def build(device: torch.device) -> Callable[..., int]:
    """The kernel `gather_rows` of gather.cu, built for a device's GPU.

    The folder of the build goes as soon as the library is loaded.
    """
    nvcc = find_nvcc()
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    with tempfile.TemporaryDirectory() as folder, as_file(SOURCE) as source:
        library = Path(folder) / "floor.so"
        options = ["-O3", "-std=c++17", f"-arch={architecture}", "--shared", "-Xcompiler", "-fPIC"]
        built = subprocess.run([nvcc, *options, "-o", library, source], capture_output=True, text=True)
        if built.returncode != 0:
            raise RuntimeError(f"--floor: {nvcc} could not build {source}: {built.stderr.strip() or built.stdout}")
        function = ctypes.CDLL(str(library)).gather_rows
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_int64, whole, whole, whole, pointer]
    function.restype = whole
    return function


def find_nvcc() -> str:
    """The nvcc of CUDA_HOME, else on the PATH, else in /usr/local/cuda.

    Raises:
        RuntimeError: there is none.
    """
    home = os.environ.get("CUDA_HOME")
    folders = [*([f"{home}/bin"] if home else []), os.environ.get("PATH", ""), str(TOOLKIT / "bin")]
    found = shutil.which("nvcc", path=os.pathsep.join(folders))
    if found is None:
        raise RuntimeError(
            "--floor needs nvcc, which is neither in $CUDA_HOME/bin, nor on the PATH, nor in /usr/local/cuda/bin: "
            "install the CUDA toolkit or set CUDA_HOME, or leave --floor out"
        )
    return found
