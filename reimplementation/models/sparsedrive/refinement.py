"""The end of a decoder layer: better anchors, their classes and how good they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reimplementation.ops.box_key_points import SIN_COS_YAW, VELOCITY
from reimplementation.ops.dtypes import at_least_float32

from .layers import Scale, linear_relu_norm

PRIOR = 0.01  # the score that a class starts from, so that the many backgrounds do not drown the first steps


class Refinement(nn.Module):
    """What boxes and lines share: an MLP for the anchor's change and one for the class logits."""

    layers: nn.Module
    cls_layers: nn.Module

    def __init__(self, embed_dims: int, anchor_dims: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(
            *linear_relu_norm(embed_dims, embed_dims, num_linears=2, num_norms=2),
            nn.Linear(embed_dims, anchor_dims),
            Scale(anchor_dims),
        )
        self.cls_layers = _classifier(embed_dims, num_classes, bias=-math.log((1 - PRIOR) / PRIOR))

    def change(self, feature: Tensor) -> Tensor:
        """What the MLP adds to an anchor, (bs, n, anchor_dims), at least float32."""
        return at_least_float32(self.layers(feature))


class BoxRefinement(Refinement):
    """Refines boxes; two logits say how close the centre and whether the heading is right (Sparse4Dv3, section 3.2)."""

    quality_layers: nn.Module

    def __init__(self, embed_dims: int, num_classes: int):
        super().__init__(embed_dims, VELOCITY.stop, num_classes)
        self.quality_layers = _classifier(embed_dims, 2)

    def forward(
        self, feature: Tensor, anchor: Tensor, embed: Tensor, time_interval: Tensor | float, classify: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Refine.

        Args:
            feature, embed: (bs, n, embed_dims).
            anchor: (bs, n, 11).
            time_interval: (bs,) or a number, seconds since the last frame. The network says how far a box went in it.
            classify: False leaves out the logits.

        Returns:
            anchors (bs, n, 11), class logits (bs, n, num_classes), quality logits (bs, n, 2): centerness, yawness.
        """
        located = feature + embed
        change = self.change(located)
        if isinstance(time_interval, Tensor):
            time_interval = time_interval.to(change.dtype)[:, None, None]
        state, moved = change.split((SIN_COS_YAW.stop, VELOCITY.stop - VELOCITY.start), dim=-1)
        refined = anchor + torch.cat([state, moved / time_interval], dim=-1)
        if not classify:
            return refined, None, None
        return refined, self.cls_layers(feature), self.quality_layers(located)


class LineRefinement(Refinement):
    """Refines the points of map lines."""

    def forward(
        self, feature: Tensor, anchor: Tensor, embed: Tensor, time_interval: Tensor | float, classify: bool = True
    ) -> tuple[Tensor, Tensor | None, None]:
        """As `BoxRefinement.forward`; a map stands still, and its lines have no quality."""
        refined = anchor + self.change(feature + embed)
        return refined, self.cls_layers(feature) if classify else None, None


def _classifier(embed_dims: int, num_logits: int, bias: float | None = None) -> nn.Sequential:
    """An MLP whose logits start around ``bias``, or wherever a linear layer starts."""
    last = nn.Linear(embed_dims, num_logits)
    if bias is not None:
        nn.init.constant_(last.bias, bias)
    return nn.Sequential(*linear_relu_norm(embed_dims, embed_dims, num_linears=1, num_norms=2), last)
