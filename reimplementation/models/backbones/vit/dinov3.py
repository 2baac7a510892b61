"""DINOv3's ViTs (arXiv 2508.10104): their settings, and their weights under our names.

The files are `dinov3_<model>_pretrain_*.pth`, as github.com/facebookresearch/dinov3 publishes them:

    config = dinov3_config("vits16", img_size=(256, 704))
    model = config.instantiate()
    model.load_state_dict(from_dinov3(torch.load(path, weights_only=True), config))

What has another name:

    DINOv3                                  here
    cls_token                               cls_tokens
    storage_tokens                          register_tokens
    patch_embed.proj                        stem.patch
    rope_embed.periods                      rope.periods
    blocks.N.norm1, .norm2                  blocks.N.self_attention.norm, blocks.N.mlp.norm
    blocks.N.attn.qkv, .attn.proj           blocks.N.self_attention.qkv_proj, .out_proj
    blocks.N.attn.qkv.bias_mask             multiplied into qkv_proj.bias: keys have none
    blocks.N.ls1.gamma, .ls2.gamma          blocks.N.layer_scale_attn.gamma, blocks.N.layer_scale_mlp.gamma
    blocks.N.mlp.fc1, .fc2                  the same
    blocks.N.mlp.w2 and .w1, .w3 (SwiGLU)   blocks.N.mlp.fc1: the linear half, then the gate; .fc2
    norm                                    output_norm

`mask_token` and `local_cls_norm` serve their training alone and are left out. The qkv layers of the 7B model have no
bias; here it is zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import ViTConfig

MODELS = {  # depth, hidden size, heads, channels between the MLP's layers, activation
    "vits16": (12, 384, 6, 1536, "gelu"),
    "vits16plus": (12, 384, 6, 1536, "swiglu"),
    "vitb16": (12, 768, 12, 3072, "gelu"),
    "vitl16": (24, 1024, 16, 4096, "gelu"),
    "vitl16plus": (24, 1024, 16, 4096, "swiglu"),
    "vith16plus": (32, 1280, 20, 5120, "swiglu"),
    "vit7b16": (40, 4096, 32, 8192, "swiglu"),
}
NAMES = (  # in this order: what a name begins with or has in it, and what it becomes
    (r"^cls_token$", "cls_tokens"),
    (r"^storage_tokens$", "register_tokens"),
    (r"^patch_embed\.proj\.", "stem.patch."),
    (r"^rope_embed\.", "rope."),
    (r"^norm\.", "output_norm."),
    (r"\.norm1\.", ".self_attention.norm."),
    (r"\.norm2\.", ".mlp.norm."),
    (r"\.attn\.qkv\.", ".self_attention.qkv_proj."),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.ls1\.", ".layer_scale_attn."),
    (r"\.ls2\.", ".layer_scale_mlp."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
TRAINING_ONLY = re.compile(r"^(mask_token$|local_cls_norm\.)")
BIAS_MASK = ".bias_mask"


def dinov3_config(name: str, img_size: Sequence[int] = (224, 224), **changes: Any) -> ViTConfig:
    """The settings of a published model, in float32.

    Args:
        name: vits16, vits16plus, vitb16, vitl16, vitl16plus, vith16plus or vit7b16.
        img_size: of the usual input.
        changes: of further fields of `ViTConfig`.

    Raises:
        ValueError: there is no such model.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}; got {name!r}")
    depth, hidden_size, num_heads, ffn_hidden_size, activation = MODELS[name]
    settings = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "activation": activation,
        "num_register_tokens": 4,
        "num_cls_tokens": 1,
        "layer_scale": 1e-5,
        "rope_rescale_coords": 2.0,
        "dtype": torch.float32,
        "norm_type": "layernorm",
    }
    return ViTConfig(3, (16, 16), img_size, depth, hidden_size, ffn_hidden_size, num_heads, **{**settings, **changes})


def is_dinov3(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether these are DINOv3's names."""
    return "patch_embed.proj.weight" in state_dict and "cls_token" in state_dict


def from_dinov3(state_dict: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """A state dict for `ViT`, without its heads, from DINOv3's.

    Args:
        state_dict: with DINOv3's names. It stays as it is.
        config: of the model that will load it; see `dinov3_config`.

    Raises:
        ValueError: the model normalises its cls tokens by a norm of their own, which ours has not.
    """
    if any(name.startswith("cls_norm.") for name in state_dict):
        raise ValueError("these weights have a norm of their own for cls tokens (cls_norm), which ViT has not")
    masks = {name: mask for name, mask in state_dict.items() if name.endswith(BIAS_MASK)}
    renamed = {
        _renamed(name): tensor
        for name, tensor in state_dict.items()
        if name not in masks and not TRAINING_ONLY.match(name)
    }
    for name, mask in masks.items():
        bias = _renamed(name.removesuffix("_mask"))
        renamed[bias] = renamed[bias] * mask
    return _with_missing_biases(_with_joined_gates(renamed), config)


def _renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _with_joined_gates(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """SwiGLU's two first layers as one: the linear half (w2), then the gate (w1)."""
    joined = {}
    for name, tensor in state_dict.items():
        if ".mlp.w1." in name:
            linear = state_dict[name.replace(".w1.", ".w2.")]
            joined[name.replace(".w1.", ".fc1.")] = torch.cat([linear, tensor])
        elif ".mlp.w2." not in name:
            joined[name] = tensor
    return joined


def _with_missing_biases(state_dict: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    if not config.attention_bias:
        return state_dict
    zeros = {
        name.replace(".weight", ".bias"): tensor.new_zeros(tensor.shape[0])
        for name, tensor in state_dict.items()
        if name.endswith(".qkv_proj.weight")
    }
    return {**zeros, **state_dict}
