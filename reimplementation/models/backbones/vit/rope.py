"""Rotary positions on a grid of two axes, computed in float32 whatever the model's dtype is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.plain import calls_are_unseen


class RotaryPositions(nn.Module):
    """Sines and cosines that rotate queries and keys by their place in the image.

    The base form of RoPE (arXiv 2104.09864) for each axis: a head's d channels hold d / 2 pairs; half of the pairs turn
    with the row and half with the column, each of d / 4 periods long. A place is the centre of its patch in [-1, 1],
    and a pair turns once when the place advances by its period; this is DINOv3's form (arXiv 2508.10104). There are no
    weights.

    Training may move the coordinates, in this order: shift by a number for each axis; jitter, a factor for each axis;
    rescale, one factor for both. Factors are drawn so that their logarithm is uniform.

    Args:
        head_dim: d, a multiple of 4.
        base: period i is ``base ** (2 i / (d / 2))``.
        normalize_coords: what divides a place: its axis ("separate"), or the longer ("max") or shorter ("min") one.
        shift: the shift is between ``-shift`` and ``shift``; None: none.
        jitter: factors are between ``1 / jitter`` and ``jitter``.
        rescale: likewise.
        size: rows and columns of the grid that most images will have, whose angles are kept.
        device: of the periods.
    """

    periods: Tensor
    kept: Tensor | None

    def __init__(
        self,
        head_dim: int,
        base: float = 100.0,
        normalize_coords: str = "separate",
        shift: float | None = None,
        jitter: float | None = None,
        rescale: float | None = None,
        size: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim must be a multiple of 4; got {head_dim}")
        self.head_dim = head_dim
        self.base = base
        self.normalize_coords = normalize_coords
        self.shift = shift
        self.jitter = jitter
        self.rescale = rescale
        self.size = None if size is None else tuple(size)
        self.register_buffer("periods", self._periods(device))
        # A compiler would compute the angles in every layer again, where the graph has what they are made from.
        self.register_buffer("kept", self._angles_of_most(), persistent=False)

    def forward(self, size: Sequence[int], seed: int | None = None) -> Tensor:
        """Sines and cosines.

        Args:
            size: rows and columns of the grid.
            seed: makes the augmentation repeatable. Without one it draws from the device's generator.

        Returns:
            (2, rows * columns, head_dim) float32: sines, then cosines; row by row.
        """
        augments = self.training and (self.shift, self.jitter, self.rescale) != (None, None, None)
        # An exporter may leave the size open: it is then no number that one could compare.
        if self.kept is not None and not augments and all(type(n) is int for n in size) and tuple(size) == self.size:
            return self.kept
        coordinates = self._coordinates(size)
        return self._angles(self._augmented(coordinates, seed) if augments else coordinates)

    def _angles_of_most(self) -> Tensor | None:
        return None if self.size is None else self._angles(self._coordinates(self.size))

    def _angles(self, coordinates: Tensor) -> Tensor:
        """(2, L, head_dim) of (L, 2) coordinates."""
        angles = 2 * math.pi * coordinates[..., None] / self.periods  # (L, 2, d / 4)
        angles = angles.flatten(1).repeat(1, 2)
        return torch.stack([angles.sin(), angles.cos()])

    def _periods(self, device: torch.device | str | None) -> Tensor:
        exponents = torch.arange(self.head_dim // 4, device=device, dtype=torch.float32) / (self.head_dim / 4)
        return self.base**exponents

    def _coordinates(self, size: Sequence[int]) -> Tensor:
        """(L, 2): the row and column of each patch's centre in [-1, 1]."""
        choose = {"separate": None, "max": max, "min": min}[self.normalize_coords]
        lengths = list(size) if choose is None else [choose(size)] * 2
        axes = [
            (torch.arange(count, device=self.periods.device, dtype=torch.float32) + 0.5) / length
            for count, length in zip(size, lengths)
        ]
        return 2 * torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1) - 1

    def _augmented(self, coordinates: Tensor, seed: int | None) -> Tensor:
        device = coordinates.device
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        draws = 2 * torch.rand(5, device=device, generator=generator) - 1
        if self.shift is not None:
            coordinates = coordinates + draws[0:2] * self.shift
        if self.jitter is not None:
            coordinates = coordinates * (draws[2:4] * math.log(self.jitter)).exp()
        if self.rescale is not None:
            coordinates = coordinates * (draws[4] * math.log(self.rescale)).exp()
        return coordinates

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryPositions:
        """Follow the model to a device, but not to another dtype: bfloat16 cannot tell neighbouring patches apart."""
        super()._apply(fn, recurse)
        self.periods = self._periods(self.periods.device)
        self.kept = self._angles_of_most()
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Keep the exact periods: those of a file may have been rounded to bfloat16, or be of another base."""
        loaded = state_dict.get(prefix + "periods")
        if loaded is None:
            missing_keys.append(prefix + "periods")
        elif loaded.shape != self.periods.shape or not _close(loaded, self.periods):
            error_msgs.append(
                f"{prefix}periods are of another rotary encoding: expected head_dim={self.head_dim}, "
                f"base={self.base:g}; got {loaded.float().tolist()}"
            )

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base:g}, normalize_coords={self.normalize_coords}"


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn queries or keys by the angles of their places; the tokens before the patches stay as they are.

    Args:
        x: (B, heads, S, d).
        rope: (2, L, d) or (2, B, L, d) sines and cosines of the last L of the S tokens.

    Returns:
        (B, heads, S, d) in the dtype of ``x``, computed in at least float32.
    """
    rope = with_prefix(rope, x.shape[-2] - rope.shape[-2])
    sin, cos = rope if rope.dim() == 3 else rope.unsqueeze(2)
    half = x.shape[-1] // 2
    sin = sin[..., :half]  # the second half repeats them
    if not calls_are_unseen() or torch._C._are_functorch_transforms_active() or type(x) is not Tensor:
        return _formula(x, sin, cos)
    if not torch.is_grad_enabled():
        return _turned(x, sin, cos)
    return _formula(x, sin, cos) if rope.requires_grad else _Rotation.apply(x, sin, cos)


