"""Ground truth of a batch, padded to equal lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .config import BoxHeadConfig, MapHeadConfig
from .geometry import BOX_DIMS, encode_boxes

SMALL_CLASS_WEIGHTS = (2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)  # for the ten encoded values


class PaddedTargets(NamedTuple):
    """Targets of a batch side by side.

    labels  (bs, m) int64; padding has the class 0, for it is never looked at
    values  (bs, m, …), padding is zero
    counts  how many of a sample's are no padding
    """

    labels: Tensor
    values: Tensor
    counts: list[int]


def pad_boxes(targets: Mapping[str, Sequence[Tensor]], config: BoxHeadConfig, like: Tensor) -> PaddedTargets:
    """``labels_3d`` and ``boxes_3d`` (n, 9) of each sample, as `pad`; a size that is not positive is a ValueError."""
    padded = pad(targets, ("labels_3d", "boxes_3d"), (BOX_DIMS,), len(config.classes), like)
    for sample, boxes in enumerate(targets["boxes_3d"]):
        if (boxes[:, 3:6] <= 0).any():
            raise ValueError(f"boxes_3d[{sample}] must have positive sizes; got {boxes[:, 3:6].min().item()}")
    return padded


def pad_lines(targets: Mapping[str, Sequence[Tensor]], config: MapHeadConfig, like: Tensor) -> PaddedTargets:
    """``map_labels`` and ``map_lines`` (n, num_points, 2) of each sample, as `pad`."""
    return pad(targets, ("map_labels", "map_lines"), (config.num_points, 2), len(config.classes), like)


def pad(
    targets: Mapping[str, Sequence[Tensor]],
    names: tuple[str, str],
    shape: tuple[int, ...],
    num_classes: int,
    like: Tensor,
) -> PaddedTargets:
    """Pad lists over samples.

    Args:
        targets: the lists.
        names: which of them hold labels (n,) and values (n, *shape).
        shape: of a value.
        num_classes: a label is below it.
        like: predictions (bs, …), whose batch, dtype and device the targets are to have.

    Raises:
        ValueError: the lists do not fit one another or the batch, or a label is no class.
    """
    labels, values = (targets[name] for name in names)
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
    padded = pad_sequence([label.to(torch.int64) for label in labels], batch_first=True)
    padded_values = pad_sequence([value.to(like.dtype) for value in values], batch_first=True)
    if max(counts) == 0:  # a row of padding, so that an index of a batch without targets finds something
        padded, padded_values = (x.new_zeros(len(like), 1, *x.shape[2:]) for x in (padded, padded_values))
    return PaddedTargets(padded.to(like.device), padded_values.to(like.device), counts)  # one copy for all samples


def rows_of(values: Tensor, assigned: Tensor) -> Tensor:
    """Each prediction's target (layers, bs, n, …) out of values (bs, m, …), by index (layers, bs, n); -1: the first."""
    sample = torch.arange(len(values), device=values.device)[None, :, None]
    return values[sample, assigned.clamp(min=0)]


def encoded_boxes(targets: PaddedTargets, config: BoxHeadConfig) -> tuple[Tensor, Tensor]:
    """Boxes as the network predicts them, and what each value counts, both (bs, m, 10).

    A value that is not known counts nothing; of a traffic cone the heading does not.
    """
    row = torch.arange(targets.labels.shape[1], device=targets.labels.device)
    is_padding = row >= torch.tensor(targets.counts, device=row.device)[:, None]
    encoded = encode_boxes(torch.where(is_padding[..., None], 1, targets.values))  # padding has a logarithm then
    is_small = torch.isin(targets.labels, class_indices(config.small_classes, config, targets.labels))
    weights = torch.where(is_small[..., None], encoded.new_tensor(SMALL_CLASS_WEIGHTS), 1)
    return encoded.nan_to_num(), torch.where(encoded.isnan(), 0, weights)


def class_indices(names: Sequence[str], config: BoxHeadConfig, like: Tensor) -> Tensor:
    """The places of classes in the configuration's list, int64."""
    return like.new_tensor([config.classes.index(name) for name in names])
