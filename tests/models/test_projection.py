"""project_points: closed forms, layout, precision, errors."""

import pytest
import torch

from reimplementation.models.deformable import DeformableFeatureAggregation, project_points


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


def test_integer_image_size():
    points, matrix, _ = random_case(torch.float32)
    wh = torch.tensor([704, 256]).expand(2, 3, 2)
    torch.testing.assert_close(project_points(points, matrix, wh), project_points(points, matrix, wh.float()))


def test_method_puts_cameras_first():
    points, matrix, wh = random_case()
    by_camera = DeformableFeatureAggregation.project_points(points, matrix, wh)
    assert by_camera.shape == (2, 3, 5, 4, 2)
    torch.testing.assert_close(by_camera[1, 2], project_points(points, matrix, wh)[1, :, :, 2])


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