def _formula(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """What compilers, exporters and transforms see, and turn into one kernel by themselves."""
    first, second = x.chunk(2, -1)
    cos = cos[..., : first.shape[-1]]
    turned = [
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    ]
    return torch.cat(turned, -1).to(x.dtype)


def _turned(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """The same in half as many kernels: products are written where they belong, in the dtype that they are to have."""
    half = x.shape[-1] // 2
    scaled, turned = x * cos, torch.empty_like(x)
    torch.addcmul(scaled[..., :half], x[..., half:], sin, value=-1, out=turned[..., :half])
    torch.addcmul(scaled[..., half:], x[..., :half], sin, out=turned[..., half:])
    return turned


class _Rotation(torch.autograd.Function):
    """The derivative of a rotation is the rotation back, of which nothing needs to be kept but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
        ctx.save_for_backward(sin, cos)
        return _turned(x, sin, cos)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sin, cos = ctx.saved_tensors
        return _Rotation.apply(gradient, -sin, cos), None, None


def with_prefix(rope: Tensor, count: int) -> Tensor:
    """Put ``count`` tokens that no angle turns before those of (2, ..., L, d) sines and cosines."""
    if not count:
        return rope
    sin, cos = rope
    return torch.stack([F.pad(sin, (0, 0, count, 0), value=0.0), F.pad(cos, (0, 0, count, 0), value=1.0)])


def _close(loaded: Tensor, periods: Tensor) -> bool:
    if loaded.is_meta or periods.is_meta:
        return True
    return torch.allclose(loaded.to(periods), periods, rtol=torch.finfo(torch.bfloat16).eps)
