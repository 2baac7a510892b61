"""What the kernels of attention share: what a program owns, and the tiles of its samples.

A program owns one head of a block of neighbouring queries, and takes one sample of every query at a time, in a tile

    queries x channels of a head         4 x 32 in Deformable DETR

so that a lane reads a vector of 16 bytes, and neighbouring lanes a whole row of a head, which the L1 cache gives in one
go. Neighbouring queries, whose samples in an encoder are neighbouring pixels, find each other's rows there. Programs of
all heads of a block follow one another: together they read and write whole rows.
"""

import math

import triton
import triton.language as tl

from .footprint import (
    corner_signs,
    corner_weights,
    first_pixel,
    is_corner_inside,
    last_corner,
    padded,
    rows_to_corner,
    warps,
)

SIZES = ["num_rows", "num_queries", "num_heads", "num_levels", "num_points"]
"""Arguments for whose values Triton must not compile anew, as it would for 1 and for multiples of 16."""
OUTSIDE = tl.constexpr(-2.0)  # a position of which no corner is a pixel
TOUCHES = tl.constexpr(7)  # the place in a footprint of whether it touches its level
MOST_UNROLLED = 4
WARP_BYTES = 512  # a vector of 16 bytes for each lane


@triton.jit
def place_of_program(num_queries, num_heads, BLOCK_Q: tl.constexpr):
    """What a program owns: the batch element, the head, and the queries, of which the last block may have too many."""
    block = tl.program_id(0) // num_heads
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    query = block % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return (block // num_blocks).to(tl.int64), tl.program_id(0) % num_heads, query


@triton.jit
def channels_of_head(CHANNELS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels of a tile, and which of them exist."""
    channel = tl.arange(0, BLOCK_D)
    return channel, channel < CHANNELS


@triton.jit
def length_of_row(num_heads, CHANNELS: tl.constexpr):
    """How far two rows lie apart. Unsigned, a product with a row's number in 64 bits is a single instruction."""
    return tl.cast(tl.cast(num_heads * CHANNELS, tl.uint32), tl.uint64)


@triton.jit
def footprint_of(x, y, height, width, start, exists):
    """Of a location of each query in a level, a tuple: the pixel before it, left and top; how far behind that it lies,
    right and down; the level; and whether a footprint there touches it, which NaN's do not."""
    x = x * width - 0.5
    y = y * height - 0.5
    bottom = tl.where(height > 0, height, -1)  # nothing touches an empty level
    touches = exists & (x > -1) & (x < width) & (y > -1) & (y < bottom)
    left, right = first_pixel(tl.where(touches, x, OUTSIDE))
    top, down = first_pixel(tl.where(touches, y, OUTSIDE))
    return left, top, right, down, height, width, start, touches


@triton.jit
def corner_channels(corner: tl.constexpr, first_channel, footprint, row_length, is_channel):
    """Of a corner of each query: the pointers to its channels, which of them exist, and whether the pixel does.

    first_channel: pointers to the channels of the first row.
    """
    left, top, _, _, height, width, start, _ = footprint
    inside = is_corner_inside(corner, left, top, height, width)
    last = first_channel[None, :] + (last_corner(left, top, width, start) * row_length)[:, None]
    return last + rows_to_corner(corner, width) * row_length, inside[:, None] & is_channel[None, :], inside


@triton.jit
def interpolate(first_channel, footprint, row_length, is_channel, wide: tl.constexpr):
    """A sample of each query, a tile: the average of its four pixels."""
    _, _, right, down, _, _, _, _ = footprint
    sample = tl.zeros([right.shape[0], is_channel.shape[0]], dtype=wide)
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, first_channel, footprint, row_length, is_channel)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(place, mask=is_read, other=0).to(wide)
        sample += (along_x * along_y)[:, None] * pixel
    return sample


@triton.jit
def differentiate(first_channel, toward, footprint, row_length, is_channel):
    """Of a sample of each query: what the output's gradient has in common with the average of the four pixels, and with
    its slopes along x and along y."""
    _, _, right, down, height, width, _, _ = footprint
    average = tl.zeros([toward.shape[0]], dtype=toward.dtype)
    slope_x = average
    slope_y = average
    for corner in tl.static_range(4):
        place, is_read, inside = corner_channels(corner, first_channel, footprint, row_length, is_channel)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(place, mask=is_read, other=0).to(toward.dtype)
        product = tl.where(inside, tl.sum(pixel * toward, axis=1), 0)
        sign_x, sign_y = corner_signs(corner)
        average += along_x * along_y * product
        slope_x += sign_x * along_y * product
        slope_y += sign_y * along_x * product
    return average, slope_x * width, slope_y * height


@triton.jit
def add_to_corners(first_channel, added, footprint, row_length, is_channel):
    """Add a tile to the four corners' rows, times what each weighs."""
    _, _, right, down, _, _, _, _ = footprint
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, first_channel, footprint, row_length, is_channel)
        along_x, along_y = corner_weights(corner, right, down)
        tl.atomic_add(place, added * (along_x * along_y)[:, None], mask=is_read, sem="relaxed")


def unrolled(num_points: int) -> int:
    """How many points the forward takes in a turn of its loop: their loads are on their way at the same time."""
    return math.gcd(int(num_points), MOST_UNROLLED)


def tile(channels: int, element_bytes: int) -> tuple[int, int, int]:
    """Queries and channels of a program's tile, and its warps: a single one, which waits for nobody, if heads let it.

    element_bytes: of what is read, or added to.
    """
    block_d, elements = padded(channels), WARP_BYTES // element_bytes
    return max(elements // block_d, 1), block_d, warps(block_d, elements // 32)
