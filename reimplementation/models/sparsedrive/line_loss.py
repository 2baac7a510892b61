"""Losses of the head for map lines: classes and points, of every decoder layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import MapHeadConfig
from .losses import focal_loss, layer_means, mean_over_ranks, stack_layers
from .matching import assign, focal_cost, line_cost
from .targets import PaddedTargets, rows_of


def line_losses(outputs: Mapping, targets: PaddedTargets, config: MapHeadConfig) -> dict[str, Tensor]:
    """The weighted terms of every layer that predicted classes.

    Args:
        outputs: of the head.
        targets: labels, and lines (bs, m, num_points, 2) in metres.
        config: of the head.

    Returns:
        ``loss_cls_0``, ``loss_line_0``, ``loss_cls_1``, …, scalars.
    """
    depths, logits, lines, _ = stack_layers(outputs)
    lines = normalised(lines.unflatten(-1, (config.num_points, 2)), config).flatten(-2)
    orders = normalised(permutations(targets.values), config).flatten(-2)

    distance, permutation = line_cost(lines, orders, config.beta)
    cost = config.cost_class * focal_cost(logits, targets.labels) + config.cost_line * distance
    assigned = assign(cost, targets.counts)
    matched = assigned >= 0
    labels = torch.where(matched, rows_of(targets.labels, assigned), len(config.classes))
    order = permutation.gather(-1, assigned.clamp(min=0)[..., None])
    target = rows_of(orders, assigned).take_along_dim(order[..., None], dim=-2).squeeze(-2)
    num_matched = mean_over_ranks(matched.sum((1, 2)))

    learns_line = matched & (logits.detach().amax(-1).sigmoid() > config.min_score_for_lines)
    difference = F.smooth_l1_loss(lines, target, beta=config.beta, reduction="none").sum(-1) / config.num_points
    terms = {
        "loss_cls": config.loss_class * focal_loss(logits, labels),
        "loss_line": config.loss_line * torch.where(learns_line, difference, 0),
    }
    return layer_means(terms, depths, num_matched)


def normalised(points: Tensor, config: MapHeadConfig) -> Tensor:
    """Points (..., 2) in metres as fractions of the window around the car, from its corner."""
    return points / points.new_tensor(config.extent) + 0.5


def permutations(lines: Tensor) -> Tensor:
    """Every order of points in which a line is the same line (MapTR, arXiv 2208.14437, section 3.2).

    Args:
        lines: (..., n, 2); a line whose last point is its first is closed.

    Returns:
        (..., 2 * (n - 1), n, 2): of a closed line, from every point on, in both directions. An open line has two
        orders, each repeated.
    """
    num_points = lines.shape[-2]
    place = torch.arange(num_points, device=lines.device)
    start = torch.arange(num_points - 1, device=lines.device)[:, None]
    around = (start + place) % (num_points - 1)
    closed = torch.cat([around, around.flip(-1)])
    open_ = torch.cat([place.expand_as(around), place.flip(-1).expand_as(around)])
    is_closed = torch.isclose(lines[..., 0, :], lines[..., -1, :]).all(-1)
    return torch.where(is_closed[..., None, None, None], lines[..., closed, :], lines[..., open_, :])
