"""Both ops, as tests that hold for either take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from reimplementation import ops
from reimplementation.bench.inputs import OpInputs
from tests import reference
from tests.ops.inputs import random_attention_inputs, random_inputs


@dataclass(frozen=True)
class Registered:
    """An op: its name among the extension's operators, and its function."""

    name: str
    function: Callable

    @property
    def forward(self):
        return getattr(torch.ops.reimplementation, self.name)

    @property
    def backward(self):
        return getattr(torch.ops.reimplementation, f"{self.name}_backward")


@dataclass(frozen=True)
class Op(Registered):
    """Its formula in float64, random inputs, and inputs few enough to perturb one by one."""

    formula: Callable
    inputs: Callable[..., OpInputs]
    small: OpInputs


OPS = [
    Op(
        "deformable_aggregation",
        ops.deformable_aggregation_function,
        reference.deformable_aggregation,
        random_inputs,
        random_inputs(13, batch_size=1, num_queries=2, channels=4, shapes=(((4, 5), (2, 3)), ((3, 2), (1, 2)))),
    ),
    Op(
        "ms_deform_attn",
        ops.ms_deform_attn,
        reference.ms_deform_attn,
        random_attention_inputs,
        random_attention_inputs(13, batch_size=1, num_queries=2, num_heads=1, channels=4),
    ),
]
