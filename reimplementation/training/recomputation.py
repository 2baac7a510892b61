"""Activation checkpointing: what a part of the model computed is forgotten, and computed again for its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from reimplementation.models.sparsedrive import SparseDrive

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def recompute(model: SparseDrive) -> None:
    """Let each block of the backbone and each layer of the heads' decoders keep nothing but its inputs.

    Outputs and gradients stay what they are, dropout included, for about a third more time; the running statistics of
    normalisations see every batch once.
    """
    blocks = [block for stage in model.img_backbone.children() if isinstance(stage, nn.Sequential) for block in stage]
    for part in (*blocks, *(layer for head in model.heads.values() for layer in head.layers)):
        norms = [module for module in part.modules() if isinstance(module, Norm)]
        part.forward = functools.partial(_forward, part.forward, norms)


def _forward(forward: Callable, norms: list[Norm], *arguments: Any, **named: Any) -> Any:
    """A part's forward, checkpointed. Its arguments come as they are, since attention asks which of them are one."""
    return checkpoint(
        lambda: forward(*arguments, **named), use_reentrant=False, context_fn=lambda: (nullcontext(), _unmoved(norms))
    )


@contextmanager
def _unmoved(norms: list[Norm]) -> Iterator[None]:
    """While this lasts, the norms' running statistics stay as they are, though batches come again."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
