"""Deformable feature aggregation: from key points and logits to features, with projection and softmax inside."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._call import call
from ._register import define
from ._spec import FEATURES, LEVELS, MASK, NUMBERS, REAL, WEIGHTS, Operand, Spec
from .deformable_aggregation import deformable_aggregation_function
from .determinism import must_be_deterministic
from .dtypes import FLOATING, as_dtype
from .levels import check_levels_fit
from .project_points import MIN_DEPTH, project_points
from .transforms import transform

__all__ = ["deformable_feature_aggregation"]


def deformable_feature_aggregation(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    key_points: Tensor,
    projection_mat: Tensor,
    image_wh: Tensor | None,
    logits: Tensor,
    camera_logits: Tensor | None = None,
    keep: Tensor | None = None,
    attn_drop: float = 0.0,
    visible_only: bool = False,
) -> Tensor:
    """Project key points into every camera, sample every level there and sum with a softmax of logits.

    ``output[b, q, c] = sum over cameras, levels, points of w[b, q, cam, lvl, pt, c // (C / num_groups)] *
    bilinear(features of (b, cam, lvl), location[b, q, pt, cam])[c]``

    The locations are those of `project_points`. The weights ``w`` are one softmax over all cameras, levels and points
    for each query and group. `deformable_aggregation_function` makes the same of such locations and weights, which do
    not exist in memory here. This is what the module of Sparse4D (arXiv 2211.10581) and SparseDrive (arXiv 2405.19620)
    does between its linear layers.

    Args:
        feature_maps: (bs, num_feat, C) float64, float32, float16 or bfloat16; rows of all levels of all
            cameras, see `feature_maps_format`.
        spatial_shape: (num_cams, num_levels, 2) integer (H, W), on the CPU or the features' device.
        scale_start_index: (num_cams, num_levels) integer, the first row of each level; likewise.
        key_points: (bs, num_queries, num_pts, 3), any floating dtype.
        projection_mat: (bs, num_cams, 4, 4), any floating dtype; see `project_points`.
        image_wh: (bs, num_cams, 2) width and height in pixels, any floating or integer dtype; None where the matrix
            goes to normalised coordinates already.
        logits: (bs, num_queries, num_levels * num_pts * num_groups), in this order in memory, where ``camera_logits``
            are given; else (bs, num_queries, num_cams * num_levels * num_pts * num_groups). In the features' dtype or
            float32; num_groups divides C.
        camera_logits: (bs, num_cams, num_levels * num_pts * num_groups), likewise: a camera's term, which is added to
            every query's.
        keep: (bs, num_queries, num_cams, num_pts) bool. Where it is False, the point counts as unseen by the camera;
            the weights of the others, which its softmax has lowered, are scaled by 1 / (1 - attn_drop).
        attn_drop: the share of points that ``keep`` leaves out on average, in [0, 1); without ``keep`` nothing
            depends on it.
        visible_only: take the softmax over the pairs of point and camera alone where the camera sees the point
            (SparseDriveV2, BIP3D): any other pair has the logit -inf, unless no camera sees the point. A camera sees
            a point that is deeper than 1e-5 and inside the image.

    Returns:
        (bs, num_queries, C) in the features' dtype. Projection, softmax and sums run in float32 (float64 for float64
        features). Under autocast the features keep their dtype.

    Gradients flow to feature_maps, key_points, logits and camera_logits. Where projection_mat or image_wh needs one the
    formula runs, composed of the ops named above. The kernels have no second derivatives and say so; grid_sample has
    PyTorch's.

    Raises:
        ValueError: a shape, a device or ``attn_drop`` does not fit, or levels on the CPU reach beyond the features'
            rows. (Levels on a GPU that do so contribute nothing: reading them here would wait for the GPU.)
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    if _differ_in_dtype(logits, camera_logits, feature_maps):
        dtype = torch.promote_types(logits.dtype, camera_logits.dtype)  # type: ignore[union-attr]
        logits, camera_logits = as_dtype(logits, dtype), as_dtype(camera_logits, dtype)  # type: ignore[arg-type]
    return call(
        _OP,
        feature_maps,
        spatial_shape,
        scale_start_index,
        key_points,
        projection_mat,
        image_wh,
        logits,
        camera_logits,
        keep,
        settings=(attn_drop, visible_only),
    )


def _differ_in_dtype(logits: Tensor, camera_logits: Tensor | None, feature_maps: Tensor) -> bool:
    """Whether both logits are what the op takes, or autocast makes so, but not in one dtype, as kernels want them."""
    if not all([isinstance(tensor, Tensor) for tensor in (logits, camera_logits, feature_maps)]):
        return False
    dtypes = logits.dtype, camera_logits.dtype  # type: ignore[union-attr]
    if dtypes[0] == dtypes[1]:
        return False
    taken = FLOATING if torch._C._is_any_autocast_enabled() else WEIGHTS.accepted(feature_maps.dtype)
    return all([dtype in taken for dtype in dtypes])


