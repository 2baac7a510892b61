"""A model's sizes without its weights: parameters by part, tokens, bytes."""

from __future__ import annotations

from typing import Any

from torch import nn

from reimplementation.ops.dtypes import name_of

from .config import ViTConfig

PARTS = {  # what the names of its parameters begin with
    "patch_embedding": ("stem.patch.",),
    "position_encoding": ("stem.pos_enc.", "rope."),
    "prefix_tokens": ("cls_tokens", "register_tokens"),
    "transformer": ("blocks.",),
    "norms": ("patch_embed_norm.", "output_norm."),
    "heads": ("heads.",),
}


def count_parameters(config: ViTConfig) -> dict[str, Any]:
    """The parameters of each part, exactly: the model is built on the meta device, where it takes no memory.

    Returns:
        A number for each of `PARTS`, their "total", "per_layer" of the transformer, "trainable", and those of
        "each_head" by name.
    """
    model = config.instantiate(device="meta")
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    counts: dict[str, Any] = {
        part: sum(size for name, size in sizes.items() if name.startswith(beginnings))
        for part, beginnings in PARTS.items()
    }
    counts["total"] = sum(sizes.values())
    counts["per_layer"] = _size(model.blocks[0])
    counts["trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts["each_head"] = {name: _size(head) for name, head in model.heads.items()}
    return counts


def summarize(config: ViTConfig) -> dict[str, dict[str, Any]]:
    """Sections of facts, ready for JSON: architecture, sequence, parameters, memory of the weights."""
    parameters = count_parameters(config)
    weight_bytes = parameters["total"] * config.dtype.itemsize
    return {
        "architecture": {
            "depth": config.depth,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.ffn_hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "head_dim": config.head_dim,
            "activation": config.activation,
            "norm_type": config.norm_type,
            "pos_enc": config.pos_enc,
        },
        "sequence": {
            "img_size": list(config.img_size),
            "patch_size": list(config.patch_size),
            "tokenized_size": list(config.tokenized_size),
            "num_patches": config.sequence_length - config.num_prefix_tokens,
            "num_prefix_tokens": config.num_prefix_tokens,
            "sequence_length": config.sequence_length,
        },
        "parameters": parameters,
        "memory": {
            "dtype": name_of(config.dtype),
            "weight_bytes": weight_bytes,
            "weight_megabytes": weight_bytes / 1e6,
        },
    }


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
