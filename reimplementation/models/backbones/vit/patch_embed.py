"""From an image or a volume to tokens: a convolution whose stride is its kernel, and positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .config import ViTConfig
from .initialization import init_layers
from .pos_enc import FourierPositions, LearnedPositions


class PatchEmbed(nn.Module):
    """Embed each patch as a token, row by row, and add its position where the encoding is one that is added.

    Args:
        config: of the model; patches of two axes are those of images, of three those of volumes.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, config: ViTConfig, **factory: Any):
        super().__init__()
        self.in_channels = config.in_channels
        self.patch_size = tuple(config.patch_size)
        convolution: type[Any] = nn.Conv2d if len(self.patch_size) == 2 else nn.Conv3d
        self.patch = convolution(
            config.in_channels, config.hidden_size, self.patch_size, stride=self.patch_size, **factory
        )
        init_layers(self.patch)
        self.pos_enc = _added_positions(config, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Embed.

        Args:
            x: (B, C_in, H, W), or (B, C_in, D, H, W) for patches of three axes; floating point, cast to the weights'
                dtype. Sides are multiples of the patch.

        Returns:
            (B, L, C) for L patches.

        Raises:
            ValueError: the shape does not fit.
            TypeError: the input is of integers: whether 255 means white is for the caller to say.
        """
        axes = len(self.patch_size)
        if x.dim() != axes + 2 or x.shape[1] != self.in_channels:
            names = "(B, C, H, W)" if axes == 2 else "(B, C, D, H, W)"
            raise ValueError(f"the input must be {names} with C={self.in_channels}; got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"the input must be floating point; got {x.dtype}: convert and normalise it first")
        size = self.tokenized_size(x.shape[2:])
        dtype = self.patch.weight.dtype  # that of all tokens between the layers, under autocast too
        tokens = self.patch(x.to(dtype)).to(dtype).flatten(2).transpose(1, 2)
        return tokens if self.pos_enc is None else tokens + self.pos_enc(size)

    def tokenized_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Patches along each axis of an input of that size; ValueError where a side is no multiple of the patch."""
        for side, patch in zip(size, self.patch_size):
            if side % patch or side < patch:
                raise ValueError(
                    f"each side of the input must be a multiple of its patch, {self.patch_size}; got {tuple(size)}: "
                    "pad, crop or resize it"
                )
        return tuple(side // patch for side, patch in zip(size, self.patch_size))

    def original_size(self, tokenized_size: Sequence[int]) -> tuple[int, ...]:
        """Pixels along each axis of a grid of patches."""
        return tuple(count * patch for count, patch in zip(tokenized_size, self.patch_size))


def _added_positions(config: ViTConfig, **factory: Any) -> FourierPositions | LearnedPositions | None:
    if config.pos_enc == "fourier":
        return FourierPositions(config.hidden_size, len(config.patch_size), **factory)
    if config.pos_enc == "learnable":
        return LearnedPositions(config.hidden_size, config.tokenized_size, config.hidden_dropout, **factory)
    return None
