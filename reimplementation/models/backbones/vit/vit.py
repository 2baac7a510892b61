"""A vision transformer that returns features of every patch."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import tokens as masks
from .config import ViTConfig
from .features import ViTFeatures
from .initialization import truncated_normal_
from .norm import make_norm
from .patch_embed import PatchEmbed
from .rope import RotaryPositions, with_prefix
from .transformer import CrossAttentionLayer, DecoderLayer, EncoderLayer


class ViT(nn.Module):
    """A vision transformer (arXiv 2010.11929) for dense features.

    Patches are embedded, learned tokens put before them, layers run, and everything is normalised at the end. Without
    further settings there is no cls token, the norm is RMSNorm, the activation the square of ReLU, and positions are
    rotary. Nothing in it is compiled; `torch.compile`, `torch.export` and the exporters take it as one graph.

    Args:
        config: the settings.
        device: of the weights.
        dtype: of the weights; None: ``config.dtype``. Rotary positions are float32 always.
    """

    def __init__(self, config: ViTConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        factory: dict[str, Any] = {"device": device, "dtype": dtype or config.dtype}
        hidden_size = config.hidden_size
        self.register_tokens = _prefix_tokens(config.num_register_tokens, hidden_size, **factory)
        self.cls_tokens = _prefix_tokens(config.num_cls_tokens, hidden_size, **factory)
        self.stem = PatchEmbed(config, **factory)
        self.patch_embed_norm = (
            make_norm(config.norm_type, hidden_size, eps=None, **factory)
            if config.patch_embed_normalization
            else nn.Identity()
        )
        self.rope = _rope(config, device) if config.pos_enc == "rope" else None
        self.blocks = nn.ModuleList(EncoderLayer(config, **factory) for _ in range(config.depth))
        self.output_norm = make_norm(config.norm_type, hidden_size, eps=None, **factory)
        self.heads = nn.ModuleDict({name: head.instantiate(config, **factory) for name, head in config.heads.items()})
        self.mlp_requires_grad_(config.mlp_requires_grad)
        self.self_attention_requires_grad_(config.self_attention_requires_grad)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, rope_seed: int | None = None, output_norm: bool = True
    ) -> ViTFeatures:
        """The features of every token. Heads are the caller's to call.

        Args:
            x: (B, C_in, H, W), or (B, C_in, D, H, W) for patches of three axes. Each side is a multiple of the patch,
                and need not be that of ``config.img_size``.
            mask: (B, L) bool, True for the patches to keep, equally many in every sample; the others are left out.
            rope_seed: makes the augmentation of rotary positions repeatable; not for compiled models.
            output_norm: False: return the tokens as the last layer leaves them.

        Raises:
            ValueError: a shape does not fit, or samples keep different numbers of patches.
            TypeError: the input is not floating point.
        """
        tokens, rope, size = self._embed(x, mask, rope_seed)
        for block in self.blocks:
            if self.config.activation_checkpointing and self.training:
                tokens = checkpoint(block, tokens, rope, use_reentrant=False)
            else:
                tokens = block(tokens, rope)
        if output_norm:
            tokens = self.output_norm(tokens)
        return ViTFeatures(tokens, self.config.num_register_tokens, self.config.num_cls_tokens, size)

    @torch.no_grad()
    def forward_attention_weights(
        self, x: Tensor, mask: Tensor | None = None, rope_seed: int | None = None
    ) -> dict[str, Tensor]:
        """(B, heads, N, N) attention weights under "layer_0", "layer_1", ...; arguments as of `forward`."""
        tokens, rope, _ = self._embed(x, mask, rope_seed)
        weights = {}
        for index in range(self.config.depth):
            block = self.get_block(index)
            weights[f"layer_{index}"] = block.self_attention.forward_weights(tokens, rope)
            tokens = block(tokens, rope)
        return weights

    def prepare_rope(self, tokenized_size: tuple[int, ...], rope_seed: int | None = None) -> Tensor | None:
        """(2, L, head_dim) float32 sines and cosines for a grid; None where positions are not rotary."""
        return None if self.rope is None else self.rope(tokenized_size, rope_seed)

    def create_mask(
        self,
        x: Tensor,
        unmasked_ratio: float,
        scale: int = 1,
        roll: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(B, L) bool for this input; arguments as of `tokens.create_mask`."""
        size = self.stem.tokenized_size(x.shape[2:])
        return masks.create_mask(size, unmasked_ratio, x.shape[0], scale, roll, x.device, generator)

    def create_encoder_layer(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EncoderLayer:
        """A further layer with fresh weights and this model's settings."""
        return EncoderLayer(self.config, device=device, dtype=dtype or self.config.dtype)

    def create_decoder_layer(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> DecoderLayer:
        """A decoder layer with fresh weights and this model's settings."""
        return DecoderLayer(self.config, device=device, dtype=dtype or self.config.dtype)

    def create_cross_attention_layer(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> CrossAttentionLayer:
        """A cross-attention layer with fresh weights and this model's settings."""
        return CrossAttentionLayer(self.config, device=device, dtype=dtype or self.config.dtype)

    def get_block(self, index: int) -> EncoderLayer:
        """The layer of that number, counted from 0; negative ones from the end.

        Raises:
            IndexError: there is none.
        """
        return cast(EncoderLayer, self.blocks[index])

    def get_head(self, name: str) -> nn.Module:
        """The head of that name.

        Raises:
            ValueError: there is none.
        """
        if name not in self.heads:
            raise ValueError(f"the model has the heads {', '.join(self.heads) or '(none)'}; got {name!r}")
        return self.heads[name]

    def backbone_requires_grad_(self, requires_grad: bool = True) -> ViT:
        """Freeze or thaw everything but the heads."""
        for name, parameter in self.named_parameters():
            if not name.startswith("heads."):
                parameter.requires_grad_(requires_grad and parameter.numel() > 0)
        return self

    def mlp_requires_grad_(self, requires_grad: bool = True) -> ViT:
        """Freeze or thaw the MLP of every layer."""
        for block in self.blocks:
            block.mlp.requires_grad_(requires_grad)
        return self

    def self_attention_requires_grad_(self, requires_grad: bool = True) -> ViT:
        """Freeze or thaw the self-attention of every layer."""
        for block in self.blocks:
            block.self_attention.requires_grad_(requires_grad)
        return self

    def _embed(
        self, x: Tensor, mask: Tensor | None, rope_seed: int | None
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """The tokens that enter the first layer, their positions, and the size of the grid of patches."""
        tokens = self.patch_embed_norm(self.stem(x))
        size = self.stem.tokenized_size(x.shape[2:])
        rope = self.prepare_rope(size, rope_seed)
        if mask is not None:
            tokens, rope = _masked(mask, tokens, rope)
        if rope is not None:  # once for all layers
            rope = with_prefix(rope, self.config.num_prefix_tokens)
        prefix = [learned.expand(x.shape[0], -1, -1) for learned in (self.cls_tokens, self.register_tokens)]
        return torch.cat([*prefix, tokens], 1), rope, size


def _masked(mask: Tensor, tokens: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The tokens that are kept, and their positions, (2, B, n, head_dim)."""
    counts = mask.sum(1)
    if (counts != counts[0]).any():
        raise ValueError(
            f"mask must keep equally many patches in every sample, or padding would be attended to; "
            f"got {counts.tolist()}"
        )
    kept = masks.apply_mask(mask, tokens)
    if rope is not None:
        rope = torch.stack([masks.apply_mask(mask, part.expand(mask.shape[0], -1, -1)) for part in rope])
    return kept, rope


def _rope(config: ViTConfig, device: torch.device | str | None) -> RotaryPositions:
    return RotaryPositions(
        config.head_dim,
        config.rope_base,
        config.rope_normalize_coords,
        config.rope_shift_coords,
        config.rope_jitter_coords,
        config.rope_rescale_coords,
        config.tokenized_size,
        device=device,
    )


def _prefix_tokens(count: int, hidden_size: int, **factory: Any) -> nn.Parameter:
    tokens = nn.Parameter(torch.empty(1, count, hidden_size, **factory), requires_grad=count > 0)
    truncated_normal_(tokens)
    return tokens
