"""What a ViT returns: its tokens, and views of them by kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class ViTFeatures:
    """The tokens of a batch: [cls, register, visual].

    Args:
        dense_features: (B, N, C), all tokens.
        num_register_tokens, num_cls_tokens: how many of the first are which.
        tokenized_size: patches along each axis of the input; a mask may have left some of them out.
    """

    def __init__(
        self,
        dense_features: Tensor,
        num_register_tokens: int,
        num_cls_tokens: int,
        tokenized_size: tuple[int, ...] | None = None,
    ):
        self.dense_features = dense_features
        self.num_register_tokens = num_register_tokens
        self.num_cls_tokens = num_cls_tokens
        self.tokenized_size = tokenized_size

    @classmethod
    def from_separate_features(
        cls,
        cls_tokens: Tensor,
        register_tokens: Tensor,
        visual_tokens: Tensor,
        tokenized_size: tuple[int, ...] | None = None,
    ) -> ViTFeatures:
        """Join tokens (B, n, C) of the three kinds; n may be 0."""
        dense_features = torch.cat([cls_tokens, register_tokens, visual_tokens], 1)
        return cls(dense_features, register_tokens.shape[1], cls_tokens.shape[1], tokenized_size)

    @property
    def num_prefix_tokens(self) -> int:
        return self.num_cls_tokens + self.num_register_tokens

    @property
    def cls_tokens(self) -> Tensor:
        """(B, num_cls_tokens, C)."""
        return self.dense_features[:, : self.num_cls_tokens]

    @property
    def register_tokens(self) -> Tensor:
        """(B, num_register_tokens, C)."""
        return self.dense_features[:, self.num_cls_tokens : self.num_prefix_tokens]

    @property
    def visual_tokens(self) -> Tensor:
        """(B, L, C), the patches row by row."""
        return self.dense_features[:, self.num_prefix_tokens :]

    @property
    def visual_tokens_as_grid(self) -> Tensor:
        """(B, H, W, C) or (B, D, H, W, C).

        Raises:
            ValueError: the size of the grid is unknown, or a mask has left patches out.
        """
        tokens = self.visual_tokens
        if self.tokenized_size is None:
            raise ValueError("visual tokens have a grid only with a tokenized_size, and none is known")
        expected = 1
        for side in self.tokenized_size:
            expected = expected * side
        if tokens.shape[1] != expected:
            raise ValueError(
                f"a grid of {tuple(self.tokenized_size)} has {expected} tokens; got {tokens.shape[1]}: a mask has left "
                "some out, and tokens.unapply_mask puts them back"
            )
        return tokens.unflatten(1, tuple(self.tokenized_size))

    def apply(self, func: Callable[[Tensor], Tensor]) -> ViTFeatures:
        """The same with ``func`` of the dense features, which must keep the number of tokens."""
        return ViTFeatures(
            func(self.dense_features), self.num_register_tokens, self.num_cls_tokens, self.tokenized_size
        )

    def __iter__(self) -> Iterator[Tensor]:
        """cls, register and visual tokens."""
        yield from (self.cls_tokens, self.register_tokens, self.visual_tokens)

    def __repr__(self) -> str:
        return (
            f"ViTFeatures(dense_features={tuple(self.dense_features.shape)}, "
            f"num_register_tokens={self.num_register_tokens}, num_cls_tokens={self.num_cls_tokens}, "
            f"tokenized_size={self.tokenized_size})"
        )


def _flatten(features: ViTFeatures) -> tuple[list[Tensor], tuple[Any, ...]]:
    sizes = (features.num_register_tokens, features.num_cls_tokens, features.tokenized_size)
    return [features.dense_features], sizes


def _unflatten(tensors: Any, sizes: tuple[Any, ...]) -> ViTFeatures:
    (dense_features,) = tensors
    num_register_tokens, num_cls_tokens, tokenized_size = sizes
    return ViTFeatures(dense_features, num_register_tokens, num_cls_tokens, tokenized_size and tuple(tokenized_size))


# Exporters and functional transforms see through the class to its one tensor.
pytree.register_pytree_node(
    ViTFeatures,
    _flatten,
    _unflatten,
    serialized_type_name="reimplementation.ViTFeatures",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