def _formula(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    key_points: Tensor,
    projection_mat: Tensor,
    image_wh: Tensor | None,
    logits: Tensor,
    camera_logits: Tensor | None,
    keep: Tensor | None,
    attn_drop: float,
    visible_only: bool,
) -> Tensor:
    bs, num_queries, num_pts = key_points.shape[:3]
    num_cams, num_levels = scale_start_index.shape
    location = project_points(key_points, projection_mat, image_wh)

    logits = as_dtype(logits, key_points.dtype)
    if camera_logits is not None:
        logits = logits[:, :, None] + as_dtype(camera_logits, key_points.dtype)[:, None]
    num_pairs = num_cams * num_levels * num_pts
    num_groups = max(logits.shape[2:].numel() // max(num_pairs, 1), 1)
    samples = (bs, num_queries, num_cams, num_levels, num_pts, num_groups)
    if visible_only:
        hidden = _hidden(location, key_points, projection_mat).transpose(2, 3)[:, :, :, None, :, None]
        logits = logits.reshape(samples).masked_fill(hidden, float("-inf"))
    weights = logits.reshape(bs, num_queries, num_pairs, num_groups).softmax(dim=2).view(samples)
    if keep is not None:
        weights = torch.where(keep[:, :, :, None, :, None], weights * (1 / (1 - attn_drop)), 0)
    return deformable_aggregation_function(
        feature_maps, spatial_shape, scale_start_index, location, weights.permute(0, 1, 4, 2, 3, 5)
    )


def _hidden(location: Tensor, key_points: Tensor, projection_mat: Tensor) -> Tensor:
    """(bs, num_queries, num_pts, num_cams): the camera does not see the point, and another one does."""
    depth = transform(key_points[:, :, :, None], projection_mat[:, None, None, :, 2:3]).squeeze(-1)
    visible = (depth > MIN_DEPTH) & ((location > 0) & (location < 1)).all(-1)
    return ~visible & visible.any(-1, keepdim=True)


_WIDTH, _CAMERA_WIDTH = "num_weights", "num_levels * num_pts * num_groups"


def _samples_of_a_query(sizes: Mapping[str, int]) -> int:
    """How many (camera, level, point) a query has logits of: of all cameras, or of one where these have their own."""
    samples = sizes["num_levels"] * sizes["num_pts"]
    return samples if _CAMERA_WIDTH in sizes else sizes["num_cams"] * samples


def _num_groups(sizes: Mapping[str, int]) -> int:
    """Without samples there are no logits to count the groups of; one will do."""
    return sizes[_WIDTH] // max(_samples_of_a_query(sizes), 1) or 1


def _check_sizes(sizes: Mapping[str, int]) -> None:
    samples, width, channels = _samples_of_a_query(sizes), sizes[_WIDTH], sizes["C"]
    by_camera = sizes.get(_CAMERA_WIDTH, width)
    if width != by_camera:
        raise ValueError(f"logits and camera_logits must have one width, {_CAMERA_WIDTH}; got {width} and {by_camera}")
    if width != samples * _num_groups(sizes) or channels % _num_groups(sizes) != 0:
        what = _CAMERA_WIDTH if _CAMERA_WIDTH in sizes else f"num_cams * {_CAMERA_WIDTH}"
        raise ValueError(
            f"logits must be (bs, num_queries, {what}), {samples} a group, and num_groups must divide C={channels}; "
            f"got {width} logits a query"
        )


def _check_values(
    feature_maps: Tensor, spatial_shape: Tensor, scale_start_index: Tensor, *others: Tensor | float | None
) -> None:
    *_, attn_drop, visible_only = others
    if not 0 <= attn_drop < 1:  # type: ignore[operator]
        raise ValueError(f"attn_drop must be in [0, 1); got {attn_drop}")
    check_levels_fit(
        spatial_shape, scale_start_index, feature_maps.shape[1], ("spatial_shape", "scale_start_index", "num_feat")
    )


SPEC = Spec(
    name="deformable_feature_aggregation",
    title="Deformable feature aggregation",
    operands=(
        Operand("feature_maps", ("bs", "num_feat", "C"), FEATURES, torch.contiguous_format),
        Operand("spatial_shape", ("num_cams", "num_levels", 2), LEVELS),
        Operand("scale_start_index", ("num_cams", "num_levels"), LEVELS),
        Operand("key_points", ("bs", "num_queries", "num_pts", 3), REAL, torch.contiguous_format),
        Operand("projection_mat", ("bs", "num_cams", 4, 4), REAL),
        Operand("image_wh", ("bs", "num_cams", 2), NUMBERS, optional=True),
        Operand("logits", ("bs", "num_queries", _WIDTH), WEIGHTS, torch.contiguous_format),
        Operand("camera_logits", ("bs", "num_cams", _CAMERA_WIDTH), WEIGHTS, torch.contiguous_format, optional=True),
        Operand("keep", ("bs", "num_queries", "num_cams", "num_pts"), MASK, optional=True),
    ),
    output=lambda sizes: (sizes["bs"], sizes["num_queries"], sizes["C"]),
    settings=("attn_drop", "visible_only"),
    kept=lambda sizes: (sizes["bs"], sizes["num_queries"], _num_groups(sizes), 2),
    check_sizes=_check_sizes,
    check_values=_check_values,
)
_OP = define(SPEC, _formula, flags=lambda needs, dtype: (*needs, must_be_deterministic()))
