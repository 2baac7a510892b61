"""Anchors as embeddings, one encoder for boxes and one for lines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reimplementation.ops.box_key_points import CENTRE, LOG_SIZE, SIN_COS_YAW, VELOCITY

from .layers import CoordinateMLP, linear_relu_norm


class BoxAnchorEncoder(nn.Module):
    """Position, size, heading and velocity, each embedded by an MLP of its own, side by side.

    This is the encoder of Sparse4Dv3 (arXiv 2311.11722, section 3.3).
    """

    def __init__(self, embed_dims: int = 256):
        super().__init__()
        self.pos_fc = _mlp(3, embed_dims // 2)
        self.size_fc = _mlp(3, embed_dims // 8)
        self.yaw_fc = _mlp(2, embed_dims // 8)
        self.vel_fc = _mlp(3, embed_dims // 4)

    def forward(self, anchor: Tensor) -> Tensor:
        """Embeddings (bs, n, embed_dims) of anchors (bs, n, 11)."""
        parts = [
            self.pos_fc(anchor[..., CENTRE]),
            self.size_fc(anchor[..., LOG_SIZE]),
            self.yaw_fc(anchor[..., SIN_COS_YAW]),
            self.vel_fc(anchor[..., VELOCITY]),
        ]
        return torch.cat(parts, dim=-1)


class LineAnchorEncoder(nn.Module):
    """All points of a line, embedded together."""

    def __init__(self, num_points: int = 20, embed_dims: int = 256):
        super().__init__()
        self.pos_fc = CoordinateMLP(*linear_relu_norm(2 * num_points, embed_dims, num_linears=1, num_norms=2))

    def forward(self, anchor: Tensor) -> Tensor:
        """Embeddings (bs, n, embed_dims) of anchors (bs, n, 2 * num_points)."""
        return self.pos_fc(anchor)


def _mlp(in_dims: int, dims: int) -> CoordinateMLP:
    return CoordinateMLP(*linear_relu_norm(in_dims, dims, num_linears=1, num_norms=4))
