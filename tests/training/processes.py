"""Several processes that train together, as torchrun would start them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch

from reimplementation.training.processes import join


def run_in_processes(count: int, device: str, function: Callable, *arguments: Any) -> None:
    """Call a function of a module with the `Process` that each of some processes is, and with these arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_them, (count, port, device, function, arguments), nprocs=count)


def _one_of_them(rank: int, count: int, port: int, device: str, function: Callable, arguments: tuple) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    with join(torch.device(device)) as process:
        function(process, *arguments)
