"""Denoising: noisy ground truth as further queries, which learn to find back (Sparse4Dv3, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.ops.box_key_points import VELOCITY

from .config import BoxHeadConfig, DenoisingConfig
from .matching import assign, box_cost
from .targets import encoded_boxes, pad_boxes


class KnownBoxes(NamedTuple):
    """The targets of a batch that queries are drawn around.

    labels       (bs, m) int64
    boxes        (bs, m, 10), encoded
    weights      (bs, m, 10), what each value counts
    instance_id  (bs, m) int64, the same in every frame; -1: not known
    counts       how many of a sample's m are no padding
    """

    labels: Tensor
    boxes: Tensor
    weights: Tensor
    instance_id: Tensor
    counts: list[int]


class DenoisingTargets(NamedTuple):
    """What each query is to find.

    labels       (bs, n) int64; ``num_classes``: background
    boxes        (bs, n, 10), encoded
    weights      (bs, n, 10)
    instance_id  (bs, n) int64; -1: background, or not known
    valid        (bs, n) bool; False: padding
    """

    labels: Tensor
    boxes: Tensor
    weights: Tensor
    instance_id: Tensor
    valid: Tensor


class DenoisingState(NamedTuple):
    """Queries of a frame that the next goes on with: feature (bs, k, embed_dims), anchor (bs, k, 11), detached."""

    feature: Tensor
    anchor: Tensor
    instance_id: Tensor
    valid: Tensor


class Denoising(NamedTuple):
    """Queries of a frame, group after group: no other instance sees them, and each sees its own group alone.

    anchor      (bs, n, 11)
    targets     of the layers before the merger with the last frame
    num_groups  groups, each of n / num_groups queries
    recalled    of the last frame, moved to this one; they take the place of the first groups; None: there are none
    goes_on     (bs,) bool; False: the sample starts anew and keeps its own
    continued   targets of the layers after the merger
    """

    anchor: Tensor
    targets: DenoisingTargets
    num_groups: int
    recalled: DenoisingState | None = None
    goes_on: Tensor | None = None
    continued: DenoisingTargets | None = None

    def append_to(self, feature: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features and anchors with these queries behind them, and who may look at whom, (n, n) bool."""
        bs, count = self.anchor.shape[:2]
        blank = feature.new_zeros(bs, count, feature.shape[-1])
        group = torch.arange(count, device=anchor.device) // (count // self.num_groups)
        group = F.pad(group, (anchor.shape[1], 0), value=-1)
        return (
            torch.cat([feature, blank], dim=1),
            torch.cat([anchor, self.anchor.to(anchor.dtype)], dim=1),
            group[:, None] == group,
        )

    def merge(self, feature: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Features and anchors (bs, n, …) of these queries, the recalled ones in place of the first groups."""
        if self.recalled is None or self.goes_on is None:
            return feature, anchor
        return (
            _replace_first(feature, self.recalled.feature, self.goes_on),
            _replace_first(anchor, self.recalled.anchor, self.goes_on),
        )

    def targets_of_layers(self, num_layers: int, num_before_merger: int) -> list[DenoisingTargets]:
        """The targets layer by layer."""
        after = self.targets if self.continued is None else self.continued
        return [self.targets] * num_before_merger + [after] * (num_layers - num_before_merger)

    def keep(self, outputs: Mapping, config: DenoisingConfig) -> DenoisingState:
        """Some groups, drawn at random, for the next frame: the last layer's ``outputs`` of these queries."""
        feature, anchor, targets = outputs["feature"], outputs["prediction"][-1], outputs["targets"][-1]
        size = anchor.shape[1] // self.num_groups
        groups = torch.randperm(self.num_groups, device=anchor.device)[: config.num_temp_groups]
        rows = (groups[:, None] * size + torch.arange(size, device=anchor.device)).flatten()
        return DenoisingState(
            feature.detach()[:, rows], anchor.detach()[:, rows], targets.instance_id[:, rows], targets.valid[:, rows]
        )


def known_boxes(targets: Mapping[str, Sequence[Tensor]], config: BoxHeadConfig, like: Tensor) -> KnownBoxes:
    """The first boxes of each sample, padded to ``max_boxes``: the same number of queries in every frame.

    Args:
        targets: ``labels_3d``, ``boxes_3d`` and maybe ``instance_id``, lists over samples.
        config: of the head.
        like: a tensor (bs, …) of the dtype and device that the targets are to have.
    """
    limit = config.denoising.max_boxes
    boxes = pad_boxes({name: [x[:limit] for x in targets[name]] for name in ("labels_3d", "boxes_3d")}, config, like)
    encoded, weights = encoded_boxes(boxes, config)
    ids = torch.full_like(boxes.labels, -1)
    for row, sample in zip(ids, targets.get("instance_id", ())):
        row[: len(sample[:limit])] = sample[:limit]
    missing = limit - boxes.labels.shape[1]
    return KnownBoxes(
        F.pad(boxes.labels, (0, missing)),
        F.pad(encoded, (0, 0, 0, missing)),
        F.pad(weights, (0, 0, 0, missing)),
        F.pad(ids, (0, missing), value=-1),
        boxes.counts,
    )


def draw_queries(
    known: KnownBoxes, config: DenoisingConfig, cost_weights: tuple[float, ...], num_classes: int
) -> Denoising:
    """Draw queries around the targets of a batch.

    Every target gives a group two queries: one within ``noise_scale`` of it, and one that is once to twice as far
    away in every value, on either side. Within a group the queries are matched to the targets by cost, so that the
    nearest answers for a target; the others are background.

    Args:
        known: the targets.
        config: how many groups, and how noisy.
        cost_weights: of the ten values of a box.
        num_classes: the label of the background.
    """
    boxes, num_groups = known.boxes, config.num_groups
    bs, m, dims = boxes.shape
    draw = torch.rand(num_groups, bs, 2 * m, dims, dtype=boxes.dtype, device=boxes.device)
    near, far = draw.split(m, dim=2)
    side = torch.rand_like(far).round() * 2 - 1
    noise = torch.cat([near * 2 - 1, (far + 1) * side], dim=2)
    noisy = boxes.repeat(1, 2, 1) + noise * boxes.new_tensor(config.noise_scale)

    valid = torch.arange(m, device=boxes.device) < torch.tensor(known.counts, device=boxes.device)[:, None]
    valid = valid.repeat(1, 2)
    cost = box_cost(noisy, boxes, boxes.new_tensor(cost_weights).expand_as(boxes))
    assigned = assign(cost.masked_fill(~valid[..., None], torch.inf), known.counts)

    # In the row of a sample groups stand side by side: (num_groups, bs, 2m) -> (bs, num_groups * 2m).
    targets = _targets_at(known, assigned.transpose(0, 1).flatten(1), valid.repeat(1, num_groups), num_classes)
    anchor = F.pad(noisy.transpose(0, 1).flatten(1, 2), (0, VELOCITY.stop - dims))
    return Denoising(anchor, targets, num_groups)


def go_on(
    denoising: Denoising, known: KnownBoxes, recalled: DenoisingState, goes_on: Tensor, num_classes: int
) -> Denoising:
    """Let the first groups be those of the last frame, whose targets are where the same objects are now.

    Args:
        denoising: this frame's queries.
        known: this frame's targets.
        recalled: of the last frame, moved to this one.
        goes_on: (bs,) bool; False: the sample starts anew.
        num_classes: the label of the background, which an object that is gone becomes.
    """
    is_same = (recalled.instance_id[..., None] == known.instance_id[:, None]) & (recalled.instance_id >= 0)[..., None]
    same = torch.where(is_same.any(-1), is_same.int().argmax(-1), -1)
    now = _targets_at(known, same, recalled.valid, num_classes)
    continued = DenoisingTargets(*(_replace_first(new, old, goes_on) for new, old in zip(denoising.targets, now)))
    return denoising._replace(recalled=recalled, goes_on=goes_on, continued=continued)


def _targets_at(known: KnownBoxes, assigned: Tensor, valid: Tensor, num_classes: int) -> DenoisingTargets:
    """The targets that queries are assigned to, by index (bs, n); -1: background."""
    is_box, index = assigned >= 0, assigned.clamp(min=0)
    rows = index[..., None].expand(-1, -1, known.boxes.shape[-1])
    return DenoisingTargets(
        labels=torch.where(is_box, known.labels.gather(1, index), num_classes),
        boxes=known.boxes.gather(1, rows),
        weights=known.weights.gather(1, rows),
        instance_id=torch.where(is_box, known.instance_id.gather(1, index), -1),
        valid=valid,
    )


def _replace_first(new: Tensor, old: Tensor, goes_on: Tensor) -> Tensor:
    """New (bs, n, …), with old (bs, k, …) in place of the first k where a sample goes on."""
    joined = torch.cat([old.to(new.dtype), new[:, old.shape[1] :]], dim=1)
    return torch.where(goes_on.view(-1, *[1] * (new.dim() - 1)), joined, new)
