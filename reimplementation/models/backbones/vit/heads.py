"""Heads on a ViT's tokens, pooled tokens or grid. The model builds them by name, and the user calls them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .attention import AttentivePool


class Head(nn.Module):
    """Dropout, then a linear layer: (..., in_features) to (..., out_features).

    Args:
        in_features, out_features: channels.
        bias: whether the linear layer has one.
        dropout: of the input.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dropout: float = 0.0, **factory: Any):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.proj = nn.Linear(in_features, out_features, bias=bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.dropout(x))


class AttentivePoolHead(nn.Module):
    """Attentive pooling, then a `Head`: (B, L, in_features) to (B, out_features), or (B, n, out_features) for n > 1.

    Args:
        pool: with n queries.
        in_features, out_features, bias, dropout, factory: of the `Head`.
    """

    def __init__(
        self,
        pool: AttentivePool,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dropout: float = 0.0,
        **factory: Any,
    ):
        super().__init__()
        self.pool = pool
        self.proj = Head(in_features, out_features, bias, dropout, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.pool(x))


class TransposedConv2dHead(nn.Module):
    """Dropout, then a transposed convolution: (B, in_features, H, W) to (B, out_features, 2 H, 2 W) by default.

    Args:
        in_features, out_features: channels.
        dropout: of the input.
        convolution: further arguments of `torch.nn.ConvTranspose2d`, and ``device`` and ``dtype``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 4,
        stride: int = 2,
        padding: int = 1,
        dropout: float = 0.0,
        **convolution: Any,
    ):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.conv_transpose = nn.ConvTranspose2d(
            in_features, out_features, kernel_size, stride=stride, padding=padding, **convolution
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_transpose(self.dropout(x))


class UpsampleHead(nn.Module):
    """Stages that double the grid, then smooth it: (B, widths[0], H, W) to (B, widths[-1], 2^n H, 2^n W) in n stages.

    A stage is a transposed convolution of 2 x 2, and convolutions of 3 x 3 with GELU between them, whose result is
    added.

    Args:
        widths: channels of the input and after each stage.
        num_smooth_layers: convolutions in a stage; 0: none.
        dropout: of the input.
        factory: ``device`` and ``dtype`` of the weights.
    """

    def __init__(self, widths: Sequence[int], num_smooth_layers: int = 2, dropout: float = 0.0, **factory: Any):
        super().__init__()
        self.num_smooth_layers = num_smooth_layers
        self.dropout = nn.Dropout(dropout)
        self.upsample_layers = nn.ModuleList(
            nn.ConvTranspose2d(before, after, kernel_size=2, stride=2, **factory)
            for before, after in zip(widths, widths[1:])
        )
        self.smooth_layers = nn.ModuleList(_smoothing(width, num_smooth_layers, **factory) for width in widths[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        for upsample, smooth in zip(self.upsample_layers, self.smooth_layers):
            x = upsample(x)
            if self.num_smooth_layers:
                x = x + smooth(x)
        return x


def _smoothing(width: int, num_layers: int, **factory: Any) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_layers):
        layers += [nn.GELU()] if index else []
        layers.append(nn.Conv2d(width, width, kernel_size=3, padding=1, **factory))
    return nn.Sequential(*layers)
