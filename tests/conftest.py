"""What tests run, and the devices and backends that they run it on."""

from __future__ import annotations

import os

import pytest
import torch

from reimplementation import ops
from tests.models.table import MODULES, ModuleCase
from tests.ops.table import OPS, Op

CPU, CUDA = "cpu", pytest.param("cuda", marks=pytest.mark.cuda)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # As many threads as cores in every worker would wait for one another; with one alone nothing is shared out.
    torch.set_num_threads(max(2, torch.get_num_threads() // workers))

# Workers, which begin after this, have more threads than there are cores. One that waits sleeps, so as not to hold the
# core that another needs: tests/ops and tests/models take 92 and 102 s so, where they took 105 and 126.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_collection_modifyitems(items):
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if gpus < 1 and "cuda" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif gpus < 2 and "two_gpus" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs two GPUs"))


@pytest.fixture(params=[CPU, CUDA])
def device(request) -> torch.device:
    """A device; ``cuda`` only where there is one."""
    return torch.device(request.param)


@pytest.fixture
def kernels(device) -> torch.device:
    """A device that the extension has kernels for."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    return device


@pytest.fixture(
    params=[
        ("cpu", "cpu"),
        ("grid_sample", "cpu"),
        pytest.param(("cuda", "cuda"), marks=pytest.mark.cuda),
        pytest.param(("triton", "cuda"), marks=pytest.mark.cuda),
        pytest.param(("grid_sample", "cuda"), marks=pytest.mark.cuda),
    ],
    ids=["cpu", "grid_sample", "cuda", "triton", "grid_sample-on-cuda"],
)
def forced(request):
    """While one backend is forced: its name, and the device to put tensors on."""
    backend, device = request.param
    if backend not in ops.available_backends(device) and not os.environ.get("REQUIRE_EXT"):
        pytest.skip(f"the {backend} kernels are not built: {ops.build_info()['reasons']}")
    with ops.use_backend(backend):
        yield backend, torch.device(device)


@pytest.fixture
def backend(forced) -> str:
    return forced[0]


@pytest.fixture
def backend_device(forced) -> torch.device:
    return forced[1]


@pytest.fixture
def cuda_kernels() -> None:
    """Skips a test of a GPU where the extension holds no kernels for it."""
    if not ops.CUDA_EXT_AVAILABLE:
        pytest.skip("the CUDA kernels are not built")


@pytest.fixture(params=OPS, ids=str)
def op(request) -> Op:
    return request.param


@pytest.fixture(params=MODULES, ids=str)
def case(request) -> ModuleCase:
    return request.param
