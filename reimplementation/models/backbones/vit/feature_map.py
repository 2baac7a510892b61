"""A ViT as detectors take a backbone: images in, a list of feature maps out."""

from __future__ import annotations

from torch import Tensor, nn

from .config import ViTConfig


class ViTFeatureMap(nn.Module):
    """A `ViT` whose patches are one feature map, for `necks.simple_pyramid.SimpleFeaturePyramid`.

    Args:
        config: of the model, with patches of two equal axes.

    Attributes:
        vit: the model.
        out_channels: of each map, a list of one.
        strides: pixels of the image per pixel of each map, a list of one.

    Raises:
        ValueError: patches are not square.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        if len(config.patch_size) != 2 or len(set(config.patch_size)) != 1:
            raise ValueError(f"a feature map needs square patches; got patch_size {list(config.patch_size)}")
        self.vit = config.instantiate()
        self.out_channels = [config.hidden_size]
        self.strides = [config.patch_size[0]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, C_in, H, W) images to one map, (N, hidden_size, H / patch, W / patch)."""
        return [self.vit(images).visual_tokens_as_grid.movedim(-1, 1)]
