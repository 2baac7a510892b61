"""Loss terms that the heads share, one value an instance: the caller sums, weighs and divides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.ops.dtypes import at_least_float32

EPSILON = 1e-12


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss (Lin et al., arXiv 1708.02002).

    Args:
        logits: (..., num_classes).
        labels: (...) int64; what is no class, ``num_classes`` or a negative number, is background.

    Returns:
        (...), summed over the classes.
    """
    is_class = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    target = is_class.to(logits.dtype)
    score = logits.sigmoid()
    miss = torch.where(is_class, 1 - score, score)
    weight = torch.where(is_class, alpha, 1 - alpha) * miss**gamma
    return (weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum(-1)


def gaussian_focal_loss(score: Tensor, target: Tensor, alpha: float = 2.0, gamma: float = 4.0) -> Tensor:
    """The focal loss of CornerNet (arXiv 1808.01244), where targets near 1 are forgiven; elementwise."""
    positive = -(score + EPSILON).log() * (1 - score) ** alpha * (target == 1)
    negative = -(1 - score + EPSILON).log() * score**alpha * (1 - target) ** gamma
    return positive + negative


def mean_over_ranks(count: Tensor) -> Tensor:
    """A count averaged over the processes of a distributed training, at least 1."""
    count = count.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        count = count.clone()
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def layer_means(terms: Mapping[str, Tensor], depths: Sequence[int], counts: Tensor) -> dict[str, Tensor]:
    """Each layer's terms (layers, bs, n), added up and divided by the layer's count, under ``name_depth``."""
    return {
        f"{name}_{depth}": mean
        for name, layers in terms.items()
        for depth, mean in zip(depths, (layers.sum((1, 2)) / counts).unbind())
    }


def stack_layers(outputs: Mapping[str, Sequence]) -> tuple[list[int], Tensor, Tensor, Tensor | None]:
    """The layers that predicted classes: which, and their logits, anchors and quality (layers, bs, n, …), ≥ float32."""
    depths = [depth for depth, logits in enumerate(outputs["classification"]) if logits is not None]
    logits, anchors, quality = (
        [outputs[name][depth] for depth in depths] for name in ("classification", "prediction", "quality")
    )
    has_quality = all(layer is not None for layer in quality)
    return (
        depths,
        at_least_float32(torch.stack(logits)),
        at_least_float32(torch.stack(anchors)),
        at_least_float32(torch.stack(quality)) if has_quality else None,
    )
