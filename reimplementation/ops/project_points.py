"""From 3D key points to sampling locations in the images."""

from __future__ import annotations

from torch import Tensor

from .backends import EXTENSION_AVAILABLE
from .checks import FEATURE_DTYPES, INTEGER_DTYPES, check_device, check_dtype, check_shape
from .pointwise import PointwiseOp, check_as_kernels_read, check_gradient, run
from .registration import register
from .transforms import at_least_float32, transform

__all__ = ["project_points"]

NAMES = ("key_points", "projection_mat", "image_wh")
MIN_DEPTH = 1e-5


def project_points(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None = None) -> Tensor:
    """Project key points into every camera.

    A camera's matrix takes (x, y, z, 1) to (u * depth, v * depth, depth, 1). Depths below 1e-5 are raised to
    it: a point behind a camera that would have been seen by looking backwards lands outside the image. This is
    the projection of Sparse4D (arXiv 2211.10581) and SparseDrive (arXiv 2405.19620).

    Args:
        key_points: (bs, num_anchor, num_pts, 3), any floating dtype.
        projection_mat: (bs, num_cams, 4, 4), any floating dtype.
        image_wh: (bs, num_cams, 2) width and height in pixels, any floating or integer dtype; None leaves the
            locations in pixels.

    Returns:
        (bs, num_anchor, num_pts, num_cams, 2): (x, y) with (0, 0) and (1, 1) the corners of the image, not
        clipped. The dtype is that of ``key_points``, float32 for half precision, which cannot address a
        pixel; autocast changes nothing.

    Gradients of any order flow to all three. Through a depth below 1e-5 there flows none. Where ``projection_mat`` or
    ``image_wh`` needs one the formula runs, plain PyTorch, as it does where PyTorch traces the call.

    Raises:
        ValueError: a shape or device does not fit.
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    return run(_OP, key_points, projection_mat, image_wh)


def _check(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None) -> None:
    sizes: dict[str, int] = {}
    check_dtype("key_points", key_points, FEATURE_DTYPES)
    check_shape("key_points", key_points, ("bs", "num_anchor", "num_pts", 3), sizes)
    check_dtype("projection_mat", projection_mat, FEATURE_DTYPES)
    check_shape("projection_mat", projection_mat, ("bs", "num_cams", 4, 4), sizes)
    check_device("projection_mat", projection_mat, key_points.device)
    if image_wh is not None:
        check_dtype("image_wh", image_wh, FEATURE_DTYPES + INTEGER_DTYPES)
        check_shape("image_wh", image_wh, ("bs", "num_cams", 2), sizes)
        check_device("image_wh", image_wh, key_points.device)


def _formula(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None) -> Tensor:
    points = at_least_float32(key_points)
    projected = transform(points[:, :, :, None], projection_mat[:, None, None, :, :3].to(points.dtype))
    extent = projected[..., 2:].clamp(min=MIN_DEPTH)
    if image_wh is not None:
        extent = extent * image_wh[:, None, None].to(points.dtype)
    return projected[..., :2] / extent


def _fake(key_points, projection_mat, image_wh):
    _check(key_points, projection_mat, image_wh)
    check_as_kernels_read(NAMES, (key_points, projection_mat, image_wh))
    return key_points.new_empty(*key_points.shape[:3], projection_mat.shape[1], 2)


def _fake_backward(grad_output, key_points, projection_mat, image_wh):
    check_gradient(grad_output, _fake(key_points, projection_mat, image_wh))
    return key_points.new_empty(key_points.shape)


_OP = PointwiseOp(
    title="Projection of key points",
    check=_check,
    formula=_formula,
    kernel=register("project_points", _fake, _fake_backward, differentiable=(0,), formula=_formula)
    if EXTENSION_AVAILABLE
    else None,
)
