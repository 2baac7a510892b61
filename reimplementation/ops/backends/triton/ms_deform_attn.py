"""Multi-scale deformable attention in Triton.

A program, which owns one head of a block of queries, walks through levels and points (attention_samples.py).

The backward reads the rows that the forward read, multiplies them with the output's gradient and sums over the
channels, which is all that the gradients of weights and locations need; they are the program's own. The value's
gradient is everybody's: it is added up with atomics, in float32 at least.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .attention_samples import (
    SIZES,
    TOUCHES,
    add_to_corners,
    channels_of_head,
    differentiate,
    footprint_of,
    interpolate,
    length_of_row,
    place_of_program,
    tile,
    unrolled,
)
from .footprint import (
    beside,
    bounded_level,
    check_rows,
    empty_like,
    in_layout_of,
    refuse_determinism,
    sums_like,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    value,
    shapes,
    starts,
    locations,
    weights,
    output,
    num_rows,
    num_queries,
    num_heads,
    num_levels,
    num_points,
    CHANNELS: tl.constexpr,
    UNROLLED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide = locations.dtype.element_ty
    batch, head, query = place_of_program(num_queries, num_heads, BLOCK_Q)
    channel, is_channel = channels_of_head(CHANNELS, BLOCK_D)
    exists = query < num_queries
    item = (batch * num_queries + query) * num_heads + head
    own_locations = locations + item * (num_levels * num_points) * 2
    own_weights = weights + item * (num_levels * num_points)
    first_channel = value + (batch * num_rows * num_heads + head) * CHANNELS + channel
    row_length = length_of_row(num_heads, CHANNELS)

    total = tl.zeros([BLOCK_Q, BLOCK_D], dtype=wide)
    for level in range(num_levels):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1), tl.load(starts + level), num_rows
        )
        for first in range(0, num_points, UNROLLED):
            at = level * num_points + first
            for point in tl.static_range(UNROLLED):
                x = tl.load(own_locations + 2 * at + 2 * point, mask=exists, other=0)
                y = tl.load(own_locations + 2 * at + 2 * point + 1, mask=exists, other=0)
                footprint = footprint_of(x, y, height, width, start, exists)
                weight = tl.load(own_weights + at + point, mask=footprint[TOUCHES], other=0).to(wide)
                sample = interpolate(first_channel, footprint, row_length, is_channel, wide)
                total += weight[:, None] * sample
    output_at = item[:, None] * CHANNELS + channel[None, :]
    tl.store(output + output_at, total, mask=exists[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_output,
    value,
    shapes,
    starts,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    num_rows,
    num_queries,
    num_heads,
    num_levels,
    num_points,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_LOCATIONS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):
    wide = locations.dtype.element_ty
    batch, head, query = place_of_program(num_queries, num_heads, BLOCK_Q)
    channel, is_channel = channels_of_head(CHANNELS, BLOCK_D)
    exists = query < num_queries
    item = (batch * num_queries + query) * num_heads + head
    first_sample = item * (num_levels * num_points)
    first_element = (batch * num_rows * num_heads + head) * CHANNELS + channel
    row_length = length_of_row(num_heads, CHANNELS)
    output_at = item[:, None] * CHANNELS + channel[None, :]
    is_output = exists[:, None] & is_channel[None, :]
    toward = tl.load(grad_output + output_at, mask=is_output, other=0).to(wide)

    for level in range(num_levels):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1), tl.load(starts + level), num_rows
        )
        for point in range(num_points):
            sample = first_sample + (level * num_points + point)
            x = tl.load(locations + 2 * sample, mask=exists, other=0)
            y = tl.load(locations + 2 * sample + 1, mask=exists, other=0)
            footprint = footprint_of(x, y, height, width, start, exists)
            weight = tl.load(weights + sample, mask=footprint[TOUCHES], other=0).to(wide)
            if NEEDS_LOCATIONS or NEEDS_WEIGHTS:
                average, slope_x, slope_y = differentiate(
                    value + first_element, toward, footprint, row_length, is_channel
                )
                if NEEDS_WEIGHTS:
                    tl.store(grad_weights + sample, average, mask=exists)
                if NEEDS_LOCATIONS:
                    tl.store(grad_locations + 2 * sample, weight * slope_x, mask=exists)
                    tl.store(grad_locations + 2 * sample + 1, weight * slope_y, mask=exists)
            if NEEDS_VALUE:  # when everything has been loaded: no load is moved ahead of an atomic
                added = toward * weight[:, None]
                add_to_corners(grad_value + first_element, added, footprint, row_length, is_channel)


def forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The output, of operands that were checked."""
    batch_size, num_rows, num_heads, channels = value.shape
    num_queries, _, num_levels, num_points = attention_weights.shape[1:]
    check_rows("S", num_rows)
    output = value.new_empty(batch_size, num_queries, num_heads * channels)
    if output.numel() == 0:
        return output
    block_q, block_d, num_warps = tile(int(channels), value.element_size())
    wrap_triton(forward_kernel)[(batch_size * -(-num_queries // block_q) * num_heads,)](
        value.contiguous(),
        beside(spatial_shapes, value),
        beside(level_start_index, value),
        sampling_locations.contiguous(),
        attention_weights.contiguous(),
        output,
        num_rows,
        num_queries,
        num_heads,
        num_levels,
        num_points,
        CHANNELS=int(channels),
        UNROLLED=unrolled(num_points),
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        num_warps=num_warps,
    )
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    needs_value: bool,
    needs_sampling_locations: bool,
    needs_attention_weights: bool,
    deterministic: bool = False,
    half_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of value, locations and weights, of operands that were checked.

    ``half_sums`` allows sums in half precision; there are none here.
    """
    batch_size, num_rows, num_heads, channels = value.shape
    num_queries, _, num_levels, num_points = attention_weights.shape[1:]
    check_rows("S", num_rows)
    refuse_determinism(deterministic and needs_value, "value")
    grad_value = sums_like(value, needs_value)
    grad_locations = empty_like(sampling_locations, needs_sampling_locations)
    grad_weights = empty_like(attention_weights, needs_attention_weights)
    if grad_output.numel() == 0:
        grad_locations, grad_weights = grad_locations.zero_(), grad_weights.zero_()
    else:
        block_q, block_d, num_warps = tile(int(channels), grad_value.element_size())
        wrap_triton(backward_kernel)[(batch_size * -(-num_queries // block_q) * num_heads,)](
            grad_output.contiguous(),
            value.contiguous(),
            beside(spatial_shapes, value),
            beside(level_start_index, value),
            sampling_locations.contiguous(),
            attention_weights.contiguous(),
            grad_value,
            grad_locations,
            grad_weights,
            num_rows,
            num_queries,
            num_heads,
            num_levels,
            num_points,
            CHANNELS=int(channels),
            BLOCK_Q=block_q,
            BLOCK_D=block_d,
            NEEDS_VALUE=needs_value,
            NEEDS_LOCATIONS=needs_sampling_locations,
            NEEDS_WEIGHTS=needs_attention_weights,
            num_warps=num_warps,
        )
    return (
        grad_value.to(value.dtype),
        in_layout_of(sampling_locations, grad_locations),
        in_layout_of(attention_weights, grad_weights),
    )
