"""Masks of tokens: which patches a model sees. True keeps a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def create_mask(
    size: Sequence[int],
    unmasked_ratio: float,
    batch_size: int = 1,
    scale: int = 1,
    roll: bool = False,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw which tokens to keep: for each sample others, and for all samples equally many.

    Args:
        size: of the grid of L tokens.
        unmasked_ratio: the share to keep, in (0, 1); exactly ``round(L * unmasked_ratio)`` tokens are kept.
        batch_size: B.
        scale: tokens are kept and left out in blocks of this side. One block of a sample may be cut, to keep the number
            exact.
        roll: shift the blocks of half of the samples by ``scale // 2`` along every axis, around the edges, so that the
            blocks' borders are not always the same.
        device: of the mask.
        generator: of that device; None: the device's own.

    Returns:
        (B, L) bool, True where a token is kept.

    Raises:
        ValueError: a number is out of its range, or a side of the grid is not larger than ``scale``.
    """
    if not 0 < unmasked_ratio < 1:
        raise ValueError(f"unmasked_ratio must be between 0 and 1, both excluded; got {unmasked_ratio}")
    if scale < 1 or (scale > 1 and min(size) <= scale):
        raise ValueError(f"scale must be at least 1 and smaller than every side of the grid {tuple(size)}; got {scale}")
    blocks = [-(-side // scale) for side in size]
    options: dict[str, Any] = {"device": device, "generator": generator}
    # Each block has a rank, and tokens within a block a fraction on top: the first tokens in this order are kept.
    ranks = torch.rand(batch_size, math.prod(blocks), **options).argsort(-1).unflatten(-1, blocks)
    for axis, side in enumerate(size, start=1):
        ranks = ranks.repeat_interleave(scale, axis).narrow(axis, 0, side)
    if roll:
        axes = tuple(range(1, len(size) + 1))
        ranks[::2] = ranks[::2].roll((scale // 2,) * len(size), axes)
    order = ranks.flatten(1) + torch.rand(batch_size, math.prod(size), **options)
    return _smallest(order, round(math.prod(size) * unmasked_ratio))


def generate_non_overlapping_mask(
    mask: Tensor, unmasked_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Draw a second mask of tokens that the first does not keep.

    Args:
        mask: (B, L) bool.
        unmasked_ratio: the share of all L tokens to keep, in (0, 1); exactly ``int(L * unmasked_ratio)`` are kept.
        generator: of the mask's device; None: the device's own.

    Returns:
        (B, L) bool.

    Raises:
        ValueError: a sample has too few tokens left, or the ratio is out of its range.
    """
    _check_mask(mask)
    if not 0 < unmasked_ratio < 1:
        raise ValueError(f"unmasked_ratio must be between 0 and 1, both excluded; got {unmasked_ratio}")
    wanted, left = int(mask.shape[1] * unmasked_ratio), int((~mask).sum(1).min())
    if wanted > left:
        raise ValueError(f"unmasked_ratio={unmasked_ratio} asks for {wanted} tokens, but the mask leaves only {left}")
    order = torch.rand(mask.shape, device=mask.device, generator=generator) + mask
    return _smallest(order, wanted)


def apply_mask(mask: Tensor, x: Tensor, fill_value: float | Tensor | None = None, padding_value: float = 0) -> Tensor:
    """The tokens that a mask keeps.

    Args:
        mask: (B, L) bool.
        x: (B, L, C).
        fill_value: keep every token's place, and put this where one is left out: a number, or a tensor that broadcasts
            to ``x``.
        padding_value: where samples keep different numbers of tokens, this fills the shorter ones at their end.

    Returns:
        (B, L, C) with a ``fill_value``; else (B, n, C), n the largest number of tokens that a sample keeps, which waits
        for a GPU.

    Raises:
        ValueError: the shapes do not fit, or the mask is not bool.
    """
    _check_mask(mask)
    if x.shape[:2] != mask.shape:
        raise ValueError(f"x must be (B, L, C) for a mask (B, L)={tuple(mask.shape)}; got {tuple(x.shape)}")
    if fill_value is not None:
        return torch.where(mask[..., None], x, torch.as_tensor(fill_value, device=x.device, dtype=x.dtype))
    counts = mask.sum(1)
    # A stable sort brings the kept tokens to the front in their order.
    kept = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(counts.max())]
    tokens = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2]))
    is_padding = torch.arange(kept.shape[1], device=x.device) >= counts[:, None]
    return tokens.masked_fill(is_padding[..., None], padding_value)


def unapply_mask(mask: Tensor, x: Tensor, fill_value: float = 0) -> Tensor:
    """Put tokens back in their places: the inverse of `apply_mask`.

    Args:
        mask: (B, L) bool.
        x: (B, n, C), n the largest number of tokens that a sample keeps.
        fill_value: for the places left out.

    Returns:
        (B, L, C).

    Raises:
        ValueError: the shapes do not fit, or the mask is not bool.
    """
    _check_mask(mask)
    longest = int(mask.sum(1).max())
    if x.dim() != 3 or x.shape[:2] != (mask.shape[0], longest):
        raise ValueError(f"x must be (B, n, C) with B={mask.shape[0]}, n={longest}; got {tuple(x.shape)}")
    places = mask.cumsum(1).sub(1).clamp(min=0)
    padded = F.pad(x, (0, 0, 0, 1))  # a row to read where no sample keeps a token
    tokens = padded.gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    return tokens.masked_fill(~mask[..., None], fill_value)


def _smallest(order: Tensor, count: int) -> Tensor:
    """(B, L) bool: True at the smallest entries of each row, exactly ``count`` of them even where entries are equal."""
    kept = order.argsort(1)[:, :count]
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, kept, True)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"mask must be (B, L) of bool; got {tuple(mask.shape)} of {mask.dtype}")
