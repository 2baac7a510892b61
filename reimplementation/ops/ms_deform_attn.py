"""Multi-scale deformable attention: every head samples every level at its own points and sums with its weights.

The operator knows one form of the operands. What callers have besides is brought into it by `_attention_forms`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ._attention_forms import in_plain_form
from ._call import call
from ._register import define
from ._spec import FEATURES, LEVELS, LOCATIONS, WEIGHTS, Operand, Spec
from .backends import grid_sample
from .determinism import must_be_deterministic
from .dtypes import FLOATING
from .levels import check_levels_fit
from .pyramid import joined

__all__ = ["MSDeformAttnFunction", "ms_deform_attn"]


def ms_deform_attn(
    value: Tensor | Sequence[Tensor],
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
    *,
    num_points: Sequence[int] | None = None,
    method: str = "default",
) -> Tensor:
    """Sample multi-scale values at each query's points, head by head, and sum them with attention weights.

    ``output[n, q, m*D + d] = sum over levels and points of attention_weights[n, q, m, lvl, pt] *
    bilinear(value of (n, lvl, m), sampling_locations[n, q, m, lvl, pt])[d]``

    Location (x, y) in a level of H x W pixels is the pixel position (x*W - 0.5, y*H - 0.5), pixels outside a level
    count as zero (`torch.nn.functional.grid_sample` with ``align_corners=False``). A location counts as long as its
    footprint touches the level, also from outside the unit square: -1 < x*W - 0.5 < W, likewise for y. Any other,
    NaN included, contributes nothing and gets no gradient. This is the attention of Deformable DETR
    (arXiv 2010.04159, equation 3), whose call sites it fits.

    Args:
        value: (N, S, M, D) float64, float32, float16 or bfloat16; the rows of all levels, M heads of D channels. It may
            have any strides, but the kernels read whole rows: anything else than a contiguous value is copied once. A
            value (N, M, D, S) is passed as ``value.permute(0, 3, 1, 2)``. Or a sequence with a tensor (N, M, D, rows)
            for each level, as D-FINE's code has it: they are joined, which is one copy too.
        spatial_shapes: (L, 2) integer (H, W), on the CPU or the value's device. Or a sequence of L pairs of whole
            numbers, which become a tensor on the device once, and not at each call.
        level_start_index: (L,) integer, the first row of each level; likewise. None where levels follow one another.
        sampling_locations: (N, Lq, M, L, P, 2) floating (x, y), normalised to [0, 1]. Half precision is widened to
            float32; but it cannot address a pixel, so it is better to compute locations in float32.
        attention_weights: (N, Lq, M, L, P) in the value's dtype or float32.
        im2col_step: taken because call sites pass it; nothing depends on it, and N need not be a multiple of it.
        num_points: L numbers, where levels have different numbers of points. Locations are then
            (N, Lq, M, sum(num_points), 2) and weights (N, Lq, M, sum(num_points)), level after level (RT-DETRv2,
            arXiv 2407.17140; D-FINE, arXiv 2410.13842). It costs nothing: a level is listed several times, such that
            all have the greatest common divisor as their number of points.
        method: "default" samples bilinearly, as above. "discrete" takes one pixel for each location, the one at
            ``int(location * (W, H) + 0.5)``, clamped into the level; locations get no gradient. "discrete_by_height"
            clamps x by H - 1 as y, which is what D-FINE's own code does; beyond the width of a level that is higher
            than wide, a sample then contributes nothing. Both read the centre of that pixel bilinearly, so its
            neighbours take part with what float32 rounds a pixel position by. A NaN contributes nothing.

    Returns:
        (N, Lq, M*D) in the value's dtype; sums run in float32 (float64 for a float64 value). Under autocast the
        value keeps its dtype, and half-precision locations are read as float32.

    Gradients flow to value, sampling_locations and attention_weights. The kernels have no second derivatives and say
    so; grid_sample has PyTorch's. Gradients are summed as the output is, and rounded once, with one exception: where
    few samples meet in a row of a half-precision value, on a GPU, up to 128 float16 (32 bfloat16) terms of its gradient
    are added up in its own dtype. They may then be off by 1/16 (1/8) of the sum of the terms' magnitudes; the gradient
    of a decoder with 900 queries is off by 6.4e-4 (3.2e-3) of its norm, where one rounding makes 2.1e-4 (1.7e-3). The
    exception follows PyTorch's own switches: with
    ``torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`` (or ``allow_bf16_…``) set to False, there is
    none. A compiled function keeps what they were when it was compiled.

    Raises:
        ValueError: a shape or device does not fit, or levels on the CPU, or given as numbers, reach beyond the value's
            rows. (Levels in a tensor on a GPU that do so contribute nothing: reading them would wait for the GPU.)
        TypeError: an argument has another type or dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    if not isinstance(value, Tensor):
        value = joined(value)
    if (
        num_points is not None
        or level_start_index is None
        or method != "default"
        or not isinstance(spatial_shapes, Tensor)
    ):
        spatial_shapes, level_start_index, sampling_locations, attention_weights = in_plain_form(
            value, spatial_shapes, level_start_index, sampling_locations, attention_weights, num_points, method
        )
    return call(_OP, value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


class MSDeformAttnFunction:
    """`ms_deform_attn` under the name by which Deformable DETR's modules call it, ``MSDeformAttnFunction.apply(...)``.

    The arguments and their order are the same; mmcv's ``MultiScaleDeformableAttnFunction.apply`` shares them.
    """

    apply = staticmethod(ms_deform_attn)


def _check_values(value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, *others: Tensor) -> None:
    check_levels_fit(spatial_shapes, level_start_index, value.shape[1], ("spatial_shapes", "level_start_index", "S"))


def backward_flags(needs: Sequence[bool], dtype: torch.dtype) -> tuple[bool, ...]:
    """What the backward is told: the gradients that are needed, and how it may sum."""
    return *needs, must_be_deterministic(), _may_sum_in_half(dtype)


def _may_sum_in_half(dtype: torch.dtype) -> bool:
    """What PyTorch's switches say to sums of that dtype within it. Asking takes long, so only halves do."""
    if dtype == torch.float16:
        return torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    if dtype == torch.bfloat16:
        return torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    return False


WIDENED_LOCATIONS = replace(LOCATIONS, accepted=lambda first: FLOATING, advice="")

SPEC = Spec(
    name="ms_deform_attn",
    title="Multi-scale deformable attention",
    operands=(
        Operand("value", ("N", "S", "M", "D"), FEATURES, torch.contiguous_format),
        Operand("spatial_shapes", ("L", 2), LEVELS),
        Operand("level_start_index", ("L",), LEVELS),
        Operand("sampling_locations", ("N", "Lq", "M", "L", "P", 2), WIDENED_LOCATIONS, torch.preserve_format),
        Operand("attention_weights", ("N", "Lq", "M", "L", "P"), WEIGHTS, torch.preserve_format),
    ),
    output=lambda sizes: (sizes["N"], sizes["Lq"], sizes["M"] * sizes["D"]),
    check_values=_check_values,
)
_OP = define(SPEC, grid_sample.ms_deform_attn, flags=backward_flags)
