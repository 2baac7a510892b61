"""project_points: closed forms, layout, precision, errors; `test_pointwise` has what it shares with box_key_points."""

from contextlib import nullcontext

import pytest
import torch

from reimplementation import ops
from reimplementation.ops import project_points
from tests import reference
from tests.reference import TOLERANCE, relative_error


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


def test_against_homogeneous_matrix_product(device):
    points, matrix, wh = random_case(device=device)
    homogeneous = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    projected = torch.einsum("bcij,bnpj->bnpci", matrix, homogeneous)
    expected = projected[..., :2] / projected[..., 2:3].clamp(min=1e-5) / wh[:, None, None]
    actual = project_points(points, matrix, wh)
    assert actual.shape == (2, 5, 4, 3, 2)
    torch.testing.assert_close(actual, expected)


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


@pytest.mark.parametrize("with_wh", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradient_against_float64(backend_device, dtype, with_wh):
    """Of points before a camera: those behind have gradients that are a hundred thousand times larger."""
    rounded = [tensor.to(dtype) for tensor in random_case()]
    if not with_wh:
        rounded[2] = None
    expected_leaf = rounded[0].double().requires_grad_()
    expected = reference.project_points(expected_leaf, *rounded[1:])
    homogeneous = torch.cat([expected_leaf, torch.ones_like(expected_leaf[..., :1])], dim=-1)
    seen = torch.einsum("bcj,bnpj->bnpc", rounded[1][:, :, 2].double(), homogeneous)[..., None] > 5
    toward = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype) * seen
    leaf = rounded[0].to(backend_device).requires_grad_()
    others = [tensor if tensor is None else tensor.to(backend_device) for tensor in rounded[1:]]
    (actual,) = torch.autograd.grad(project_points(leaf, *others), leaf, toward.to(backend_device))
    (wanted,) = torch.autograd.grad(expected, expected_leaf, toward.double())
    assert relative_error(actual.cpu(), wanted) <= TOLERANCE[dtype]


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


def test_gradcheck():
    points, matrix, wh = random_case()
    matrix[:, :, 2] = torch.tensor([0.01, 0.01, 0.01, 3.0], dtype=matrix.dtype)  # depths away from the clamp
    points.requires_grad_(), matrix.requires_grad_()
    assert torch.autograd.gradcheck(project_points, (points, matrix, wh))


def test_gradcheck_of_points_alone(backend_device):
    points, matrix, wh = random_case(device=backend_device)
    matrix[:, :, 2] = torch.tensor([0.01, 0.01, 0.01, 3.0], dtype=matrix.dtype)
    assert torch.autograd.gradcheck(lambda points: project_points(points, matrix, wh), points.requires_grad_())


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_points_are_projected_in_float32(half):
    points, matrix, wh = random_case(torch.float32)
    points = points.to(half)
    actual = project_points(points, matrix, wh)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, project_points(points.float(), matrix, wh), rtol=0, atol=0)


def test_autocast_changes_nothing(device):
    points, matrix, wh = random_case(torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = project_points(points, matrix, wh)
    torch.testing.assert_close(under_autocast, project_points(points, matrix, wh), rtol=0, atol=0)


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


@pytest.mark.parametrize("num_anchor, num_pts, num_cams", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_empty(num_anchor, num_pts, num_cams):
    located = project_points(torch.zeros(2, num_anchor, num_pts, 3), torch.zeros(2, num_cams, 4, 4))
    assert located.shape == (2, num_anchor, num_pts, num_cams, 2)


@pytest.mark.parametrize("bs, num_anchor, num_pts, num_cams", [(0, 5, 4, 3), (2, 0, 4, 3), (2, 5, 0, 3), (2, 5, 4, 0)])
def test_empty_gradients(backend_device, bs, num_anchor, num_pts, num_cams):
    leaf = torch.zeros(bs, num_anchor, num_pts, 3, device=backend_device, requires_grad=True)
    wh = torch.ones(bs, num_cams, 2, device=backend_device)
    located = project_points(leaf, torch.zeros(bs, num_cams, 4, 4, device=backend_device), wh)
    assert located.shape == (bs, num_anchor, num_pts, num_cams, 2)
    located.sum().backward()
    assert leaf.grad.shape == leaf.shape and not leaf.grad.any()


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


def test_wrong_types():
    with pytest.raises(TypeError, match="projection_mat must be a torch.Tensor; got list"):
        project_points(torch.zeros(1, 1, 1, 3), [[0.0]])
    with pytest.raises(TypeError, match="key_points must be .*; got int64"):
        project_points(torch.zeros(1, 1, 1, 3, dtype=torch.int64), torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("place", "change", "error", "message"),
    [
        (0, lambda t: t.to_sparse(), TypeError, r"key_points must be a dense \(strided\) tensor"),
        (0, lambda t: t.tolist(), TypeError, "key_points must be a torch.Tensor; got list"),
        (1, lambda t: t.long(), TypeError, "projection_mat must be .*; got int64"),
        (1, lambda t: t.to("meta"), ValueError, "projection_mat must be on cpu; got meta"),
        (2, lambda t: t.bool(), TypeError, "image_wh must be .*; got bool"),
        (2, lambda t: t.to("meta"), ValueError, "image_wh must be on cpu; got meta"),
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
