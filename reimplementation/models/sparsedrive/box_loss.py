"""Losses of the head for boxes: classes, boxes and their quality, of every decoder layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.ops.box_key_points import CENTRE, SIN_COS_YAW

from .config import BoxHeadConfig
from .denoising import DenoisingTargets
from .geometry import ENCODED_DIMS
from .losses import focal_loss, gaussian_focal_loss, layer_means, mean_over_ranks, stack_layers
from .matching import assign, box_cost, focal_cost
from .targets import PaddedTargets, class_indices, encoded_boxes, rows_of


def box_losses(outputs: Mapping, targets: PaddedTargets, config: BoxHeadConfig) -> dict[str, Tensor]:
    """The weighted terms of every layer that predicted classes.

    Args:
        outputs: of the head.
        targets: labels, and boxes (bs, m, 9) whose unknown values are NaN.
        config: of the head.

    Returns:
        ``loss_cls_0``, ``loss_box_0``, ``loss_cns_0`` (centerness), ``loss_yns_0`` (yawness), ``loss_cls_1``, …,
        scalars; with denoising queries ``loss_cls_dn_0``, ``loss_box_dn_0``, … too.
    """
    depths, logits, boxes, quality = stack_layers(outputs)
    boxes = boxes[..., :ENCODED_DIMS]
    encoded, weights = encoded_boxes(targets, config)

    cost = config.cost_class * focal_cost(logits, targets.labels) + config.cost_box * box_cost(
        boxes, encoded, weights * weights.new_tensor(config.cost_weights)
    )
    assigned = assign(cost, targets.counts)
    matched = assigned >= 0
    labels = torch.where(matched, rows_of(targets.labels, assigned), len(config.classes))
    target = turned_where_symmetric(rows_of(encoded, assigned), boxes, labels, config)
    weights = rows_of(weights, assigned) * weights.new_tensor(config.loss_weights)
    num_matched = mean_over_ranks(matched.sum((1, 2)))
    learns_box = matched & (logits.detach().amax(-1).sigmoid() > config.min_score_for_boxes)

    distance = ((boxes - target).abs() * weights).sum(-1)
    terms = {
        "loss_cls": config.loss_class * focal_loss(logits, labels),
        "loss_box": config.loss_box * torch.where(learns_box, distance, 0),
    }
    if quality is not None:
        centerness, yawness = quality_losses(quality, boxes, target)
        terms["loss_cns"] = config.loss_centerness * torch.where(learns_box, centerness, 0)
        terms["loss_yns"] = config.loss_yawness * torch.where(learns_box, yawness, 0)
    losses = layer_means(terms, depths, num_matched)
    return losses | (denoising_losses(outputs["denoising"], config) if "denoising" in outputs else {})


def denoising_losses(outputs: Mapping, config: BoxHeadConfig) -> dict[str, Tensor]:
    """Class and box terms of the denoising queries, whose targets are known without matching.

    Their divisor is the number of queries, those of the background included, as in Sparse4Dv3's training.
    """
    depths, logits, boxes, _ = stack_layers(outputs)
    terms: dict[str, Tensor] = {}
    for depth, layer_logits, layer_boxes in zip(depths, logits, boxes):
        targets: DenoisingTargets = outputs["targets"][depth]
        num_valid = mean_over_ranks(targets.valid.sum())
        weights = targets.weights * targets.weights.new_tensor(config.loss_weights)
        classes = torch.where(targets.valid, focal_loss(layer_logits, targets.labels), 0)
        distance = ((layer_boxes[..., :ENCODED_DIMS] - targets.boxes).abs() * weights).sum(-1)
        distance = torch.where(targets.labels < len(config.classes), distance, 0)
        terms[f"loss_cls_dn_{depth}"] = config.loss_class * classes.sum() / num_valid
        terms[f"loss_box_dn_{depth}"] = config.loss_box * distance.sum() / num_valid
    return terms


def turned_where_symmetric(target: Tensor, boxes: Tensor, labels: Tensor, config: BoxHeadConfig) -> Tensor:
    """Targets whose heading is turned by half a circle where that is nearer and the class looks the same both ways."""
    is_symmetric = torch.isin(labels, class_indices(config.symmetric_classes, config, labels))
    points_away = (target[..., SIN_COS_YAW] * boxes.detach()[..., SIN_COS_YAW]).sum(-1) < 0
    before, heading, behind = target.split((6, 2, target.shape[-1] - 8), dim=-1)
    heading = torch.where((is_symmetric & points_away)[..., None], -heading, heading)
    return torch.cat([before, heading, behind], dim=-1)


def quality_losses(quality: Tensor, boxes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (...) of centerness and yawness logits (..., 2) of boxes that have these targets.

    Centerness is to be exp(-distance of the centres), yawness whether the headings are less than a right angle apart.
    Both are constants here: a box is not moved in order to be as good as was said.
    """
    boxes = boxes.detach()
    centerness, yawness = quality.unbind(-1)
    nearness = (-torch.linalg.vector_norm(boxes[..., CENTRE] - target[..., CENTRE], dim=-1)).exp()
    agrees = (boxes[..., SIN_COS_YAW] * target[..., SIN_COS_YAW]).sum(-1) > 0
    return (
        F.binary_cross_entropy_with_logits(centerness, nearness, reduction="none"),
        gaussian_focal_loss(yawness.sigmoid(), agrees.to(quality.dtype)),
    )
