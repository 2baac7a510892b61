"""From the outputs of a head to boxes and lines in metres."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .geometry import BOX_DIMS, decode_boxes


def decode_detections(outputs: Mapping, num_outputs: int) -> list[dict[str, Tensor]]:
    """Boxes of the last layer.

    With ids an instance is a box of its best class; without, it may be one of every class. The best ``num_outputs`` are
    taken by class score, then scored again: times the centerness, where there is one (Sparse4Dv3, section 3.2).

    Returns:
        Per sample, best first: ``boxes_3d`` (k, 9), the form of the targets; ``scores_3d`` (k,) in [0, 1];
        ``labels_3d`` (k,) int64; ``instance_ids`` (k,) int64, where there are ids.
    """
    scores = outputs["classification"][-1].float().sigmoid()
    ids = outputs.get("instance_id")
    if ids is None:
        score, instance, label = _best_pairs(scores, num_outputs)
    else:
        score, label = scores.max(dim=-1)
        score, instance = score.topk(min(num_outputs, score.shape[1]), dim=1)
        label = label.gather(1, instance)
    quality = outputs["quality"][-1]
    if quality is not None:
        centerness = quality[..., 0].float().sigmoid().gather(1, instance)
        score, order = (score * centerness).sort(dim=1, descending=True)
        instance, label = instance.gather(1, order), label.gather(1, order)
    anchors = outputs["prediction"][-1]
    boxes = decode_boxes(anchors.gather(1, instance[..., None].expand(-1, -1, anchors.shape[-1])))[..., :BOX_DIMS]
    found = {"boxes_3d": boxes, "scores_3d": score, "labels_3d": label}
    if ids is not None:
        found["instance_ids"] = ids.gather(1, instance)
    return _per_sample(found)


def decode_lines(outputs: Mapping) -> list[dict[str, Tensor]]:
    """Lines of the last layer; an instance may be one of every class.

    Returns:
        Per sample, best first, as many as there are instances: ``map_lines`` (k, num_points, 2) in metres,
        ``map_scores`` (k,) in [0, 1], ``map_labels`` (k,) int64.
    """
    scores = outputs["classification"][-1].float().sigmoid()
    score, instance, label = _best_pairs(scores, scores.shape[1])
    anchors = outputs["prediction"][-1]
    lines = anchors.gather(1, instance[..., None].expand(-1, -1, anchors.shape[-1])).unflatten(-1, (-1, 2))
    return _per_sample({"map_lines": lines, "map_scores": score, "map_labels": label})


def _best_pairs(scores: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, instances and classes (bs, k) of the best pairs of instance and class."""
    num_classes = scores.shape[-1]
    score, pair = scores.flatten(1).topk(min(count, scores[0].numel()), dim=1)
    return score, torch.div(pair, num_classes, rounding_mode="floor"), pair % num_classes


def _per_sample(found: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(found, parts)) for parts in zip(*found.values())]
