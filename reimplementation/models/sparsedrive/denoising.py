"""Denoising: noisy ground truth as further queries, which learn to find back (Sparse4Dv3, section 3.1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.ops.box_key_points import VELOCITY

from .matching import assign, box_cost


class DenoisingQueries(NamedTuple):
    """Queries, group after group, that the other instances do not see and that see their own group alone.

    anchor      (bs, n, 11)
    labels      (bs, n) int64; ``num_classes``: background
    boxes       (bs, n, 10), encoded targets
    weights     (bs, n, 10), what each value of a target counts
    valid       (bs, n) bool; False: padding
    num_groups  groups, each of n / num_groups queries
    """

    anchor: Tensor
    labels: Tensor
    boxes: Tensor
    weights: Tensor
    valid: Tensor
    num_groups: int

    def append_to(self, feature: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and anchors with these queries behind them, and who may look at whom, (n, n) bool."""
        bs, count = self.labels.shape
        blank = feature.new_zeros(bs, count, feature.shape[-1])
        group = torch.arange(count, device=anchor.device) // (count // self.num_groups)
        group = F.pad(group, (anchor.shape[1], 0), value=-1)
        return (
            torch.cat([feature, blank], dim=1),
            torch.cat([anchor, self.anchor.to(anchor.dtype)], dim=1),
            group[:, None] == group,
        )


def denoising_queries(
    labels: Tensor,
    boxes: Tensor,
    weights: Tensor,
    counts: list[int],
    num_classes: int,
    num_groups: int,
    noise_scale: tuple[float, ...],
    cost_weights: tuple[float, ...],
) -> DenoisingQueries:
    """Draw queries around the targets of a batch.

    Every target gives a group two queries: one within ``noise_scale`` of it, and one at once to twice as far in every
    value, on either side. Within a group the queries are matched to the targets by cost, so that the nearest answers for
    a target; the others are background.

    Args:
        labels, boxes, weights: (bs, m), (bs, m, 10), (bs, m, 10), as in `DenoisingQueries`.
        counts: how many of a sample's m are no padding.
        num_classes: the label of the background.
        num_groups: groups, each with noise of its own.
        noise_scale: of the ten values.
        cost_weights: of the ten values.
    """
    bs, m, dims = boxes.shape
    draw = torch.rand(num_groups, bs, 2 * m, dims, dtype=boxes.dtype, device=boxes.device)
    side = torch.rand_like(draw[:, :, m:]).round() * 2 - 1
    noise = torch.cat([draw[:, :, :m] * 2 - 1, (draw[:, :, m:] + 1) * side], dim=2)
    noisy = torch.cat([boxes, boxes], dim=1) + noise * boxes.new_tensor(noise_scale)

    valid = torch.arange(m, device=boxes.device) < torch.tensor(counts, device=boxes.device)[:, None]
    valid = torch.cat([valid, valid], dim=1)
    cost = box_cost(noisy, boxes, boxes.new_tensor(cost_weights).expand_as(boxes))
    assigned = assign(cost.masked_fill(~valid[..., None], torch.inf), counts)

    # Groups stand side by side in the row of a sample: (num_groups, bs, 2m) -> (bs, num_groups * 2m).
    assigned = assigned.transpose(0, 1).flatten(1)
    noisy = noisy.transpose(0, 1).flatten(1, 2)
    index = assigned.clamp(min=0)
    rows = index[..., None].expand(-1, -1, dims)
    return DenoisingQueries(
        anchor=F.pad(noisy, (0, VELOCITY.stop - dims)),
        labels=torch.where(assigned >= 0, labels.gather(1, index), num_classes),
        boxes=boxes.gather(1, rows),
        weights=weights.gather(1, rows),
        valid=valid.repeat(1, num_groups),
        num_groups=num_groups,
    )
