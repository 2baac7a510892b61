"""box_key_points: precision of every coordinate, what has no gradient, the ends of the sigmoid, the words of errors."""

from contextlib import nullcontext

import pytest
import torch

from reimplementation import ops
from reimplementation.ops import box_key_points
from tests import reference
from tests.ops.table import BOXES


def test_velocity_has_no_gradient(backend_device):
    anchor, *others = BOXES.on(backend_device, torch.float32)
    (gradient,) = torch.autograd.grad(box_key_points(anchor.requires_grad_(), *others).sum(), anchor)
    assert gradient[..., :8].all()
    assert not gradient[..., 8:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_coordinate_to_a_few_roundings(backend_device, dtype):
    operands = BOXES.on(backend_device, dtype)
    anchor, places, logits = (operand.cpu().double() for operand in operands)
    error = (box_key_points(*operands).cpu().double() - reference.box_key_points(anchor, places, logits)).abs()
    far = torch.cat([places.abs().expand(2, 5, -1, -1), torch.ones(2, 5, 3, 3)], dim=2)  # a sigmoid is below one
    terms = far * anchor[:, :, None, 3:6].exp()
    turned = (terms[..., :2].sum(-1) * anchor[..., 6:8].abs().sum(-1, keepdim=True))[..., None]
    assert (error[..., :2] <= 8 * torch.finfo(dtype).eps * (turned + anchor[:, :, None, :2].abs())).all()
    assert (error[..., 2] <= 8 * torch.finfo(dtype).eps * (terms[..., 2] + anchor[:, :, None, 2].abs())).all()


def test_sigmoids_at_their_ends(backend_device):
    """Logits far beyond the exponential's range place key points on the faces, and have no gradient."""
    anchor = torch.tensor([[[1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 1.0]]], device=backend_device)
    logits = torch.tensor([[[1e4, -1e4, 200.0]]], device=backend_device, requires_grad=True)
    key_points = box_key_points(anchor, anchor.new_empty(0, 3), logits)
    assert key_points.flatten().tolist() == [1.5, 1.5, 3.5]
    key_points.sum().backward()
    assert not logits.grad.any()


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda t: t[..., :7], ValueError, r"anchor must be \(bs, num_anchor, 8 to 11\): .*; got \(2, 5, 7\)"),
        (0, lambda t: t[0], ValueError, r"anchor must be .*; got \(5, 11\)"),
        (0, lambda t: t.long(), TypeError, "anchor must be .*; got int64"),
        (1, lambda t: t[:, :2], ValueError, r"fix_scale must be \(num_fixed, 3\); got \(4, 2\)"),
        (1, lambda t: t.bool(), TypeError, "fix_scale must be .*; got bool"),
        (
            2,
            lambda t: t[..., :8],
            ValueError,
            r"logits must be \(bs, num_anchor, num_learnable \* 3\).*; got \(2, 5, 8\)",
        ),
        (2, lambda t: t[:, :4], ValueError, r"logits must be .* with bs=2, num_anchor=5; got \(2, 4, 9\)"),
    ],
)
@pytest.mark.parametrize("backend", [None, "grid_sample"])
def test_errors_say_what_was_expected_and_what_came(backend, place, change, error, message):
    operands = BOXES.on("cpu")
    operands[place] = change(operands[place])
    with ops.use_backend(backend) if backend else nullcontext(), pytest.raises(error, match=message):
        box_key_points(*operands)
