"""Run by an installation's interpreter: every op, forward and backward on the CPU, against plain PyTorch in float64.

Arguments: the backends that CPU tensors must have, best first. It needs nothing but the installed package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import reimplementation
from reimplementation import ops

PROJECT = Path(__file__).resolve().parents[2]
TOLERANCE = 1000 * torch.finfo(torch.float32).eps  # sums of some dozen products, each rounded once or twice
GRID = 2.0**-10  # locations are multiples of it, so that rounding moves none of them across a pixel's edge


def main(backends: list[str]) -> None:
    package = Path(reimplementation.__file__).resolve().parent
    assert package.parent != PROJECT, "the project's own folder was imported, not what was installed"
    found = ops.available_backends("cpu")
    assert found == backends, f"expected the backends {backends} for CPU tensors; got {found}: {ops.build_info()}"
    for name, operands in _operands().items():
        _compare(name, operands)
        print(f"{name} agrees with plain PyTorch")
    print(f"all of {package}")


def _operands() -> dict[str, list[torch.Tensor]]:
    """Arguments of each op, by its name in `ops`; those with requires_grad are what is differentiated."""
    torch.manual_seed(0)
    features, shapes, starts = ops.feature_maps_format([torch.randn(2, 3, 16, *size) for size in ((9, 14), (5, 7))])
    projection = torch.eye(4) + 0.1 * torch.randn(2, 3, 4, 4)
    return {
        "deformable_aggregation_function": [
            *(features.requires_grad_(), shapes, starts),
            *(_locations(2, 5, 4, 3, 2), _leaf(2, 5, 4, 3, 2, 8)),
        ],
        "deformable_feature_aggregation": [
            *(features, shapes, starts, torch.rand(2, 5, 4, 3) + 1, projection, torch.full((2, 3, 2), 2.0)),
            *(_leaf(2, 5, 2 * 4 * 8), _leaf(2, 3, 2 * 4 * 8)),
        ],
        "ms_deform_attn": [
            *(_leaf(2, 161, 4, 8), torch.tensor([[9, 14], [5, 7]]), torch.tensor([0, 126])),
            *(_locations(2, 5, 4, 2, 3, 2), _leaf(2, 5, 4, 2, 3)),
        ],
        "linear_relu_norm": [_leaf(2, 5, 12), _leaf(16, 12), _leaf(16), _leaf(16), _leaf(16)],
        "box_key_points": [_leaf(2, 5, 11), _leaf(7, 3), _leaf(2, 5, 18)],
        "project_points": [(torch.rand(2, 5, 4, 3) + 1).requires_grad_(), projection, torch.full((2, 3, 2), 2.0)],
    }


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def _locations(*shape: int) -> torch.Tensor:
    return ((torch.rand(*shape) / GRID).floor() * GRID).requires_grad_()


def _compare(name: str, operands: list[torch.Tensor]) -> None:
    """Raises AssertionError where outputs or gradients differ."""
    actual = _outputs(name, operands, torch.float32)
    with ops.use_backend("grid_sample"):
        expected = _outputs(name, operands, torch.float64)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=TOLERANCE, atol=TOLERANCE)


def _outputs(name: str, operands: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """What the op returns, and the gradients of the sum of its squares."""
    cast = [
        one.detach().to(dtype).requires_grad_(one.requires_grad) if one.is_floating_point() else one for one in operands
    ]
    output = getattr(ops, name)(*cast)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), [one for one in cast if one.requires_grad])]


if __name__ == "__main__":
    main(sys.argv[1:])
