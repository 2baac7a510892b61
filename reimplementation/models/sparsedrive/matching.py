"""Which prediction answers for which target: the assignment of least cost (DETR, arXiv 2005.12872, section 3.1).

Costs have no gradients.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MOST_THREADS = 32  # as many as a pool has by default, whatever the machine
THREADS = min(os.cpu_count() or 1, MOST_THREADS)
EPSILON = 1e-12
UNUSABLE = 1e8  # the cost of a pair whose cost is no number


@torch.no_grad()
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


@torch.no_grad()
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


@torch.no_grad()
def line_cost(predictions: Tensor, targets: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Smooth L1 distance a point to the nearest of a target's permutations.

    Args:
        predictions: (..., n, d), d = 2 coordinates x points.
        targets: (..., m, p, d), the same line in p orders.
        beta: below it the distance is quadratic.

    Returns:
        (..., n, m), and the permutation (..., n, m) int64.
    """
    distances = []
    for in_order in targets.unbind(-2):  # one after another: all together take p times the memory
        prediction, target = torch.broadcast_tensors(predictions[..., :, None, :], in_order[..., None, :, :])
        distances.append(F.smooth_l1_loss(prediction, target, reduction="none", beta=beta).sum(-1))
    nearest, permutation = torch.stack(distances).min(0)
    return nearest / (predictions.shape[-1] // 2), permutation


def assign(cost: Tensor, counts: list[int]) -> Tensor:
    """The target of every prediction, such that the costs add up to the least.

    The Hungarian method runs on the CPU (scipy, of the extra ``train``): all costs travel there in one copy, and each
    thread solves its share of the samples.

    Args:
        cost: (layers, bs, n, m).
        counts: how many of the m columns of each sample hold targets.

    Returns:
        (layers, bs, n) int64 on the cost's device: a column, or -1.
    """
    usable = _on_host(torch.where(cost.isfinite(), cost, UNUSABLE).detach()).flatten(0, 1).numpy()
    costs = [of_sample[:, :count] for of_sample, count in zip(usable, counts * len(cost))]
    assigned = np.full(usable.shape[:2], -1, dtype=np.int64)
    shares = [slice(first, None, THREADS) for first in range(THREADS)]
    list(_threads().map(_assign_each, [costs[share] for share in shares], [assigned[share] for share in shares]))
    return torch.from_numpy(assigned).view(cost.shape[:3]).to(cost.device)


def _assign_each(costs: list[np.ndarray], assigned: np.ndarray) -> None:
    """Write the columns of the least costs (n, m) into the rows (n,), which hold -1."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    for cost, columns in zip(costs, assigned):
        row, column = linear_sum_assignment(cost)
        columns[row] = column


def _on_host(costs: Tensor) -> Tensor:
    """A copy in memory that a GPU writes at full speed."""
    if not costs.is_cuda:
        return costs
    return torch.empty(costs.shape, dtype=costs.dtype, pin_memory=True).copy_(costs)


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """The threads that solve, during which scipy lets others run."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="assign")
