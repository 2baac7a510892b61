"""Self-attention, cross-attention and attentive pooling, each with its norm before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .initialization import init_layers, truncated_normal_
from .norm import make_norm
from .rope import rotate


class SelfAttention(nn.Module):
    """Norm, queries, keys and values by one linear layer, attention of each head, output projection, dropout.

    Args:
        hidden_size: C, a multiple of ``num_heads``.
        num_heads: attention heads, of d = C / num_heads channels.
        attention_dropout: of the attention weights.
        hidden_dropout: of the output.
        bias: whether the linear layers have biases.
        norm_type: see `norm.make_norm`.
        qk_normalization: normalise each head's queries and keys (arXiv 2302.05442), before they are rotated.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        bias: bool = True,
        norm_type: str = "rmsnorm",
        qk_normalization: bool = False,
        **factory: Any,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qk_normalization = qk_normalization
        self.norm = make_norm(norm_type, hidden_size, **factory)
        self.qkv_proj = nn.Linear(hidden_size, 3 * hidden_size, bias=bias, **factory)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias, **factory)
        self.q_norm, self.k_norm = _head_norms(norm_type, hidden_size // num_heads, qk_normalization, **factory)
        self.dropout = nn.Dropout(hidden_dropout)
        init_layers(self.qkv_proj, self.out_proj)

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: (B, S, C).
            rope: (2, L, d) or (2, B, L, d) from `rope.RotaryPositions`, for the last L tokens.
            attn_mask: as of `torch.nn.functional.scaled_dot_product_attention`: broadcasts to (B, num_heads, S, S);
                True, where it is bool, lets a query attend to a key.

        Returns:
            (B, S, C), without the residual.
        """
        query, key, value = self._heads(x, rope)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout)
        return self.dropout(self.out_proj(_merge(attended)))

    @torch.no_grad()
    def forward_weights(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(B, num_heads, S, S): how much each query attends to each key, without dropout and without gradients."""
        query, key, _ = self._heads(x, rope)
        return attention_weights(query, key)

    def _heads(self, x: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, num_heads, S, d) queries, keys and values. Queries and keys turn together, in half as many kernels.

        Heads are parted where they come after tokens: their gradients are then joined in the projection's own order.
        """
        heads = self.qkv_proj(self.norm(x)).unflatten(-1, (3 * self.num_heads, -1))
        if rope is None:
            query, key, value = heads.chunk(3, 2)
            query, key = self.q_norm(query), self.k_norm(key)
        else:
            query_key, value = heads.split((2 * self.num_heads, self.num_heads), 2)
            if self.qk_normalization:
                query, key = query_key.chunk(2, 2)
                query_key = torch.cat([self.q_norm(query), self.k_norm(key)], 2)
            query, key = rotate(query_key.transpose(1, 2), rope).transpose(1, 2).chunk(2, 2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class CrossAttention(nn.Module):
    """Attention of queries to other tokens. The norm is of the queries; keys and values are taken as they come.

    Args: as of `SelfAttention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        bias: bool = True,
        norm_type: str = "rmsnorm",
        qk_normalization: bool = False,
        **factory: Any,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.norm = make_norm(norm_type, hidden_size, **factory)
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias, **factory)
        self.kv_proj = nn.Linear(hidden_size, 2 * hidden_size, bias=bias, **factory)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=bias, **factory)
        self.q_norm, self.k_norm = _head_norms(norm_type, hidden_size // num_heads, qk_normalization, **factory)
        self.dropout = nn.Dropout(hidden_dropout)
        init_layers(self.q_proj, self.kv_proj, self.out_proj)

    def forward(
        self,
        x: Tensor,
        kv: Tensor,
        rope_q: Tensor | None = None,
        rope_k: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, S, C), the queries.
            kv: (B, T, C), what they attend to.
            rope_q, rope_k: positions of the queries and of the keys, as of `SelfAttention`.
            attn_mask: broadcasts to (B, num_heads, S, T), as of `SelfAttention`.

        Returns:
            (B, S, C), without the residual.
        """
        query, key, value = self._heads(x, kv, rope_q, rope_k)
        dropout = self.attention_dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout)
        return self.dropout(self.out_proj(_merge(attended)))

    @torch.no_grad()
    def forward_weights(
        self, x: Tensor, kv: Tensor, rope_q: Tensor | None = None, rope_k: Tensor | None = None
    ) -> Tensor:
        """(B, num_heads, S, T): how much each query attends to each key, without dropout and without gradients."""
        query, key, _ = self._heads(x, kv, rope_q, rope_k)
        return attention_weights(query, key)

    def _heads(
        self, x: Tensor, kv: Tensor, rope_q: Tensor | None, rope_k: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, num_heads, S or T, d) queries, keys and values."""
        query = self.q_norm(_split(self.q_proj(self.norm(x)), self.num_heads))
        key, value = (_split(part, self.num_heads) for part in self.kv_proj(kv).chunk(2, -1))
        key = self.k_norm(key)
        query = query if rope_q is None else rotate(query, rope_q)
        key = key if rope_k is None else rotate(key, rope_k)
        return query, key, value


class AttentivePool(nn.Module):
    """Pool tokens into a few: learned queries attend to them.

    Args:
        hidden_size: C, a multiple of ``num_heads``.
        num_heads: attention heads.
        num_queries: n, pooled tokens.
        settings: further arguments of `CrossAttention`.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_queries: int = 1, **settings: Any):
        super().__init__()
        self.cross_attention = CrossAttention(hidden_size, num_heads, **settings)
        self.query = nn.Parameter(self.cross_attention.q_proj.weight.new_empty(1, num_queries, hidden_size))
        truncated_normal_(self.query)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) tokens to (B, n, C) pooled ones, or to (B, C) where there is one query."""
        pooled = self.cross_attention(self._queries(x), x)
        return pooled.squeeze(1) if self.query.shape[1] == 1 else pooled

    def forward_weights(self, x: Tensor) -> Tensor:
        """(B, num_heads, n, L): how much each query attends to each token."""
        return self.cross_attention.forward_weights(self._queries(x), x)

    def _queries(self, x: Tensor) -> Tensor:
        return self.query.expand(x.shape[0], -1, -1)


def attention_weights(query: Tensor, key: Tensor) -> Tensor:
    """(..., S, T): the softmax over keys of the scaled products of (..., S, d) queries and (..., T, d) keys."""
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)


def _head_norms(norm_type: str, head_dim: int, wanted: bool, **factory: Any) -> tuple[nn.Module, nn.Module]:
    if not wanted:
        return nn.Identity(), nn.Identity()
    return make_norm(norm_type, head_dim, **factory), make_norm(norm_type, head_dim, **factory)


def _split(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, C) to (B, num_heads, S, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """(B, num_heads, S, d) to (B, S, C)."""
    return x.transpose(1, 2).flatten(2)
