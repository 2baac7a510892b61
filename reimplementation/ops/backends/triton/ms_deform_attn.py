"""Multi-scale deformable attention in Triton.

A program owns one head of a block of neighbouring queries. It walks through levels and points, and takes one sample of
every query at a time, in a tile

    queries x channels of a head                 8 x 32 in Deformable DETR

so that a lane reads neighbouring channels in vectors, and neighbouring queries, whose samples in an encoder are
neighbouring pixels, find each other's rows in the L1 cache. Programs of all heads of a block follow one another:
together they read and write whole rows.

The backward reads the same rows, multiplies them with the output's gradient and sums over the channels, which is all
that the gradients of weights and locations need; they are the program's own. The value's gradient is everybody's: it is
added up with atomics, in float32 at least.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .footprint import (
    beside,
    bounded_level,
    check_rows,
    corner_pixel,
    corner_signs,
    corner_weights,
    empty_like,
    first_pixel,
    in_layout_of,
    padded,
    refuse_determinism,
    sums_like,
    warps,
)

SIZES = ["num_rows", "num_queries", "num_heads", "num_levels", "num_points"]
"""Arguments for whose values Triton must not compile anew, as it would for 1 and for multiples of 16."""
TILE = 256  # elements, queries x channels: one warp, which has nobody to wait for


@triton.jit
def place_of_program(num_queries, num_heads, BLOCK_Q: tl.constexpr):
    """What a program owns: the batch element, the head, and the queries, of which the last block may have too many."""
    block = tl.program_id(0) // num_heads
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    query = block % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return (block // num_blocks).to(tl.int64), tl.program_id(0) % num_heads, query


@triton.jit
def pixel_position(x, y, height, width, exists):
    """Locations as positions in pixels, and which of the samples' footprints touch the level, NaN's do not."""
    x = x * width - 0.5
    y = y * height - 0.5
    bottom = tl.where(height > 0, height, -1)  # nothing touches an empty level
    touches = exists & (x > -1) & (x < width) & (y > -1) & (y < bottom)
    return tl.where(touches, x, 0), tl.where(touches, y, 0), touches


@triton.jit
def corner_channels(
    corner: tl.constexpr, left, top, height, width, start, touches, row_length, channel, CHANNELS: tl.constexpr
):
    """Of a corner of each query: where its channels lie behind the first row, which of them exist, and the pixel."""
    row, inside = corner_pixel(corner, left, top, height, width, start)
    inside = inside & touches
    place = row.to(tl.int64)[:, None] * row_length + channel[None, :]
    return place, inside[:, None] & (channel < CHANNELS)[None, :], inside


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
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    wide = locations.dtype.element_ty
    batch, head, query = place_of_program(num_queries, num_heads, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    exists = query < num_queries
    item = (batch * num_queries + query) * num_heads + head
    first_sample = item * (num_levels * num_points)
    first_row = value + (batch * num_rows * num_heads + head) * CHANNELS

    total = tl.zeros([BLOCK_Q, BLOCK_D], dtype=wide)
    for level in range(num_levels):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1), tl.load(starts + level), num_rows
        )
        for point in range(num_points):
            sample = first_sample + (level * num_points + point)
            x = tl.load(locations + 2 * sample, mask=exists, other=0)
            y = tl.load(locations + 2 * sample + 1, mask=exists, other=0)
            x, y, touches = pixel_position(x, y, height, width, exists)
            weight = tl.load(weights + sample, mask=touches, other=0).to(wide)
            left, right = first_pixel(x)
            top, down = first_pixel(y)
            for corner in tl.static_range(4):
                place, is_read, _ = corner_channels(
                    corner, left, top, height, width, start, touches, num_heads * CHANNELS, channel, CHANNELS
                )
                along_x, along_y = corner_weights(corner, right, down)
                pixel = tl.load(first_row + place, mask=is_read, other=0).to(wide)
                total += (weight * along_x * along_y)[:, None] * pixel
    output_at = item[:, None] * CHANNELS + channel[None, :]
    tl.store(output + output_at, total, mask=exists[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def differentiate(
    first_row,
    toward,
    left,
    top,
    right,
    down,
    height,
    width,
    start,
    touches,
    row_length,
    channel,
    CHANNELS: tl.constexpr,
):
    """Of a sample of each query: what the output's gradient has in common with the average of the four pixels, and with
    its slopes along x and along y."""
    average = tl.zeros([toward.shape[0]], dtype=toward.dtype)
    slope_x = average
    slope_y = average
    for corner in tl.static_range(4):
        place, is_read, inside = corner_channels(
            corner, left, top, height, width, start, touches, row_length, channel, CHANNELS
        )
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(first_row + place, mask=is_read, other=0).to(toward.dtype)
        product = tl.where(inside, tl.sum(pixel * toward, axis=1), 0)
        sign_x, sign_y = corner_signs(corner)
        average += along_x * along_y * product
        slope_x += sign_x * along_y * product
        slope_y += sign_y * along_x * product
    return average, slope_x * width, slope_y * height


@triton.jit
def add_to_corners(
    first_row,
    added,
    left,
    top,
    right,
    down,
    height,
    width,
    start,
    touches,
    row_length,
    channel,
    CHANNELS: tl.constexpr,
):
    """Add a tile to the four corners' rows, times what each weighs."""
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(
            corner, left, top, height, width, start, touches, row_length, channel, CHANNELS
        )
        along_x, along_y = corner_weights(corner, right, down)
        tl.atomic_add(first_row + place, added * (along_x * along_y)[:, None], mask=is_read, sem="relaxed")


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
    channel = tl.arange(0, BLOCK_D)
    exists = query < num_queries
    item = (batch * num_queries + query) * num_heads + head
    first_sample = item * (num_levels * num_points)
    first_element = (batch * num_rows * num_heads + head) * CHANNELS
    output_at = item[:, None] * CHANNELS + channel[None, :]
    is_output = exists[:, None] & (channel < CHANNELS)[None, :]
    toward = tl.load(grad_output + output_at, mask=is_output, other=0).to(wide)

    for level in range(num_levels):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1), tl.load(starts + level), num_rows
        )
        for point in range(num_points):
            sample = first_sample + (level * num_points + point)
            x = tl.load(locations + 2 * sample, mask=exists, other=0)
            y = tl.load(locations + 2 * sample + 1, mask=exists, other=0)
            x, y, touches = pixel_position(x, y, height, width, exists)
            weight = tl.load(weights + sample, mask=touches, other=0).to(wide)
            left, right = first_pixel(x)
            top, down = first_pixel(y)
            if NEEDS_LOCATIONS or NEEDS_WEIGHTS:
                average, slope_x, slope_y = differentiate(
                    value + first_element,
                    toward,
                    left,
                    top,
                    right,
                    down,
                    height,
                    width,
                    start,
                    touches,
                    num_heads * CHANNELS,
                    channel,
                    CHANNELS,
                )
                if NEEDS_WEIGHTS:
                    tl.store(grad_weights + sample, average, mask=exists)
                if NEEDS_LOCATIONS:
                    tl.store(grad_locations + 2 * sample, weight * slope_x, mask=exists)
                    tl.store(grad_locations + 2 * sample + 1, weight * slope_y, mask=exists)
            if NEEDS_VALUE:  # when everything has been loaded: no load is moved ahead of an atomic
                add_to_corners(
                    grad_value + first_element,
                    toward * weight[:, None],
                    left,
                    top,
                    right,
                    down,
                    height,
                    width,
                    start,
                    touches,
                    num_heads * CHANNELS,
                    channel,
                    CHANNELS,
                )


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
    block_d = padded(channels)
    block_q = max(TILE // block_d, 1)
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
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        num_warps=warps(block_q * block_d),
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
        block_d = padded(channels)
        block_q = max(TILE // block_d, 1)
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
            num_warps=warps(block_q * block_d),
        )
    return (
        grad_value.to(value.dtype),
        in_layout_of(sampling_locations, grad_locations),
        in_layout_of(attention_weights, grad_weights),
    )
