"""The settings of heads. `in_features` and `out_features` left out are the backbone's hidden size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from .settings import check_fields, check_range

if TYPE_CHECKING:
    import torch

    from .config import ViTConfig


@dataclass(frozen=True)
class HeadSettings:
    """What the settings of every kind of head share.

    Attributes:
        in_features, out_features: channels; None: the backbone's hidden size.
        dropout: of the input of the last projection, or of the convolutions.
    """

    type_name: ClassVar[str]

    in_features: int | None = None
    out_features: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("in_features", "out_features"):
            if (value := getattr(self, name)) is not None:
                check_range(name, value, 1)
        check_range("dropout", self.dropout, 0, 1)

    def widths(self, backbone: ViTConfig) -> tuple[int, int]:
        """in_features and out_features on this backbone."""
        return self.in_features or backbone.hidden_size, self.out_features or backbone.hidden_size

    def check(self, backbone: ViTConfig) -> None:
        """Raise ValueError where the head does not go with the backbone."""

    def instantiate(self, backbone: ViTConfig, device: torch.device | str | None, dtype: torch.dtype) -> nn.Module:
        raise NotImplementedError


@dataclass(frozen=True)
class HeadConfig(HeadSettings):
    """A linear layer on each token, or on a pooled one: `heads.Head`."""

    type_name = "Head"

    bias: bool = True

    def instantiate(self, backbone, device, dtype):
        from .heads import Head

        return Head(*self.widths(backbone), self.bias, self.dropout, device=device, dtype=dtype)


@dataclass(frozen=True)
class AttentivePoolHeadConfig(HeadSettings):
    """Learned queries attend to the tokens, then a linear layer: `heads.AttentivePoolHead`.

    The attention has the backbone's heads, biases, norm and query-key normalisation.
    """

    type_name = "AttentivePoolHead"

    num_queries: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_queries", self.num_queries, 1)

    def check(self, backbone):
        heads, (in_features, _) = backbone.num_attention_heads, self.widths(backbone)
        if in_features % heads:
            raise ValueError(f"in_features must be a multiple of num_attention_heads={heads}; got {in_features}")

    def instantiate(self, backbone, device, dtype):
        from .attention import AttentivePool
        from .heads import AttentivePoolHead

        in_features, out_features = self.widths(backbone)
        pool = AttentivePool(
            in_features,
            backbone.num_attention_heads,
            self.num_queries,
            bias=backbone.attention_bias,
            norm_type=backbone.norm_type,
            qk_normalization=backbone.qk_normalization,
            device=device,
            dtype=dtype,
        )
        return AttentivePoolHead(pool, in_features, out_features, self.bias, self.dropout, device=device, dtype=dtype)


@dataclass(frozen=True)
class TransposedConv2dHeadConfig(HeadSettings):
    """One transposed convolution, which doubles the grid unless told otherwise: `heads.TransposedConv2dHead`."""

    type_name = "TransposedConv2dHead"

    kernel_size: int = 4
    stride: int = 2
    padding: int = 1
    output_padding: int = 0
    dilation: int = 1
    groups: int = 1
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kernel_size", "stride", "dilation", "groups"):
            check_range(name, getattr(self, name), 1)
        check_range("padding", self.padding, 0)
        check_range("output_padding", self.output_padding, 0, max(self.stride, self.dilation))

    def check(self, backbone):
        if any(width % self.groups for width in self.widths(backbone)):
            raise ValueError(f"groups must divide in_features and out_features; got {self.groups}")

    def instantiate(self, backbone, device, dtype):
        from .heads import TransposedConv2dHead

        names = ("kernel_size", "stride", "padding", "output_padding", "dilation", "groups", "bias")
        settings = {name: getattr(self, name) for name in names}
        return TransposedConv2dHead(
            *self.widths(backbone), dropout=self.dropout, **settings, device=device, dtype=dtype
        )


@dataclass(frozen=True)
class UpsampleHeadConfig(HeadSettings):
    """Stages that each double the grid and smooth it: `heads.UpsampleHead`.

    Attributes:
        num_upsample_stages: four bring patches of 16 pixels back to pixels.
        num_smooth_layers: convolutions of 3 x 3 in each stage.
        hidden_features: channels after each stage but the last: one number, or a list; None: ``in_features``.
    """

    type_name = "UpsampleHead"

    num_upsample_stages: int = 4
    num_smooth_layers: int = 2
    hidden_features: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("num_upsample_stages", self.num_upsample_stages, 1)
        check_range("num_smooth_layers", self.num_smooth_layers, 0)
        hidden = self.hidden_features
        for width in hidden if isinstance(hidden, tuple) else () if hidden is None else (hidden,):
            check_range("hidden_features", width, 1)
        if isinstance(hidden, tuple) and len(hidden) != self.num_upsample_stages - 1:
            raise ValueError(
                f"hidden_features must have a width for each stage but the last, {self.num_upsample_stages - 1}; "
                f"got {list(hidden)}"
            )

    def instantiate(self, backbone, device, dtype):
        from .heads import UpsampleHead

        in_features, out_features = self.widths(backbone)
        hidden = self.hidden_features or in_features
        between = hidden if isinstance(hidden, tuple) else (hidden,) * (self.num_upsample_stages - 1)
        widths = (in_features, *between, out_features)
        return UpsampleHead(widths, self.num_smooth_layers, self.dropout, device=device, dtype=dtype)


HEAD_TYPES: dict[str, type[HeadSettings]] = {
    kind.type_name: kind
    for kind in (HeadConfig, AttentivePoolHeadConfig, TransposedConv2dHeadConfig, UpsampleHeadConfig)
}
