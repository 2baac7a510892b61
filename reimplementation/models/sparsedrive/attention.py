"""Attention of instances to one another and to those of earlier frames."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MultiheadAttention(nn.Module):
    """`nn.MultiheadAttention`'s parameters and formula, batch first, on `scaled_dot_product_attention` alone.

    The model's attention never asks for the averaged weights and never has its sequence first, so that none of the
    transpositions of `nn.MultiheadAttention` is left.
    """

    def __init__(self, embed_dims: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dims, embed_dims))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dims))
        self.out_proj = nn.Linear(embed_dims, embed_dims)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (bs, n, embed_dims).
            key, value: (bs, m, embed_dims).
            allowed: bool, broadcasts to (bs, num_heads, n, m): where a query may look; None: everywhere.

        Returns:
            (bs, n, embed_dims).
        """
        dropout = self.dropout if self.training else 0.0
        queries, keys, values = self._heads_of(query, key, value)
        heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed, dropout_p=dropout)
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def _heads_of(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values (bs, num_heads, n or m, head channels); inputs that are one share a product."""
        embed_dims = query.shape[-1]
        if key is query:
            shared = 3 if value is query else 2
            parts = [(query, shared), (value, 3 - shared)]
        else:
            parts = [(query, 1), (key, 1), (value, 1)]
        projected: list[Tensor] = []
        row = 0
        for tensor, count in parts:
            rows = slice(row * embed_dims, (row + count) * embed_dims)
            if count:
                product = F.linear(tensor, self.in_proj_weight[rows], self.in_proj_bias[rows])
                projected += product.unflatten(-1, (count, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            row += count
        return projected


class InstanceAttention(nn.Module):
    """Attention with its residual connection, ``query + dropout(attention)``, held as ``attn`` for the names."""

    def __init__(self, embed_dims: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.attn = MultiheadAttention(embed_dims, num_heads, dropout)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, residual: Tensor, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """As `MultiheadAttention`, added to ``residual`` (bs, n, embed_dims)."""
        return residual + self.drop(self.attn(query, key, value, allowed))
