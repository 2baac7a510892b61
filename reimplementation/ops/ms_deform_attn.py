"""Multi-scale deformable attention: every head samples every level at its own points and sums with its weights."""

from __future__ import annotations

from torch import Tensor

from . import grid_sample
from .backends import EXTENSION_AVAILABLE
from .calls import Op, run
from .checks import check_shape
from .operands import check_operands
from .registration import register_sampling

__all__ = ["MSDeformAttnFunction", "ms_deform_attn"]

NAMES = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
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
        value: (N, S, M, D) float64, float32, float16 or bfloat16; the rows of all levels, M heads of D channels.
        spatial_shapes: (L, 2) integer (H, W), on the CPU or the value's device.
        level_start_index: (L,) integer, the first row of each level; likewise.
        sampling_locations: (N, Lq, M, L, P, 2) float32 or float64 (x, y), normalised to [0, 1].
        attention_weights: (N, Lq, M, L, P) in the value's dtype or float32.
        im2col_step: taken because call sites pass it; nothing depends on it, and N need not be a multiple of it.

    Returns:
        (N, Lq, M*D) in the value's dtype; sums run in float32 (float64 for a float64 value). Under autocast the
        value keeps its dtype, and half-precision locations are read as float32.

    Gradients flow to value, sampling_locations and attention_weights. The kernels have no second derivatives and say
    so; grid_sample has PyTorch's. Gradients are summed as the output is, and rounded once, with one exception: where
    few samples meet in a row of a half-precision value, on a GPU, up to 128 float16 (32 bfloat16) terms of its gradient
    are added up in its own dtype. They may then be off by 1/16 (1/8) of the sum of the terms' magnitudes; the gradient
    of a decoder with 900 queries is off by 6.4e-4 (3.2e-3) of its norm, where one rounding makes 2.1e-4 (1.7e-3).

    Raises:
        ValueError: a shape or device does not fit, or levels on the CPU reach beyond the value's rows. (Levels on a
            GPU that do so contribute nothing: reading them here would wait for the GPU.)
        TypeError: an argument is no tensor or has another dtype.
        RuntimeError: a forced backend is not available, or memory ran out; on a GPU that is a torch.OutOfMemoryError.
    """
    return run(_OP, value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


class MSDeformAttnFunction:
    """`ms_deform_attn` under the name by which Deformable DETR's modules call it, ``MSDeformAttnFunction.apply(...)``.

    The arguments and their order are the same; mmcv's ``MultiScaleDeformableAttnFunction.apply`` shares them.
    """

    apply = staticmethod(ms_deform_attn)


def _check(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    check_operands(NAMES, (value, spatial_shapes, level_start_index, sampling_locations, attention_weights))

    sizes: dict[str, int] = {}
    check_shape("value", value, ("N", "S", "M", "D"), sizes)
    check_shape("spatial_shapes", spatial_shapes, ("L", 2), sizes)
    check_shape("level_start_index", level_start_index, ("L",), sizes)
    check_shape("sampling_locations", sampling_locations, ("N", "Lq", "M", "L", "P", 2), sizes)
    check_shape("attention_weights", attention_weights, ("N", "Lq", "M", "L", "P"), sizes)


def _fake(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    _check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return value.new_empty(value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])


_OP = Op(
    title="Multi-scale deformable attention",
    level_names=("spatial_shapes", "level_start_index", "S"),
    check=_check,
    formula=grid_sample.ms_deform_attn,
    kernel=register_sampling("ms_deform_attn", _fake) if EXTENSION_AVAILABLE else None,
)
