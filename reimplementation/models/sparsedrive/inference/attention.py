"""Decoupled attention in evaluation, where the projections around it are one product with its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.sparsedrive.attention import InstanceAttention

from .rows import constant


class InferenceAttention(nn.Module):
    """``fc_after(query + attention)`` of queries that are features and embeddings side by side.

    Values of a head's own instances come from ``fc_before(feature)``. Neither that nor the output before ``fc_after``
    is wanted for itself, so that two products in a row are one here.

    Args:
        layer: the attention with its residual.
        before: weight (attention_dims, embed_dims) of ``fc_before``.
        after: weight (embed_dims, attention_dims) of ``fc_after``.
    """

    def __init__(self, layer: InstanceAttention, before: Tensor, after: Tensor):
        super().__init__()
        attention = layer.attn
        dims = attention.out_proj.in_features
        self.num_heads = attention.num_heads
        self.in_weight = constant(attention.in_proj_weight)
        self.in_bias = constant(attention.in_proj_bias)
        self.value_weight = constant(attention.in_proj_weight[2 * dims :] @ before)
        self.residual_weight = constant(after)
        self.out_weight = constant(after @ attention.out_proj.weight)
        self.out_bias = constant(after @ attention.out_proj.bias)

    def of_own(self, query: Tensor, feature: Tensor, allowed: Tensor | None) -> Tensor:
        """Instances look at one another: features (bs, n, embed_dims) of queries (bs, n, attention_dims)."""
        dims = query.shape[-1]
        projected = F.linear(query, self.in_weight[: 2 * dims], self.in_bias[: 2 * dims])
        value = F.linear(feature, self.value_weight, self.in_bias[2 * dims :])
        return self._attend(query, (*projected.chunk(2, dim=-1), value), allowed)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """Queries (bs, n, attention_dims) look at keys and values (bs, m, attention_dims)."""
        if key is query and value is query:
            projected = F.linear(query, self.in_weight, self.in_bias).chunk(3, dim=-1)
        else:
            weights, biases = self.in_weight.chunk(3), self.in_bias.chunk(3)
            projected = tuple(map(F.linear, (query, key, value), weights, biases))
        return self._attend(query, projected, allowed)

    def _attend(self, residual: Tensor, projected: tuple[Tensor, ...], allowed: Tensor | None) -> Tensor:
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        attended = heads.transpose(1, 2).flatten(2)
        output = torch.addmm(self.out_bias, residual.flatten(0, 1), self.residual_weight.t())
        return output.addmm_(attended.flatten(0, 1), self.out_weight.t()).unflatten(0, residual.shape[:2])
