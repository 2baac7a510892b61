"""One process of a training, or one of several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """Which process this is, of how many, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, the same in all of them."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values = values / self.world_size
        return values

    def share_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Let each gradient be its mean over the processes, in which the same parameters have one."""
        if self.world_size == 1:
            return
        learnt = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        gradients = [gradient for _, gradient in learnt]
        sizes = [gradient.numel() for gradient in gradients]
        together = gradients[0].new_empty(sum(sizes))
        parts = [part.as_strided(of.size(), of.stride()) for part, of in zip(together.split(sizes), gradients)]
        torch._foreach_copy_(parts, gradients)
        dist.all_reduce(together)
        together /= self.world_size
        for (parameter, _), part in zip(learnt, parts):
            parameter.grad = part

    def joined(self, values: Tensor) -> Tensor:
        """The processes' samples (bs, …) side by side, in the order of their ranks."""
        if self.world_size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    def wait(self) -> None:
        """Wait for the others."""
        if self.world_size > 1:  # NCCL would guess the device, and warn that it does
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)


@contextmanager
def join(device: torch.device) -> Iterator[Process]:
    """The process that this is, for as long as the training lasts.

    Args:
        device: what was asked for; under torchrun each process takes the GPU of its own number.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Process(0, 1, device)
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Process(dist.get_rank(), world_size, device)
    # After an error nobody says goodbye: the others may be waiting for something else, for as long as they live.
    dist.destroy_process_group()
