"""Deformable aggregation: sample every camera and level at projected key points, sum with per-group weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._call import call
from ._register import define
from ._spec import FEATURES, LEVELS, LOCATIONS, WEIGHTS, Operand, Spec
from .backends import grid_sample
from .determinism import must_be_deterministic
from .levels import check_levels_fit

__all__ = ["deformable_aggregation_function"]


def deformable_aggregation_function(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """Sample multi-view, multi-scale features at each query's key points and sum them with per-group weights.

    ``output[b, q, c] = sum over points, cameras, levels of weights[b, q, pt, cam, lvl, c // (C / num_groups)] *
    bilinear(features of (b, cam, lvl), sampling_location[b, q, pt, cam])[c]``

    Location (x, y) in a level of H x W pixels is the pixel position (x*W - 0.5, y*H - 0.5), pixels outside a level
    count as zero (`torch.nn.functional.grid_sample` with ``align_corners=False``). A location outside the open unit
    square 0 < x < 1, 0 < y < 1, NaN included, contributes nothing and gets no gradient. This is the sampling of
    Sparse4D (arXiv 2211.10581) and SparseDrive (arXiv 2405.19620), whose call sites it fits.

    Args:
        feature_maps: (bs, num_feat, C) float64, float32, float16 or bfloat16; rows of all levels of all
            cameras, see `feature_maps_format`.
        spatial_shape: (num_cams, num_levels, 2) integer (H, W), on the CPU or the features' device.
        scale_start_index: (num_cams, num_levels) integer, the first row of each level; likewise.
        sampling_location: (bs, num_queries, num_pts, num_cams, 2) float32 or float64 (x, y), normalised to [0, 1].
        weights: (bs, num_queries, num_pts, num_cams, num_levels, num_groups) in the features' dtype or float32;
            num_groups divides C.

    Returns:
        (bs, num_queries, C) in the features' dtype; sums run in float32 (float64 for float64 features). Under
        autocast the features keep their dtype, and half-precision locations are read as float32.

    Gradients flow to feature_maps, sampling_location and weights. The kernels have no second derivatives and say so;
    grid_sample has PyTorch's.

    Raises:
        ValueError: a shape or device does not fit, or levels on the CPU reach beyond the features' rows. (Levels
            on a GPU that do so contribute nothing: reading them here would wait for the GPU.)
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    return call(_OP, feature_maps, spatial_shape, scale_start_index, sampling_location, weights)


def _check_sizes(sizes: Mapping[str, int]) -> None:
    if sizes["num_groups"] == 0 or sizes["C"] % sizes["num_groups"] != 0:
        raise ValueError(f"weights: num_groups must divide C={sizes['C']}; got num_groups={sizes['num_groups']}")


def _check_values(feature_maps: Tensor, spatial_shape: Tensor, scale_start_index: Tensor, *others: Tensor) -> None:
    check_levels_fit(
        spatial_shape, scale_start_index, feature_maps.shape[1], ("spatial_shape", "scale_start_index", "num_feat")
    )


SPEC = Spec(
    name="deformable_aggregation",
    title="Deformable aggregation",
    operands=(
        Operand("feature_maps", ("bs", "num_feat", "C"), FEATURES, torch.contiguous_format),
        Operand("spatial_shape", ("num_cams", "num_levels", 2), LEVELS),
        Operand("scale_start_index", ("num_cams", "num_levels"), LEVELS),
        Operand("sampling_location", ("bs", "num_queries", "num_pts", "num_cams", 2), LOCATIONS, torch.preserve_format),
        Operand(
            "weights",
            ("bs", "num_queries", "num_pts", "num_cams", "num_levels", "num_groups"),
            WEIGHTS,
            torch.preserve_format,
        ),
    ),
    output=lambda sizes: (sizes["bs"], sizes["num_queries"], sizes["C"]),
    check_sizes=_check_sizes,
    check_values=_check_values,
)
_OP = define(SPEC, grid_sample.deformable_aggregation, flags=lambda needs, dtype: (*needs, must_be_deterministic()))
