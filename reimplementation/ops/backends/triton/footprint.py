"""What the kernels of both ops share: levels that stay within their rows, and the four pixels of a sample.

A footprint's corners are numbered 0 to 3: top left, top right, bottom left, bottom right. Triton unrolls the loop over
them, so that whether a corner lies below or to the right is known when a kernel is compiled.

What addresses follow from, kernels load themselves and hand to such functions as a number. A compiler of PyTorch looks
for what a kernel overwrites by going back from its stores, through calls of functions to all of their arguments: it
would take the locations for overwritten, if the function that reads them told where gradients are added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS_OF_A_THREAD = 8  # of a tile: two loads of 16 bytes a corner in float32, one in half precision
MOST_WARPS = 16
MOST_ELEMENTS = 2**20  # of a tile: Triton has no larger tensors
MOST_ROWS = tl.constexpr(2**31 - 1)  # rows are numbered in int32


@triton.jit
def bounded_level(height, width, start, num_rows):
    """Height, width and first row of a level, or of a vector of levels; all zero where it is empty or does not fit.

    As unsigned numbers, negative ones are the largest. Where no number is larger than any number of rows may be, the
    product of the sides fits into 64 bits, and bounds both of them.
    """
    none_is_larger = (height | width | start).to(tl.uint64) <= MOST_ROWS
    rows = height.to(tl.uint32).to(tl.uint64) * width.to(tl.uint32).to(tl.uint64)
    fits = none_is_larger & (rows > 0) & (rows + start.to(tl.uint64) <= tl.cast(num_rows, tl.uint64))
    return (
        tl.where(fits, height.to(tl.int32), 0),
        tl.where(fits, width.to(tl.int32), 0),
        tl.where(fits, start.to(tl.int32), 0),
    )


@triton.jit
def divide(dividend, divisor):
    """The quotient, rounded once: Triton's own division of float32 may be off by two units in the last place."""
    if dividend.dtype == tl.float32:
        return tl.div_rn(dividend, divisor.to(tl.float32))
    return dividend / divisor


@triton.jit
def first_pixel(position):
    """The pixel before a position on an axis, and how far behind it the position lies, in [0, 1).

    The position is a number below 2^31, as all are that touch a level.
    """
    low = tl.floor(position)
    return low.to(tl.int32), position - low


@triton.jit
def is_corner_inside(corner: tl.constexpr, left, top, height, width):
    """Whether the pixel of a corner exists. As unsigned numbers, columns and lines below zero are the largest."""
    column = (left + corner % 2).to(tl.uint32)
    line = (top + corner // 2).to(tl.uint32)
    return (column < width.to(tl.uint32)) & (line < height.to(tl.uint32))


@triton.jit
def last_corner(left, top, width, start):
    """The row of corner 3, unsigned. The others are found from it: one product of a sample's own in place of four."""
    return (start + (top + 1) * width + (left + 1)).to(tl.uint32).to(tl.uint64)


@triton.jit
def rows_to_corner(corner: tl.constexpr, width):
    """How many rows a corner lies behind corner 3, none or less; where its pixel does not exist, that row must not be
    read."""
    return ((corner // 2 - 1) * width + (corner % 2 - 1)).to(tl.int64)


@triton.jit
def corner_weights(corner: tl.constexpr, right, down):
    """What a corner weighs along x and along y, from the fractions of `first_pixel`."""
    along_x = right if corner % 2 == 1 else 1 - right
    along_y = down if corner // 2 == 1 else 1 - down
    return along_x, along_y


@triton.jit
def corner_signs(corner: tl.constexpr):
    """How a corner's weight along x and along y grows with the position: 1, or -1."""
    return 2 * (corner % 2) - 1, 2 * (corner // 2) - 1


def padded(size: int) -> int:
    """The power of two that holds a size; a symbolic size becomes a number, for which alone the kernel is compiled."""
    return 1 << max(int(size) - 1, 0).bit_length()


def warps(tile: int, of_a_thread: int = ELEMENTS_OF_A_THREAD) -> int:
    """How many warps share a tile of that many elements."""
    if tile > MOST_ELEMENTS:
        raise RuntimeError(
            f"the triton kernels hold at most {MOST_ELEMENTS} numbers of one sample at a time (levels x channels, each "
            f"rounded up to a power of two); got {tile}: use_backend('grid_sample') takes such operands"
        )
    return min(max(tile // (32 * of_a_thread), 1), MOST_WARPS)


def check_rows(name: str, num_rows: int) -> None:
    if num_rows > MOST_ROWS.value:
        raise RuntimeError(f"{name} must be below 2^31 for the triton kernels; got {num_rows}")


def beside(metadata: Tensor, features: Tensor) -> Tensor:
    """Level metadata as kernels read it: contiguous, where the features are. From the CPU that is a copy."""
    return metadata.to(features.device, non_blocking=True).contiguous()


def refuse_determinism(deterministic: bool, gradient: str) -> None:
    """Atomics add up in no certain order, and there is no other way to add in Triton."""
    if deterministic:
        raise RuntimeError(
            f"the triton backend has no deterministic gradient of {gradient}, which is a sum in no certain order: "
            f"use the cuda backend, let {gradient} need none, or call "
            "torch.use_deterministic_algorithms(True, warn_only=True)"
        )


def sums_like(features: Tensor, needed: bool) -> Tensor:
    """Zeros to add up the features' gradient in: at least in float32. Without elements where it is not needed."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_zeros(features.shape if needed else (0,), dtype=dtype)


def empty_like(operand: Tensor, needed: bool) -> Tensor:
    """Memory for the gradient of an operand, contiguous; without elements where it is not needed."""
    return operand.new_empty(operand.shape if needed else (0,))


def zeros_like(operand: Tensor, needed: bool) -> Tensor:
    """The same, filled with zeros."""
    return operand.new_zeros(operand.shape if needed else (0,))


def in_layout_of(operand: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its operand's strides, as PyTorch's accumulation likes it."""
    if gradient.numel() == 0:
        return gradient
    wanted = torch.empty_like(operand)
    return gradient if wanted.stride() == gradient.stride() else wanted.copy_(gradient)
