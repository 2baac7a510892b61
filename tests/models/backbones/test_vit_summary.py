"""Parameters counted for every option, against formulas and against the built model."""

from __future__ import annotations

import math

import pytest

from reimplementation.models.backbones.vit import (
    AttentivePoolHeadConfig,
    HeadConfig,
    TransposedConv2dHeadConfig,
    UpsampleHeadConfig,
    ViTConfig,
)
from reimplementation.models.backbones.vit.activations import is_glu
from reimplementation.models.backbones.vit.summary import count_parameters, summarize

from . import vit_formulas as formulas

OPTIONS = [
    {},
    {"depth": 3},
    {"activation": "swiglu"},
    {"activation": "openswiglu", "mlp_bias": False},
    {"attention_bias": False, "mlp_bias": False},
    {"norm_type": "layernorm", "qk_normalization": True, "patch_embed_normalization": True},
    {"qk_normalization": True, "layer_scale": 0.1},
    {"num_cls_tokens": 2, "num_register_tokens": 3},
    {"pos_enc": "fourier"},
    {"pos_enc": "learnable"},
    {"pos_enc": "none", "in_channels": 5},
    {"patch_size": (2, 4, 8), "img_size": (4, 8, 16), "pos_enc": "fourier", "in_channels": 1},
    {"patch_size": (2, 4, 8), "img_size": (4, 8, 16), "pos_enc": "learnable"},
    {"mlp_requires_grad": False},
]


def expected_counts(config: ViTConfig) -> dict[str, int]:
    channels, ffn = config.hidden_size, config.ffn_hidden_size
    norm = 2 if config.norm_type == "layernorm" else 1  # weights, and perhaps biases, of a channel
    attention = 4 * channels**2 + 4 * channels * config.attention_bias + norm * channels
    attention += 2 * norm * config.head_dim * config.qk_normalization
    width = ffn * (2 if is_glu(config.activation) else 1)
    mlp = channels * width + ffn * channels + (width + channels) * config.mlp_bias + norm * channels
    layer = attention + mlp + 2 * channels * (config.layer_scale is not None)
    positions = {
        "fourier": len(config.patch_size) * channels // 2 + channels**2 + channels,
        "learnable": math.prod(config.tokenized_size) * channels,
    }
    frozen = mlp * config.depth * (not config.mlp_requires_grad)
    counts = {
        "patch_embedding": config.in_channels * math.prod(config.patch_size) * channels + channels,
        "position_encoding": positions.get(config.pos_enc, 0),
        "prefix_tokens": (config.num_cls_tokens + config.num_register_tokens) * channels,
        "transformer": layer * config.depth,
        "norms": norm * channels * (1 + config.patch_embed_normalization),
        "heads": 0,
    }
    total = sum(counts.values())
    return {**counts, "total": total, "per_layer": layer, "trainable": total - frozen, "each_head": {}}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_formula(options):
    config = formulas.config(**options)
    assert count_parameters(config) == expected_counts(config)
    assert sum(p.numel() for p in config.instantiate().parameters()) == count_parameters(config)["total"]


def test_heads():
    heads = {
        "a": HeadConfig(out_features=10),
        "b": AttentivePoolHeadConfig(out_features=10, num_queries=2),
        "c": TransposedConv2dHeadConfig(out_features=5, groups=1),
        "d": UpsampleHeadConfig(out_features=3, num_upsample_stages=2, hidden_features=8, num_smooth_layers=1),
    }
    counts = count_parameters(formulas.config(heads=heads))
    assert counts["each_head"] == {
        "a": 64 * 10 + 10,
        "b": 2 * 64 + 64 + 4 * 64**2 + 4 * 64 + 64 * 10 + 10,
        "c": 64 * 5 * 16 + 5,
        "d": (64 * 8 * 4 + 8) + (8 * 8 * 9 + 8) + (8 * 3 * 4 + 3) + (3 * 3 * 9 + 3),
    }
    assert counts["heads"] == sum(counts["each_head"].values())
    assert counts["total"] == expected_counts(formulas.config())["total"] + counts["heads"]


def test_the_tokens_and_bytes():
    summary = summarize(formulas.config(num_cls_tokens=1))
    assert summary["sequence"]["num_patches"] == 96 and summary["sequence"]["sequence_length"] == 97
    assert summary["memory"]["weight_bytes"] == 8 * summary["parameters"]["total"]
