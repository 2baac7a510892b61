"""What the kernels of attention share: what a program owns, and the tiles of its samples.

A program owns one head of a block of neighbouring queries, and takes one sample of every query at a time, in a tile

    queries x parts x channels of a part         8 x 2 x 16 in Deformable DETR's forward

so that a lane reads neighbouring channels in vectors, and neighbouring queries, whose samples in an encoder are
neighbouring pixels, find each other's rows in the L1 cache. In the forward a head's channels are in two parts, of which
a lane has the same place in each: for what it computes about a sample it reads two vectors. Programs of all heads of a
block follow one another: together they read and write whole rows.
"""

import triton
import triton.language as tl

from .footprint import (
    corner_signs,
    corner_weights,
    first_corner,
    first_pixel,
    is_corner_inside,
    padded,
    rows_to_corner,
    warps,
)

SIZES = ["num_rows", "num_queries", "num_heads", "num_levels", "num_points"]
"""Arguments for whose values Triton must not compile anew, as it would for 1 and for multiples of 16."""
TOUCHES = tl.constexpr(7)  # the place in a footprint of whether it touches its level
TILE_BYTES = 1024  # of a warp, which has nobody to wait for: two vectors of 16 bytes for each lane


@triton.jit
def place_of_program(num_queries, num_heads, BLOCK_Q: tl.constexpr):
    """What a program owns: the batch element, the head, and the queries, of which the last block may have too many."""
    block = tl.program_id(0) // num_heads
    num_blocks = tl.cdiv(num_queries, BLOCK_Q)
    query = block % num_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return (block // num_blocks).to(tl.int64), tl.program_id(0) % num_heads, query


@triton.jit
def channels_of_head(CHANNELS: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels of each part, and which of them exist."""
    channel = tl.arange(0, PARTS)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    return channel, channel < CHANNELS


@triton.jit
def footprint_of(x, y, height, width, start, exists):
    """Of a location of each query in a level, a tuple: the pixel before it, left and top; how far behind that it lies,
    right and down; the level; and whether a footprint there touches it, which NaN's do not."""
    x = x * width - 0.5
    y = y * height - 0.5
    bottom = tl.where(height > 0, height, -1)  # nothing touches an empty level
    touches = exists & (x > -1) & (x < width) & (y > -1) & (y < bottom)
    left, right = first_pixel(tl.where(touches, x, 0))
    top, down = first_pixel(tl.where(touches, y, 0))
    return left, top, right, down, height, width, start, touches


@triton.jit
def corner_channels(corner: tl.constexpr, footprint, row_length, channel, is_channel):
    """Of a corner of each query: where its channels lie behind the first row, which of them exist, and the pixel."""
    left, top, _, _, height, width, start, touches = footprint
    inside = is_corner_inside(corner, left, top, height, width) & touches
    first = first_corner(left, top, width, start)[:, None, None] * row_length + channel[None, :, :]
    place = first + rows_to_corner(corner, width) * row_length
    return place, inside[:, None, None] & is_channel[None, :, :], inside


@triton.jit
def interpolate(first_row, footprint, row_length, channel, is_channel, wide: tl.constexpr):
    """A sample of each query, a tile: the average of its four pixels."""
    _, _, right, down, _, _, _, _ = footprint
    sample = tl.zeros([right.shape[0], channel.shape[0], channel.shape[1]], dtype=wide)
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, footprint, row_length, channel, is_channel)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(first_row + place, mask=is_read, other=0).to(wide)
        sample += (along_x * along_y)[:, None, None] * pixel
    return sample


@triton.jit
def differentiate(first_row, toward, footprint, row_length, channel, is_channel):
    """Of a sample of each query: what the output's gradient has in common with the average of the four pixels, and with
    its slopes along x and along y."""
    _, _, right, down, height, width, _, _ = footprint
    average = tl.zeros([toward.shape[0]], dtype=toward.dtype)
    slope_x = average
    slope_y = average
    for corner in tl.static_range(4):
        place, is_read, inside = corner_channels(corner, footprint, row_length, channel, is_channel)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(first_row + place, mask=is_read, other=0).to(toward.dtype)
        product = tl.where(inside, tl.sum(tl.sum(pixel * toward, axis=1), axis=1), 0)
        sign_x, sign_y = corner_signs(corner)
        average += along_x * along_y * product
        slope_x += sign_x * along_y * product
        slope_y += sign_y * along_x * product
    return average, slope_x * width, slope_y * height


@triton.jit
def add_to_corners(first_row, added, footprint, row_length, channel, is_channel):
    """Add a tile to the four corners' rows, times what each weighs."""
    _, _, right, down, _, _, _, _ = footprint
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, footprint, row_length, channel, is_channel)
        along_x, along_y = corner_weights(corner, right, down)
        tl.atomic_add(first_row + place, added * (along_x * along_y)[:, None, None], mask=is_read, sem="relaxed")


def forward_tile(channels: int, element_bytes: int) -> tuple[int, int, int, int]:
    """Parts, queries and channels of a part of a program's tile, and its warps: a single one unless heads are large."""
    block_d, tile = padded(channels), TILE_BYTES // element_bytes
    parts = 2 if block_d > 1 else 1
    return parts, max(tile // block_d, 1), block_d // parts, warps(block_d, tile // 32)


def backward_tile(channels: int) -> tuple[int, int, int, int]:
    """The same where rows are added to, in float32: whole rows a warp, and fewer queries, are faster there."""
    block_d, tile = padded(channels), TILE_BYTES // 8
    return 1, max(tile // block_d, 1), block_d, warps(block_d, tile // 32)
