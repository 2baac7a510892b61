"""How parameters move: AdamW in SparseDrive's groups, and its learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reimplementation.models.sparsedrive import SparseDrive

from .config import OptimizerConfig


def make_optimizer(model: SparseDrive, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with two groups, of which the backbone's learns more slowly; ``initial_lr`` is what the schedule scales."""
    groups: dict[bool, list] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name.startswith("img_backbone.")].append(parameter)
    rates = {False: config.lr, True: config.lr * config.backbone_factor}
    return torch.optim.AdamW(
        [{"params": groups[kind], "lr": rates[kind], "initial_lr": rates[kind]} for kind in groups],
        weight_decay=config.weight_decay,
        fused=True,
    )


def load_state(optimizer: torch.optim.AdamW, state: dict) -> None:
    """Go on from what ``state_dict`` gave. How a step is computed is none of it: once the CPU's was not fused."""
    groups = [{**group, "fused": True} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def step_unless(optimizer: torch.optim.AdamW, is_spoilt: Tensor) -> None:
    """Make a step, unless a flag on the parameters' device is set: the host need not have read it.

    PyTorch's fused optimizers look for such a flag, which is how its gradient scaler passes over a step.
    """
    optimizer.found_inf = is_spoilt.float()  # type: ignore[attr-defined]
    optimizer.step()


def rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """What the learning rate of a step, from 0 on, is times its full value: half a cosine, times a linear warm-up."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / num_steps))
    factor = config.final_factor + (1 - config.final_factor) * cosine
    if step < config.warmup_steps:
        factor *= config.warmup_factor + (1 - config.warmup_factor) * step / config.warmup_steps
    return factor


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its own rate times the factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
