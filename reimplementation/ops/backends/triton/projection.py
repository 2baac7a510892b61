"""Key points seen by cameras in Triton.

A *camera* is a tuple here: the first three rows of its matrix, row by row, and its image's width and height. Its matrix
takes (x, y, z, 1) to (u * depth, v * depth, depth, 1). Points and cameras are numbers or tensors, of any shapes that
broadcast.
"""

import triton
import triton.language as tl

from ...project_points import MIN_DEPTH
from .footprint import divide

LEAST = tl.constexpr(MIN_DEPTH)


@triton.jit
def load_camera(projection, image_wh, number, exists, HAS_SIZES: tl.constexpr):
    """The cameras of such numbers. What says where something is stored or added loads its camera itself: footprint.py
    says why."""
    matrix = projection + 16 * number
    width = tl.load(matrix, mask=exists, other=0) * 0 + 1
    height = width
    if HAS_SIZES:
        width = tl.load(image_wh + 2 * number, mask=exists, other=1)
        height = tl.load(image_wh + 2 * number + 1, mask=exists, other=1)
    return (
        tl.load(matrix, mask=exists, other=0),
        tl.load(matrix + 1, mask=exists, other=0),
        tl.load(matrix + 2, mask=exists, other=0),
        tl.load(matrix + 3, mask=exists, other=0),
        tl.load(matrix + 4, mask=exists, other=0),
        tl.load(matrix + 5, mask=exists, other=0),
        tl.load(matrix + 6, mask=exists, other=0),
        tl.load(matrix + 7, mask=exists, other=0),
        tl.load(matrix + 8, mask=exists, other=0),
        tl.load(matrix + 9, mask=exists, other=0),
        tl.load(matrix + 10, mask=exists, other=0),
        tl.load(matrix + 11, mask=exists, other=0),
        width,
        height,
    )


@triton.jit
def locate(x, y, z, camera):
    """Of points in cameras: x, y in units of the image's size, and the depth."""
    depth = camera[11] + camera[8] * x + camera[9] * y + camera[10] * z
    extent = tl.where(depth < LEAST, LEAST, depth)  # NaN stays NaN
    across = divide(camera[3] + camera[0] * x + camera[1] * y + camera[2] * z, extent * camera[12])
    down = divide(camera[7] + camera[4] * x + camera[5] * y + camera[6] * z, extent * camera[13])
    return across, down, depth


@triton.jit
def is_clear(x, y, depth):
    """Whether a camera sees what it locates there."""
    return (depth > LEAST) & (x > 0) & (x < 1) & (y > 0) & (y < 1)


@triton.jit
def point_gradient(of_x, of_y, x, y, depth, camera):
    """What points get from their locations in cameras, which are x and y: three numbers. A depth below the least one
    gets nothing, and where a location has no gradient, its slopes may be none."""
    extent = tl.where(depth < LEAST, LEAST, depth)
    counts = (of_x != 0) | (of_y != 0)
    across = tl.where(counts, of_x / (extent * camera[12]), 0)
    down = tl.where(counts, of_y / (extent * camera[13]), 0)
    deep = tl.where(counts & (depth >= LEAST), -(of_x * x + of_y * y) / extent, 0)
    return (
        camera[0] * across + camera[4] * down + camera[8] * deep,
        camera[1] * across + camera[5] * down + camera[9] * deep,
        camera[2] * across + camera[6] * down + camera[10] * deep,
    )
