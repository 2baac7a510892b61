"""From 3D key points to sampling locations in the images."""

from __future__ import annotations

from torch import Tensor

from reimplementation.ops.checks import FEATURE_DTYPES, INTEGER_DTYPES, check_dtype, check_shape

from .transforms import at_least_float32, transform

MIN_DEPTH = 1e-5


def project_points(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None = None) -> Tensor:
    """Project key points into every camera.

    A camera's matrix takes (x, y, z, 1) to (u * depth, v * depth, depth, 1). Depths below 1e-5 are raised to
    it: a point behind a camera that would have been seen by looking backwards lands outside the image.

    Args:
        key_points: (bs, num_anchor, num_pts, 3), any floating dtype.
        projection_mat: (bs, num_cams, 4, 4), any floating dtype.
        image_wh: (bs, num_cams, 2) width and height in pixels; None leaves the locations in pixels.

    Returns:
        (bs, num_anchor, num_pts, num_cams, 2): (x, y) with (0, 0) and (1, 1) the corners of the image, not
        clipped. The dtype is that of ``key_points``, float32 for half precision, which cannot address a
        pixel.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape.
    """
    sizes: dict[str, int] = {}
    check_dtype("key_points", key_points, FEATURE_DTYPES)
    check_shape("key_points", key_points, ("bs", "num_anchor", "num_pts", 3), sizes)
    check_dtype("projection_mat", projection_mat, FEATURE_DTYPES)
    check_shape("projection_mat", projection_mat, ("bs", "num_cams", 4, 4), sizes)

    points = at_least_float32(key_points)
    projected = transform(points[:, :, :, None], projection_mat[:, None, None, :, :3].to(points.dtype))
    extent = projected[..., 2:].clamp(min=MIN_DEPTH)
    if image_wh is not None:
        check_dtype("image_wh", image_wh, FEATURE_DTYPES + INTEGER_DTYPES)
        check_shape("image_wh", image_wh, ("bs", "num_cams", 2), sizes)
        extent = extent * image_wh[:, None, None].to(points.dtype)
    return projected[..., :2] / extent
