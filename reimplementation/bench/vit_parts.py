"""Parts of a ViT as candidates of its benchmark: a layer, its MLP with the norm, and the matrix products of each alone.

The products are the floor of a part: what it would take if the norms, activations, rotations and residuals between them
cost nothing. What a part takes beyond them is what a kernel of one's own could win.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reimplementation.models.backbones.vit import ViTConfig

from .vit import Candidate

PARTS = ("model", "layer", "layer-products", "mlp", "mlp-products")


def part_candidate(name: str, config: ViTConfig, part: str) -> Candidate:
    """A part of a model, other than the model itself, on tokens of an image of the size that is asked for.

    Args:
        name: of the model.
        config: of the model.
        part: of `PARTS`.
    """
    config = config.replace(heads={})
    modules = {"layer": Layer, "layer-products": LayerProducts, "mlp": _mlp, "mlp-products": MLPProducts}

    def build(size: Sequence[int]) -> nn.Module:
        return modules[part](config.replace(img_size=size, depth=1))

    def tokens(size: Sequence[int]) -> tuple[int, int]:
        return config.replace(img_size=size).sequence_length, config.hidden_size

    return Candidate(f"{name} {part}", build, tokens, config.dtype, learns_input=True)


class Layer(nn.Module):
    """An encoder layer with the positions that its model would hand it."""

    positions: Tensor | None

    def __init__(self, config: ViTConfig):
        super().__init__()
        model = config.instantiate()
        self.layer = model.get_block(0)
        self.register_buffer("positions", model.prepare_rope(config.tokenized_size))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(tokens, self.positions)


class MLPProducts(nn.Module):
    """The two linear layers of an MLP. Of a GLU's first one, the second takes a half as it is."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        mlp: Any = _mlp(config)
        self.fc1: nn.Linear = mlp.fc1
        self.fc2: nn.Linear = mlp.fc2

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.fc1(tokens)[..., : self.fc2.in_features])


class LayerProducts(nn.Module):
    """The four linear layers of an encoder layer, and the attention between the first two."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        attention = config.instantiate().get_block(0).self_attention
        self.num_heads = attention.num_heads
        self.qkv_proj, self.out_proj = attention.qkv_proj, attention.out_proj
        self.mlp = MLPProducts(config)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.qkv_proj(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads.unbind(0))
        return self.mlp(self.out_proj(attended.transpose(1, 2).flatten(2)))


def _mlp(config: ViTConfig) -> nn.Module:
    return config.instantiate().get_block(0).mlp
