"""The simple feature pyramid: its levels by formula, and the ViT before it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reimplementation.models.backbones.vit import ViTConfig, ViTFeatureMap
from reimplementation.models.necks.simple_pyramid import SimpleFeaturePyramid


def doubled(x, layer):
    """A transposed convolution of 2 x 2 and stride 2: each pixel becomes four."""
    blocks = torch.einsum("bcij,cduv->bdiujv", x, layer.weight)
    return blocks.flatten(4).flatten(2, 3) + layer.bias[:, None, None]


def normed(x, layer):
    centred = x - x.mean(1, keepdim=True)
    scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return scaled * layer.weight[:, None, None] + layer.bias[:, None, None]


def resampled(x, scale, layers):
    if scale == 4:
        return doubled(F.gelu(normed(doubled(x, layers[0]), layers[1])), layers[3])
    if scale == 2:
        return doubled(x, layers[0])
    if scale == 0.5:
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).amax((3, 5))
    return x


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    module = SimpleFeaturePyramid(16, 8).double()
    for parameter in module.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter)
    return module


def test_formula(pyramid):
    x = torch.randn(2, 16, 6, 10, dtype=torch.float64)
    found = pyramid(x)
    assert [tuple(level.shape) for level in found] == [(2, 8, 24, 40), (2, 8, 12, 20), (2, 8, 6, 10), (2, 8, 3, 5)]
    for scale, level, layers in zip((4, 2, 1, 0.5), found, pyramid.levels):
        expected = resampled(x, scale, layers)
        pointwise, norm, convolution, last_norm = layers[-4:]
        assert pointwise.bias is None and convolution.bias is None
        expected = normed(torch.einsum("bchw,dc->bdhw", expected, pointwise.weight[..., 0, 0]), norm)
        expected = normed(F.conv2d(expected, convolution.weight, padding=1), last_norm)
        torch.testing.assert_close(level, expected)


def test_a_list_of_one_map(pyramid):
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    assert all(torch.equal(*levels) for levels in zip(pyramid([x]), pyramid(x)))
    with pytest.raises(ValueError, match="the pyramid is made from one map; got 2"):
        pyramid([x, x])


def test_a_vit_yields_the_four_levels_of_the_aggregation():
    config = ViTConfig(3, (16, 16), (64, 96), 1, 16, 16, 2, num_register_tokens=2, dtype=torch.float32)
    backbone = ViTFeatureMap(config)
    pyramid = SimpleFeaturePyramid(*backbone.out_channels, out_channels=8)
    levels = pyramid(backbone(torch.randn(6, 3, 64, 96)))
    strides = [backbone.strides[0] / scale for scale in pyramid.scale_factors]
    assert strides == [4, 8, 16, 32]
    assert [tuple(level.shape[2:]) for level in levels] == [(int(64 / s), int(96 / s)) for s in strides]
    sum(level.square().mean() for level in levels).backward()
    assert backbone.vit.stem.patch.weight.grad.abs().sum() > 0


def test_the_feature_map_is_the_grid():
    backbone = ViTFeatureMap(ViTConfig(3, (8, 8), (16, 24), 1, 16, 16, 2, num_cls_tokens=1, dtype=torch.float32)).eval()
    images = torch.randn(2, 3, 16, 24)
    (found,) = backbone(images)
    assert torch.equal(found.flatten(2).mT, backbone.vit(images).visual_tokens) and found.shape == (2, 16, 2, 3)


def test_patches_are_square():
    with pytest.raises(ValueError, match=r"a feature map needs square patches; got patch_size \[8, 16\]"):
        ViTFeatureMap(ViTConfig(3, (8, 16), (64, 96), 1, 16, 16, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SimpleFeaturePyramid(16, scale_factors=(4, 3)), r"of 4, 2, 1 and 0.5; got \[3\]"),
        (lambda: SimpleFeaturePyramid(18), "in_channels must be a multiple of 4, the largest scale; got 18"),
        (lambda: SimpleFeaturePyramid(16)(torch.zeros(1, 8, 4, 4)), r"must be \(N, 16, H, W\); got \(1, 8, 4, 4\)"),
        (lambda: SimpleFeaturePyramid(16)(torch.zeros(1, 16, 5, 4)), r"an even height and width; got \(5, 4\)"),
    ],
)
def test_what_does_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()
