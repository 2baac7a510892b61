"""Which prediction answers for which target: the assignment of least cost (DETR, arXiv 2005.12872, section 3.1)."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

EPSILON = 1e-12
UNUSABLE = 1e8  # the cost of a pair whose cost is no number


def focal_cost(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """What the focal loss would change if a prediction had a target's class.

    Args:
        logits: (..., n, num_classes).
        labels: (..., m) int64.

    Returns:
        (..., n, m).
    """
    score = logits.sigmoid()
    positive = -(score + EPSILON).log() * alpha * (1 - score) ** gamma
    negative = -(1 - score + EPSILON).log() * (1 - alpha) * score**gamma
    index = labels[..., None, :].expand(*score.shape[:-1], labels.shape[-1])
    return (positive - negative).gather(-1, index)


def box_cost(predictions: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of absolute differences.

    Args:
        predictions: (..., n, d).
        targets: (..., m, d).
        weights: (..., m, d).

    Returns:
        (..., n, m).
    """
    return ((predictions[..., :, None, :] - targets[..., None, :, :]).abs() * weights[..., None, :, :]).sum(-1)


def line_cost(predictions: Tensor, targets: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Smooth L1 distance a point to the nearest of a target's permutations.

    Args:
        predictions: (..., n, d), d = 2 coordinates x points.
        targets: (..., m, p, d), the same line in p orders.
        beta: below it the distance is quadratic.

    Returns:
        (..., n, m), and the permutation (..., n, m) int64.
    """
    best = predictions.new_full((*predictions.shape[:-1], targets.shape[-3]), torch.inf)
    permutation = torch.zeros_like(best, dtype=torch.int64)
    for order in range(targets.shape[-2]):  # one after another: all together take p times the memory
        difference = (predictions[..., :, None, :] - targets[..., None, :, order, :]).abs()
        distance = torch.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta).sum(-1)
        permutation = torch.where(distance < best, order, permutation)
        best = torch.minimum(best, distance)
    return best / (predictions.shape[-1] // 2), permutation


def assign(cost: Tensor, counts: list[int]) -> Tensor:
    """The target of every prediction, such that the costs add up to the least.

    The Hungarian method runs on the CPU (scipy, of the extra ``train``): all costs travel there in one copy, and as
    many samples are solved at a time as there are processors.

    Args:
        cost: (layers, bs, n, m).
        counts: how many of the m columns of each sample hold targets.

    Returns:
        (layers, bs, n) int64 on the cost's device: a column, or -1.
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    usable = _on_host(torch.where(cost.isfinite(), cost, UNUSABLE).detach()).flatten(0, 1).numpy()
    assigned = torch.full(cost.shape[:3], -1)
    each = [of_sample[:, :count] for of_sample, count in zip(usable, counts * len(cost))]
    for sample, (row, column) in zip(assigned.flatten(0, 1), _threads().map(linear_sum_assignment, each)):
        sample[row] = torch.from_numpy(column)
    return assigned.to(cost.device)


def _on_host(costs: Tensor) -> Tensor:
    """A copy in memory that a GPU writes at full speed."""
    if not costs.is_cuda:
        return costs
    return torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True).copy_(costs)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The threads that solve, during which scipy lets others run."""
    return ThreadPoolExecutor(thread_name_prefix="assign")
