"""project_points and box_key_points, as tests that hold for either take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reimplementation import ops
from tests.ops.cases import Registered

BATCH, ANCHORS, POINTS, CAMS, LEARNED = 2, 5, 4, 3, 3


@dataclass(frozen=True)
class Pointwise(Registered):
    """Random operands of an op, and the places of those that its kernel has gradients of."""

    operands: Callable[[], list[Tensor]]
    differentiable: tuple[int, ...]

    def on(self, device, dtype, optional: bool = True) -> list[Tensor | None]:
        operands = [operand.to(device, dtype) for operand in self.operands()]
        return operands if optional else [*operands[:2], None]


def project_points_operands() -> list[Tensor]:
    """Float64 points, two of three ahead of cameras at the origin that look along z, and image sizes."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(BATCH, ANCHORS, POINTS, 3, generator=generator, dtype=torch.float64) * 3
    points[..., 2] += torch.tensor([8.0, 20.0, -15.0, 8.0])
    matrices = torch.randn(BATCH, CAMS, 4, 4, generator=generator, dtype=torch.float64)
    matrices[:, :, 2] = matrices[:, :, 2] * 0.1 + torch.tensor([0, 0, 1, 0.0])
    sizes = torch.rand(BATCH, CAMS, 2, generator=generator, dtype=torch.float64) + 2
    return [points, matrices, sizes]


def box_key_points_operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    anchor = torch.randn(BATCH, ANCHORS, 11, generator=generator, dtype=torch.float64)
    places = torch.rand(POINTS, 3, generator=generator, dtype=torch.float64) - 0.5
    logits = torch.randn(BATCH, ANCHORS, LEARNED * 3, generator=generator, dtype=torch.float64)
    return [anchor, places, logits]


POINTWISE = [
    Pointwise("project_points", ops.project_points, project_points_operands, (0,)),
    Pointwise("box_key_points", ops.box_key_points, box_key_points_operands, (0, 2)),
]


def leaves_of(op, operands) -> list[Tensor]:
    """The operands that the kernel has gradients of, each now a leaf that needs one."""
    return [operands[i].requires_grad_() for i in op.differentiable if operands[i] is not None]


def output_and_gradients(op, operands, toward=None, function=None) -> list[Tensor]:
    """The output, and the gradients of what the kernel differentiates, towards a random direction or the one given."""
    operands = [operand if operand is None else operand.detach() for operand in operands]
    leaves = leaves_of(op, operands)
    output = (function or op.function)(*operands)
    if toward is None:
        toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, toward.to(output))]
