"""Distributed training: two processes with half of the batch each get the gradients of one with the whole batch; and a
process that works on a GPU which is not its current one.

In float64: some gradients are small sums of large terms, whose order the number of processes changes.
"""

from __future__ import annotations

import gc
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.models.table import MODULES, ModuleCase
from tests.reference import TOLERANCE, relative_error

WORLD_SIZE, BATCH_SIZE = 2, 4


def trained(case: ModuleCase, device: torch.device | str) -> nn.Module:
    return case.trained(device).double()


def operands_on(case: ModuleCase, device: torch.device | str) -> list[Tensor]:
    operands = case.operands_on(device, batch_size=BATCH_SIZE)
    return [tensor.detach().double() if tensor.is_floating_point() else tensor for tensor in operands]


def replicated(case: ModuleCase, device: torch.device) -> nn.Module:
    return DistributedDataParallel(trained(case, device))


def sharded(case: ModuleCase, device: torch.device) -> nn.Module:
    """Built where it takes no memory, sharded, then filled: how a model that fits no single GPU starts."""
    with torch.device("meta"):
        module = case.build().double()
    fully_shard(module, mesh=init_device_mesh(device.type, (WORLD_SIZE,)))
    module.to_empty(device=device)
    set_model_state_dict(module, trained(case, device).state_dict(), options=StateDictOptions(full_state_dict=True))
    return module


WRAPPERS = {"DistributedDataParallel": replicated, "fully_shard": sharded}


def gradients_of(case: ModuleCase, module: nn.Module, operands: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the mean square of the output, whole, by the parameter's name in the bare module."""
    case.call(module, operands).square().mean().backward()
    gradients = {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.requires_grad}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}


def train(rank: int, device_type: str, folder: Path) -> None:
    """What each process runs: every wrapper around every module, on its share of the batch."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    device, backend = torch.device("cpu"), "gloo"
    if device_type == "cuda":
        device, backend = torch.device("cuda", rank), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=dist.FileStore(str(folder / "store"), WORLD_SIZE),
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(minutes=1),
    )
    gradients = {}
    for case in MODULES:
        operands = operands_on(case, device)
        share = [tensor.chunk(WORLD_SIZE)[rank] if tensor.is_floating_point() else tensor for tensor in operands]
        for name, wrap in WRAPPERS.items():
            gradients[case.name, name] = gradients_of(case, wrap(case, device), share)
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    dist.barrier()  # who leaves first takes connections along that the other still uses
    gc.collect()  # wrapped modules hold the group in cycles, and gloo's threads with it
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.two_gpus])])
def distributed(request, tmp_path_factory) -> tuple[str, dict]:
    """The kind of device, and the gradients that two processes got on it; one pair for all, as importing takes long."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(train, (request.param, folder), nprocs=WORLD_SIZE)
    return request.param, torch.load(folder / "gradients.pt", map_location=request.param)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients(case, wrapper, distributed):
    device, gradients = distributed
    expected = gradients_of(case, trained(case, device), operands_on(case, device))
    actual = gradients[case.name, wrapper]
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= TOLERANCE[torch.float64], name


@pytest.mark.cuda
@pytest.mark.two_gpus
def test_another_gpu_than_the_current_one(case):
    expected = gradients_of(case, trained(case, "cpu"), operands_on(case, "cpu"))
    with torch.cuda.device(0):
        actual = gradients_of(case, trained(case, "cuda:1"), operands_on(case, "cuda:1"))
    for name in expected:
        assert actual[name].device == torch.device("cuda:1")
        assert relative_error(actual[name].cpu(), expected[name]) <= TOLERANCE[torch.float64], name
