"""What the kernels of both aggregations share: how a query's pairs are walked through, and the tiles of their samples.

A *pair* is a point in a camera; pairs are numbered camera by camera, so that programs that run together read the same
camera's maps. A program looks at 32 pairs together, a pair a thread, and then takes those that are seen one after the
other: all levels of a pair at once, in tiles

    levels x groups x channels of a group        4 x 2 x 32 in SparseDrive's forward, 4 x 8 x 32 in its backward

so that the four loads of a footprint bring 16 KB of a query on their way in float32, lanes read neighbouring channels
in vectors, and a weight is loaded once for the channels that share it.
"""

import triton
import triton.language as tl

from .footprint import corner_signs, corner_weights, first_pixel, is_corner_inside, last_corner, rows_to_corner

SIZES = ["num_rows", "num_queries", "num_points", "num_cams", "num_levels"]
"""Arguments for whose values Triton must not compile anew, as it would for 1 and for multiples of 16."""
PAIRS = 32  # looked at together: one for each thread of a warp, so that no warp waits for another
FORWARD_TILE = 256  # elements, of one warp: it waits for no other, and there are more programs to share out


@triton.jit
def is_inside(x, y):
    """Whether a location lies in the open unit square, which NaN does not."""
    return (x > 0) & (x < 1) & (y > 0) & (y < 1)


@triton.jit
def next_number(is_wanted, number, last):
    """The smallest of the wanted numbers behind the last one; something too large where there is none."""
    return tl.min(tl.where(is_wanted & (number > last), number, 2147483647))


@triton.jit
def footprint_of(x, y, height, width, start):
    """Of a location in each level, a tuple: the pixel before it, left and top; how far behind that it lies, right and
    down; and the level."""
    left, right = first_pixel(x * width - 0.5)
    top, down = first_pixel(y * height - 0.5)
    return left, top, right, down, height, width, start


@triton.jit
def corner_channels(corner: tl.constexpr, footprint, channel, is_channel, CHANNELS: tl.constexpr):
    """Of a corner in each level: where its channels lie behind the first row, which of them exist, and the pixel."""
    left, top, _, _, height, width, start = footprint
    inside = is_corner_inside(corner, left, top, height, width)
    last = last_corner(left, top, width, start)[:, None, None] * CHANNELS + channel[None, :, :].to(tl.uint64)
    place = last + rows_to_corner(corner, width)[:, None, None] * CHANNELS
    return place, inside[:, None, None] & is_channel[None, :, :], inside


@triton.jit
def interpolate(first_row, footprint, channel, is_channel, CHANNELS: tl.constexpr, wide: tl.constexpr):
    """The samples of a pair, (levels, groups, channels of a group): the averages of the four pixels."""
    _, _, right, down, _, _, _ = footprint
    sample = tl.zeros([right.shape[0], channel.shape[0], channel.shape[1]], dtype=wide)
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, footprint, channel, is_channel, CHANNELS)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(first_row + place, mask=is_read, other=0).to(wide)
        sample += (along_x * along_y)[:, None, None] * pixel
    return sample


@triton.jit
def differentiate(first_row, toward, footprint, channel, is_channel, CHANNELS: tl.constexpr):
    """Of the samples of a pair, each (levels, groups): what the output's gradient has in common with the average of
    the four pixels, and with its slopes along x and along y."""
    _, _, right, down, height, width, _ = footprint
    average = tl.zeros([toward.shape[0], toward.shape[1]], dtype=toward.dtype)
    slope_x = average
    slope_y = average
    for corner in tl.static_range(4):
        place, is_read, inside = corner_channels(corner, footprint, channel, is_channel, CHANNELS)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(first_row + place, mask=is_read, other=0).to(toward.dtype)
        product = tl.where(inside[:, None], tl.sum(pixel * toward, axis=2), 0)
        sign_x, sign_y = corner_signs(corner)
        average += (along_x * along_y)[:, None] * product
        slope_x += (sign_x * along_y)[:, None] * product
        slope_y += (sign_y * along_x)[:, None] * product
    return average, slope_x * width[:, None], slope_y * height[:, None]


@triton.jit
def location_gradient(weight, slope_x, slope_y):
    """Of a pair, x and y: the slopes of its samples times their weights, summed over levels and groups."""
    slopes = tl.join(weight * slope_x, weight * slope_y)
    return tl.sum(tl.reshape(slopes, [weight.shape[0] * weight.shape[1], 2]), axis=0)


@triton.jit
def add_to_corners(first_row, added, footprint, channel, is_channel, CHANNELS: tl.constexpr):
    """Add a tile to the four corners' rows, times what each weighs."""
    _, _, right, down, _, _, _ = footprint
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, footprint, channel, is_channel, CHANNELS)
        along_x, along_y = corner_weights(corner, right, down)
        tl.atomic_add(first_row + place, added * (along_x * along_y)[:, None, None], mask=is_read, sem="relaxed")
