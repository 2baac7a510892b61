"""box_key_points: against float64, columns, places, errors; `test_pointwise` has what it shares with project_points."""

from contextlib import nullcontext

import pytest
import torch

from reimplementation import ops
from reimplementation.ops import box_key_points
from tests import reference
from tests.reference import TOLERANCE, relative_error


def random_case(columns=11, num_fixed=4, num_learnable=3, num_anchor=5, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    logits = normal(2, num_anchor, num_learnable * 3) if num_learnable is not None else None
    return [normal(2, num_anchor, columns), normal(num_fixed, 3), logits]


def double(tensor):
    return tensor if tensor is None else tensor.cpu().double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("columns", "num_fixed", "num_learnable"),
    [(8, 4, 3), (9, 4, None), (10, 0, 3), (11, 4, 0), (11, 1, None), (10, 40, 33)],
)
def test_agrees_with_float64(backend_device, dtype, columns, num_fixed, num_learnable):
    operands = random_case(columns, num_fixed, num_learnable, dtype=dtype, device=backend_device)
    leaves = [t for t in (operands[0].requires_grad_(), operands[2]) if t is not None]
    exact = [double(t.detach() if t is not None else t) for t in operands]
    wanted_leaves = [t for t in (exact[0], exact[2]) if t is not None]
    for leaf in (*leaves, *wanted_leaves):
        leaf.requires_grad_()

    actual, expected = box_key_points(*operands), reference.box_key_points(*exact)
    assert actual.dtype == dtype and actual.shape == (2, 5, num_fixed + (num_learnable or 0), 3)
    assert relative_error(actual.cpu(), expected) <= TOLERANCE[dtype]
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(actual, leaves, toward.to(backend_device))
    for got, wanted in zip(gradients, torch.autograd.grad(expected, wanted_leaves, toward.double())):
        assert relative_error(got.cpu(), wanted) <= TOLERANCE[dtype]
    assert not gradients[0][..., 8:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_coordinate_to_a_few_roundings(backend_device, dtype):
    operands = random_case(dtype=dtype, device=backend_device)
    anchor, places, logits = map(double, operands)
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
    "bs, num_anchor, num_fixed, num_learnable", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 0), (2, 5, 0, None)]
)
def test_empty(backend_device, bs, num_anchor, num_fixed, num_learnable):
    anchor, places, logits = random_case(9, num_fixed, num_learnable, num_anchor, torch.float32, backend_device)
    anchor = anchor[:bs].requires_grad_()
    key_points = box_key_points(anchor, places, logits if logits is None else logits[:bs])
    assert key_points.shape == (bs, num_anchor, num_fixed + (num_learnable or 0), 3)
    key_points.sum().backward()
    assert anchor.grad.shape == anchor.shape and (key_points.numel() == 0) == (not anchor.grad.any())


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda t: t[..., :7], ValueError, r"anchor must be \(bs, num_anchor, 8 to 11\): .*; got \(2, 5, 7\)"),
        (0, lambda t: t[0], ValueError, r"anchor must be .*; got \(5, 11\)"),
        (0, lambda t: t.long(), TypeError, "anchor must be .*; got int64"),
        (0, lambda t: t.tolist(), TypeError, "anchor must be a torch.Tensor; got list"),
        (1, lambda t: t[:, :2], ValueError, r"fix_scale must be \(num_fixed, 3\); got \(4, 2\)"),
        (1, lambda t: t.bool(), TypeError, "fix_scale must be .*; got bool"),
        (1, lambda t: None, TypeError, "fix_scale must be a torch.Tensor; got NoneType"),
        (1, lambda t: t.to("meta"), ValueError, "fix_scale must be on cpu; got meta"),
        (
            2,
            lambda t: t[..., :8],
            ValueError,
            r"logits must be \(bs, num_anchor, num_learnable \* 3\).*; got \(2, 5, 8\)",
        ),
        (2, lambda t: t[:, :4], ValueError, r"logits must be .* with bs=2, num_anchor=5; got \(2, 4, 9\)"),
        (2, lambda t: t.to_sparse(), TypeError, r"logits must be a dense \(strided\) tensor"),
        (2, lambda t: t.to("meta"), ValueError, "logits must be on cpu; got meta"),
    ],
)
@pytest.mark.parametrize("backend", [None, "grid_sample"])
def test_errors_say_what_was_expected_and_what_came(backend, place, change, error, message):
    operands = random_case()
    operands[place] = change(operands[place])
    with ops.use_backend(backend) if backend else nullcontext(), pytest.raises(error, match=message):
        box_key_points(*operands)
