"""project_points: closed forms, precision of every location, depths at the clamp, the words of its errors."""

from contextlib import nullcontext

import pytest
import torch

from reimplementation import ops
from reimplementation.ops import project_points
from tests import reference


def pinhole(focal=100.0, cx=32.0, cy=24.0, dtype=torch.float32, device="cpu"):
    """One camera (1, 1, 4, 4) at the origin that looks along z."""
    return torch.tensor(
        [[[[focal, 0, cx, 0], [0, focal, cy, 0], [0, 0, 1, 0], [0, 0, 0, 1]]]], dtype=dtype, device=device
    )


def random_case(dtype=torch.float64, device="cpu", num_cams=3):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(2, 5, 4, 3, generator=generator, dtype=torch.float64) * 20 - 10
    matrix = torch.randn(2, num_cams, 4, 4, generator=generator, dtype=torch.float64)
    wh = torch.tensor([704.0, 256.0], dtype=torch.float64) + torch.rand(2, num_cams, 2, generator=generator)
    return [tensor.to(device=device, dtype=dtype) for tensor in (points, matrix, wh)]


def test_pinhole_closed_form():
    points = torch.tensor([[[[1.0, -2.0, 10.0], [0.0, 0.0, 5.0]]]])
    pixels = project_points(points, pinhole())
    torch.testing.assert_close(pixels[0, 0, :, 0], torch.tensor([[42.0, 4.0], [32.0, 24.0]]))
    locations = project_points(points, pinhole(), torch.tensor([[[64.0, 48.0]]]))
    torch.testing.assert_close(locations[0, 0, :, 0], torch.tensor([[42 / 64, 4 / 48], [0.5, 0.5]]))


def size_of_terms(points, matrix, wh):
    """Of the terms that make up a location, in its shape: it is off by some roundings of them."""
    points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    terms = torch.einsum("bcij,bnpj->bnpci", matrix.abs()[:, :, :3], points.abs())
    depth = torch.einsum("bcj,bnpj->bnpc", matrix[:, :, 2], points)
    raised = depth.clamp(min=1e-5)
    location = reference.project_points(points[..., :3], matrix, wh).abs()
    from_depth = torch.where(depth > 0, terms[..., 2] / raised, 0)[..., None] * location
    return terms[..., :2] / raised[..., None] / (1 if wh is None else wh[:, None, None]) + from_depth + location


@pytest.mark.parametrize("with_wh", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_every_location_to_a_few_roundings(backend_device, dtype, with_wh):
    rounded = [tensor.to(dtype) for tensor in random_case()]
    exact = [tensor.double() for tensor in rounded]
    if not with_wh:
        rounded[2] = exact[2] = None
    actual = project_points(*(tensor if tensor is None else tensor.to(backend_device) for tensor in rounded))
    assert actual.dtype == dtype
    error = (actual.cpu().double() - reference.project_points(*exact)).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * size_of_terms(*exact)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_through_the_depth_ends_below_the_least(backend_device, dtype):
    """At the least depth itself it still flows, as PyTorch's clamp has it."""
    least = torch.tensor(1e-5, dtype=dtype)
    below = torch.nextafter(least, -least)
    for depth, flows in ((least, True), (below, False), (-least, False)):
        matrix = torch.zeros(1, 1, 4, 4, dtype=dtype)
        matrix[0, 0, 0, 3] = 1  # x * depth
        matrix[0, 0, 2, 0], matrix[0, 0, 2, 3] = 1, depth
        leaf = torch.zeros(1, 1, 1, 3, dtype=dtype, device=backend_device, requires_grad=True)
        location = project_points(leaf, matrix.to(backend_device))
        (gradient,) = torch.autograd.grad(location[..., 0].sum(), leaf)
        expected = torch.tensor([-1 / least**2 if flows else 0, 0, 0], dtype=dtype)
        torch.testing.assert_close(gradient.flatten().cpu(), expected)


def test_point_behind_the_camera_lands_outside():
    ahead = torch.tensor([[[[0.5, 0.2, 8.0]]]])
    wh = torch.tensor([[[64.0, 48.0]]])
    seen = project_points(ahead, pinhole(), wh)
    mirrored = project_points(-ahead, pinhole(), wh)
    assert ((seen > 0) & (seen < 1)).all()
    assert not ((mirrored > 0) & (mirrored < 1)).any()


def test_reduced_matmul_precision_changes_nothing(device):
    points, matrix, wh = random_case(torch.float32, device)
    exact = project_points(points, matrix, wh)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # TF32 or bfloat16 products
    try:
        reduced = project_points(points, matrix, wh)
    finally:
        torch.set_float32_matmul_precision(precision)
    torch.testing.assert_close(reduced, exact, rtol=0, atol=0)


def test_integer_image_size():
    points, matrix, _ = random_case(torch.float32)
    wh = torch.tensor([704, 256]).expand(2, 3, 2)
    torch.testing.assert_close(project_points(points, matrix, wh), project_points(points, matrix, wh.float()))


@pytest.mark.parametrize(
    "points, matrix, wh, message",
    [
        (
            (2, 5, 4, 2),
            (2, 3, 4, 4),
            None,
            r"key_points must be \(bs, num_anchor, num_pts, 3\).*got \(2, 5, 4, 2\)",
        ),
        (
            (2, 5, 4, 3),
            (1, 3, 4, 4),
            None,
            r"projection_mat must be \(bs, num_cams, 4, 4\) with bs=2; got \(1, 3",
        ),
        ((2, 5, 4, 3), (2, 3, 3, 4), None, r"projection_mat must be .*got \(2, 3, 3, 4\)"),
        ((2, 5, 4, 3), (2, 3, 4, 4), (2, 2, 2), r"image_wh must be .*num_cams=3; got \(2, 2, 2\)"),
    ],
)
def test_wrong_shapes(points, matrix, wh, message):
    with pytest.raises(ValueError, match=message):
        project_points(torch.zeros(points), torch.zeros(matrix), None if wh is None else torch.ones(wh))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (1, lambda t: t.long(), TypeError, "projection_mat must be .*; got int64"),
        (2, lambda t: t.bool(), TypeError, "image_wh must be .*; got bool"),
        (
            2,
            lambda t: t[:1],
            ValueError,
            r"image_wh must be \(bs, num_cams, 2\) with bs=2, num_cams=3; got \(1, 3, 2\)",
        ),
    ],
)
@pytest.mark.parametrize("backend", [None, "grid_sample"])
def test_errors_say_what_was_expected_and_what_came(backend, place, change, error, message):
    operands = random_case(torch.float32)
    operands[place] = change(operands[place])
    with ops.use_backend(backend) if backend else nullcontext(), pytest.raises(error, match=message):
        project_points(*operands)
