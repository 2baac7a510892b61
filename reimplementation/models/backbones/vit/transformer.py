"""The transformer layers: encoder, decoder, and cross-attention alone. Every branch has its norm inside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .attention import CrossAttention, SelfAttention
from .config import ViTConfig
from .initialization import zero_layers
from .mlp import NormMLP
from .residual import LayerScale, add_branch


class TransformerLayer(nn.Module):
    """What the layers share: how they build their branches from the model's settings, and drop path.

    Each branch ends in a linear layer of zeros, so that a fresh layer is the identity.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self._drop_path_rate = config.drop_path_rate

    @property
    def drop_path_rate(self) -> float:
        """The share of samples that skip a branch now: none outside of training."""
        return self._drop_path_rate if self.training else 0.0


class EncoderLayer(TransformerLayer):
    """Self-attention, then an MLP.

    Args:
        config: of the model.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, config: ViTConfig, **factory: Any):
        super().__init__(config)
        self.self_attention = _attention(SelfAttention, config, **factory)
        self.mlp = _mlp(config, **factory)
        self.layer_scale_attn = _layer_scale(config, **factory)
        self.layer_scale_mlp = _layer_scale(config, **factory)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(B, S, C) to (B, S, C); ``rope`` as of `SelfAttention`."""

        def attend(x: Tensor, samples: Tensor | None) -> Tensor:
            return self.layer_scale_attn(self.self_attention(x, _positions(rope, samples)))

        x = add_branch(x, attend, self.drop_path_rate)
        return add_branch(x, lambda x, _: self.layer_scale_mlp(self.mlp(x)), self.drop_path_rate)


class CrossAttentionLayer(TransformerLayer):
    """Cross-attention, then an MLP.

    Args: as of `EncoderLayer`.
    """

    def __init__(self, config: ViTConfig, **factory: Any):
        super().__init__(config)
        self.cross_attention = _attention(CrossAttention, config, **factory)
        self.mlp = _mlp(config, **factory)
        self.layer_scale_cross = _layer_scale(config, **factory)
        self.layer_scale_mlp = _layer_scale(config, **factory)

    def forward(self, x: Tensor, kv: Tensor, rope_q: Tensor | None = None, rope_k: Tensor | None = None) -> Tensor:
        """(B, S, C) queries to (B, S, C); (B, T, C) keys and values and positions as of `CrossAttention`."""

        def attend(x: Tensor, samples: Tensor | None) -> Tensor:
            keys = kv if samples is None else kv[samples]
            attended = self.cross_attention(x, keys, _positions(rope_q, samples), _positions(rope_k, samples))
            return self.layer_scale_cross(attended)

        x = add_branch(x, attend, self.drop_path_rate)
        return add_branch(x, lambda x, _: self.layer_scale_mlp(self.mlp(x)), self.drop_path_rate)


class DecoderLayer(CrossAttentionLayer):
    """Self-attention of the queries, cross-attention, then an MLP.

    Args: as of `EncoderLayer`.
    """

    def __init__(self, config: ViTConfig, **factory: Any):
        super().__init__(config, **factory)
        self.self_attention = _attention(SelfAttention, config, **factory)
        self.layer_scale_attn = _layer_scale(config, **factory)

    def forward(self, x: Tensor, kv: Tensor, rope_q: Tensor | None = None, rope_k: Tensor | None = None) -> Tensor:
        """As of `CrossAttentionLayer`; ``rope_q`` serves the self-attention too."""

        def attend(x: Tensor, samples: Tensor | None) -> Tensor:
            return self.layer_scale_attn(self.self_attention(x, _positions(rope_q, samples)))

        return super().forward(add_branch(x, attend, self.drop_path_rate), kv, rope_q, rope_k)


def _attention(kind: type, config: ViTConfig, **factory: Any) -> Any:
    attention = kind(
        config.hidden_size,
        config.num_attention_heads,
        config.attention_dropout,
        config.hidden_dropout,
        config.attention_bias,
        config.norm_type,
        config.qk_normalization,
        **factory,
    )
    zero_layers(attention.out_proj)
    return attention


def _mlp(config: ViTConfig, **factory: Any) -> NormMLP:
    mlp = NormMLP(
        config.hidden_size,
        config.ffn_hidden_size,
        config.activation,
        config.hidden_dropout,
        config.mlp_bias,
        config.norm_type,
        config.glu_limit,
        config.glu_extra_bias,
        **factory,
    )
    zero_layers(mlp.fc2)
    return mlp


def _layer_scale(config: ViTConfig, **factory: Any) -> nn.Module:
    if config.layer_scale is None:
        return nn.Identity()
    return LayerScale(config.hidden_size, config.layer_scale, **factory)


def _positions(rope: Tensor | None, samples: Tensor | None) -> Tensor | None:
    """The positions of some samples: all share (2, L, d), each has its own in (2, B, L, d)."""
    return rope if rope is None or samples is None or rope.dim() == 3 else rope[:, samples]
