"""Ground truth of a batch, padded to equal lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


class PaddedTargets(NamedTuple):
    """Targets of a batch side by side.

    labels  (bs, m) int64; padding has the class 0, for it is never looked at
    values  (bs, m, …), padding is zero
    counts  how many of a sample's are no padding
    """

    labels: Tensor
    values: Tensor
    counts: list[int]


def pad(
    names: tuple[str, str],
    labels: Sequence[Tensor],
    values: Sequence[Tensor],
    shape: tuple[int, ...],
    num_classes: int,
    like: Tensor,
) -> PaddedTargets:
    """Pad lists over samples.

    Args:
        names: how the two lists are called.
        labels: per sample (n,), classes.
        values: per sample (n, *shape).
        shape: of a value.
        num_classes: a label is below it.
        like: predictions (bs, …), whose batch, dtype and device the targets are to have.

    Raises:
        ValueError: the lists do not fit one another or the batch, or a label is no class.
    """
    if len(labels) != len(like) or len(values) != len(like):
        raise ValueError(
            f"{names[0]} and {names[1]} must hold an entry for each of {len(like)} samples; "
            f"got {len(labels)} and {len(values)}"
        )
    for sample, (label, value) in enumerate(zip(labels, values)):
        if label.dim() != 1 or value.shape != (len(label), *shape):
            raise ValueError(
                f"{names[0]}[{sample}] must be (n,) and {names[1]}[{sample}] (n, {', '.join(map(str, shape))}); "
                f"got {tuple(label.shape)} and {tuple(value.shape)}"
            )
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
            raise ValueError(
                f"{names[0]}[{sample}] must be in [0, {num_classes}); got {int(label.min())} to {int(label.max())}"
            )
    counts = [len(label) for label in labels]
    padded = pad_sequence([label.to(like.device, torch.int64) for label in labels], batch_first=True)
    padded_values = pad_sequence([value.to(like) for value in values], batch_first=True)
    if max(counts) == 0:  # a row of padding, so that an index of a batch without targets finds something
        padded, padded_values = (x.new_zeros(len(like), 1, *x.shape[2:]) for x in (padded, padded_values))
    return PaddedTargets(padded, padded_values, counts)


def rows_of(values: Tensor, assigned: Tensor) -> Tensor:
    """Each prediction's target (layers, bs, n, …) out of values (bs, m, …), by index (layers, bs, n); -1: the first."""
    sample = torch.arange(len(values), device=values.device)[None, :, None]
    return values[sample, assigned.clamp(min=0)]
