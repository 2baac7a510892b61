"""From 3D key points to sampling locations in the images."""

from __future__ import annotations

import torch
from torch import Tensor

from ._call import call
from ._register import define
from ._spec import NUMBERS, REAL, Operand, Spec
from .transforms import transform

__all__ = ["project_points"]

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
    return call(_OP, key_points, projection_mat, image_wh)


def _formula(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None) -> Tensor:
    projected = transform(key_points[:, :, :, None], projection_mat[:, None, None, :, :3])
    extent = projected[..., 2:].clamp(min=MIN_DEPTH)
    if image_wh is not None:
        extent = extent * image_wh[:, None, None]
    return projected[..., :2] / extent


SPEC = Spec(
    name="project_points",
    title="Projection of key points",
    operands=(
        Operand("key_points", ("bs", "num_anchor", "num_pts", 3), REAL, torch.contiguous_format),
        Operand("projection_mat", ("bs", "num_cams", 4, 4), REAL),
        Operand("image_wh", ("bs", "num_cams", 2), NUMBERS, optional=True),
    ),
    output=lambda sizes: (sizes["bs"], sizes["num_anchor"], sizes["num_pts"], sizes["num_cams"], 2),
    is_pointwise=True,
)
_OP = define(SPEC, _formula)
