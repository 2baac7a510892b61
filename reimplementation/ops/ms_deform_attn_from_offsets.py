"""Multi-scale deformable attention from offsets and logits: the locations and the softmax are part of the op."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._call import call
from ._register import define
from ._spec import FEATURES, LEVELS, LOCATIONS, LOGITS, OFFSETS, Operand, Spec
from .dtypes import FLOATING, as_dtype
from .levels import check_levels_fit
from .ms_deform_attn import backward_flags, ms_deform_attn

__all__ = ["ms_deform_attn_from_offsets"]


def ms_deform_attn_from_offsets(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    offset_scale: Tensor | None = None,
) -> Tensor:
    """Sample multi-scale values around each query's reference points and sum them with a softmax of logits.

    ``output[n, q, m*D + d] = sum over levels and points of w[n, q, m, lvl, pt] *
    bilinear(value of (n, lvl, m), location[n, q, m, lvl, pt])[d]``

    The weights ``w`` are one softmax over all levels and points of a query and head. The location is

    - ``(x, y) + offset / (W, H)`` for a reference point (x, y): the offset counts pixels of its level;
    - ``(x, y) + offset * scale * (w, h) / 2`` for a box (x, y, w, h): the offset counts halves of its size, times the
      level's scale.

    `ms_deform_attn` makes the same of such locations and weights, which do not exist in memory here. This is what the
    layer of Deformable DETR (arXiv 2010.04159, section 4.1) does between its linear layers. Offsets and logits may be
    slices of one tensor that a single linear layer made: all operands are read where they lie.

    Args:
        value: (N, S, M, D) float64, float32, float16 or bfloat16; the rows of all levels, M heads of D channels.
        spatial_shapes: (L, 2) integer (H, W), on the CPU or the value's device.
        level_start_index: (L,) integer, the first row of each level; likewise.
        reference_points: (N, Lq, L, 2) float32 or float64, (x, y) normalised to [0, 1]; or (N, Lq, L, 4), centre and
            size (x, y, w, h) of a box. In place of L it may have 1, for points that all levels share.
        sampling_offsets: (N, Lq, M, L, P, 2) in the value's dtype or float32, (x, y).
        attention_logits: (N, Lq, M, L, P), likewise.
        offset_scale: (L,) float32 or float64, the scale of each level, where reference points are boxes; None for
            1 / P, which is Deformable DETR's. (In D-FINE and RT-DETRv2 it is 1 over a level's own number of points.)

    Returns:
        (N, Lq, M*D) in the value's dtype. Locations, softmax and sums are computed in float32 (float64 for a float64
        value). Under autocast the value keeps its dtype.

    Gradients flow to value, reference_points, sampling_offsets and attention_logits, and are summed as those of
    `ms_deform_attn`. Where offset_scale needs one the formula runs, composed of that op. The kernels have no second
    derivatives and say so; grid_sample has PyTorch's.

    Raises:
        ValueError: a shape or device does not fit, or levels on the CPU reach beyond the value's rows. (Levels on a
            GPU that do so contribute nothing: reading them here would wait for the GPU.)
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    if all([isinstance(tensor, Tensor) for tensor in (value, sampling_offsets, attention_logits)]):
        if sampling_offsets.dtype != attention_logits.dtype:
            sampling_offsets, attention_logits = _in_one_dtype(value, sampling_offsets, attention_logits)
    return call(
        _OP,
        value,
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        offset_scale,
    )


def _in_one_dtype(value: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and logits, of different dtypes, both in the one of sums, where the op takes each of them."""
    allowed = FLOATING if torch._C._is_any_autocast_enabled() else LOGITS.accepted(value.dtype)
    if offsets.dtype not in allowed or logits.dtype not in allowed:
        return offsets, logits
    dtype = torch.promote_types(value.dtype, torch.float32)
    return as_dtype(offsets, dtype), as_dtype(logits, dtype)


def _formula(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    offset_scale: Tensor | None,
) -> Tensor:
    dtype = reference_points.dtype
    offsets = as_dtype(sampling_offsets, dtype)
    points = reference_points[:, :, None, :, None]
    centre = points[..., :2]
    if reference_points.shape[-1] == 2:
        # A level without pixels has no location, and must not make the gradients of offsets NaN.
        width_height = spatial_shapes.flip(-1).to(offsets.device, dtype, non_blocking=True).clamp(min=1)
        locations = centre + offsets / width_height[:, None]
    else:
        scale = 1 / max(offsets.shape[4], 1) if offset_scale is None else as_dtype(offset_scale, dtype)[:, None, None]
        moves = points[..., 2:] * (scale * 0.5)
        # What is not finite lies nowhere, and has no gradient.
        finite = (offsets * moves).isfinite()
        locations = (centre + offsets.where(finite, 0) * moves.where(moves.isfinite(), 0)).where(finite, torch.nan)
    weights = as_dtype(attention_logits, dtype).flatten(3).softmax(-1).view(attention_logits.shape)
    return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)


_LEVELS_OF_REFERENCES, _COORDINATES = "L or 1", "2 or 4"


def _check_sizes(sizes: Mapping[str, int]) -> None:
    levels, coordinates = sizes[_LEVELS_OF_REFERENCES], sizes[_COORDINATES]
    if (levels != sizes["L"] and levels != 1) or (coordinates != 2 and coordinates != 4):
        raise ValueError(
            f"reference_points must be (N, Lq, {_LEVELS_OF_REFERENCES}, {_COORDINATES}) with N={sizes['N']}, "
            f"Lq={sizes['Lq']}, L={sizes['L']}; got ({sizes['N']}, {sizes['Lq']}, {levels}, {coordinates})"
        )


def _check_values(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, *others: Tensor | None) -> None:
    check_levels_fit(spatial_shapes, level_start_index, value.shape[1], ("spatial_shapes", "level_start_index", "S"))


SPEC = Spec(
    name="ms_deform_attn_from_offsets",
    title="Multi-scale deformable attention from offsets",
    operands=(
        Operand("value", ("N", "S", "M", "D"), FEATURES, torch.contiguous_format),
        Operand("spatial_shapes", ("L", 2), LEVELS),
        Operand("level_start_index", ("L",), LEVELS),
        Operand(
            "reference_points", ("N", "Lq", _LEVELS_OF_REFERENCES, _COORDINATES), LOCATIONS, torch.contiguous_format
        ),
        Operand("sampling_offsets", ("N", "Lq", "M", "L", "P", 2), OFFSETS, torch.preserve_format),
        Operand("attention_logits", ("N", "Lq", "M", "L", "P"), LOGITS, torch.preserve_format),
        Operand("offset_scale", ("L",), LOCATIONS, optional=True),
    ),
    output=lambda sizes: (sizes["N"], sizes["Lq"], sizes["M"] * sizes["D"]),
    check_sizes=_check_sizes,
    check_values=_check_values,
)
_OP = define(SPEC, _formula, flags=backward_flags)
