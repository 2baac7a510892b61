"""The feed-forward network behind the deformable aggregation."""

from __future__ import annotations

from torch import Tensor, nn


class AsymmetricFFN(nn.Module):
    """A feed-forward network from ``in_dims`` to fewer ``embed_dims`` channels (Sparse4Dv2, arXiv 2305.14018).

    The input is normalised first; the residual connection projects what was normalised, as widths differ.
    """

    def __init__(self, in_dims: int, embed_dims: int, feedforward_dims: int, dropout: float = 0.0):
        super().__init__()
        self.pre_norm = nn.LayerNorm(in_dims)
        self.layers = nn.Sequential(
            nn.Sequential(nn.Linear(in_dims, feedforward_dims), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            nn.Linear(feedforward_dims, embed_dims),
            nn.Dropout(dropout),
        )
        self.identity_fc = nn.Linear(in_dims, embed_dims)

    def forward(self, x: Tensor) -> Tensor:
        """(bs, n, embed_dims) of x (bs, n, in_dims)."""
        x = self.pre_norm(x)
        return self.identity_fc(x) + self.layers(x)
