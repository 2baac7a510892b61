"""A ViT in the ResNet's place: the same pyramid, from a configuration that YAML holds."""

import dataclasses

import pytest
import torch

from reimplementation.models.backbones.vit import ViTConfig
from reimplementation.models.sparsedrive import SparseDrive, SparseDriveConfig
from tests.models.sparsedrive.small import CONFIG, HEIGHT, NUM_CAMS, WIDTH, frame, targets

VIT = ViTConfig(
    in_channels=3,
    patch_size=(16, 16),
    img_size=(HEIGHT, WIDTH),
    depth=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=2,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    dtype=torch.float32,
)
SMALL = dataclasses.replace(CONFIG, backbone=VIT)


def test_levels_are_a_resnets():
    images, _ = frame()
    shapes = [[level.shape for level in SparseDrive(c).image_features(images)] for c in (CONFIG, SMALL)]
    assert shapes[0] == shapes[1] and shapes[0][0] == (NUM_CAMS, CONFIG.embed_dims, HEIGHT // 4, WIDTH // 4)


def test_it_learns():
    pytest.importorskip("scipy")
    torch.manual_seed(0)
    model = SparseDrive(SMALL).train()
    images, metas = frame(2)
    loss = sum(model.loss(model(images, metas), targets(2)).values())
    loss.backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_images = [parameter for name, parameter in learning.items() if name.startswith("img_")]
    assert torch.isfinite(loss) and all(parameter.grad is not None for parameter in of_images)


def test_from_plain_values_and_back():
    values = SMALL.to_dict()
    assert values["backbone"]["type"] == "ViT" and SparseDriveConfig.from_dict(values) == SMALL
    assert CONFIG.to_dict()["backbone"] is None
    values["backbone"]["hidden_sise"] = 3
    with pytest.raises(ValueError, match="hidden_sise"):
        SparseDriveConfig.from_dict(values)


def test_patches_make_the_strides():
    with pytest.raises(ValueError, match=r"backbone must have patches of 16 x 16 pixels.*got \[8, 8\]"):
        dataclasses.replace(CONFIG, backbone=VIT.replace(patch_size=(8, 8)))
