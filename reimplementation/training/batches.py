"""Frames side by side, as a detector takes them, whatever they were made of."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reimplementation.data.synthetic import CLASSES

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's red, green and blue, in 0..255
SECONDS_BETWEEN_PASSES = 1e4  # when a sequence is seen again, it is long after


class Batch(NamedTuple):
    """Frames side by side, as `SparseDrive.forward` and `SparseDrive.loss` take them.

    images    (bs, num_cams, 3, H, W) float32, normalised
    pictures  (bs, num_cams, H, W, 3) uint8, what ``images`` were made of
    targets   on the CPU, where they are looked at and padded, but for maps of depth
    """

    images: Tensor
    metas: dict[str, Tensor]
    targets: dict[str, list[Tensor]]
    pictures: Tensor


class Stream:
    """Samples of a data set, step after step, which other processes read ahead.

    Args:
        dataset: whose samples a batch is made of.
        places: which samples a step wants.
        num_workers: how many processes read; 0: this one does, when it is asked.
    """

    def __init__(self, dataset: Dataset, places: Callable[[int], list], num_workers: int):
        self._dataset, self._places, self._num_workers = dataset, places, num_workers
        self._next_step: int | None = None
        self._samples: Iterator[list] = iter(())

    def at(self, step: int) -> list:
        """A step's samples. The step behind the last one is at hand; any other begins anew."""
        if step != self._next_step:
            self._samples = iter(self._loader(step))
        self._next_step = step + 1
        return next(self._samples)

    def _loader(self, first_step: int) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_sampler=map(self._places, itertools.count(first_step)),
            num_workers=self._num_workers,
            collate_fn=list,
            worker_init_fn=_leave_the_group,
            generator=torch.Generator(),  # not the one that the training draws from
        )


def _leave_the_group(_number: int) -> None:
    """A signal to all processes of a terminal or a job is the training's to hear, which then finishes its step."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


class Frames(Protocol):
    """What a training learns from."""

    def at(self, step: int) -> Batch:
        """The batch of a step: the same whenever it is asked for."""

    def boxes(self) -> Iterator[np.ndarray]:
        """The boxes (n, 9) of some or all frames, to know where boxes are."""


class HeldOutFrames(Protocol):
    """What a detector is judged by: slots side by side, in each of which sequences follow one another.

    num_slots    the batch's size
    num_batches  how many batches there are
    """

    num_slots: int
    num_batches: int

    def at(self, number: int) -> tuple[Batch, np.ndarray]:
        """A batch, and which slots count, (num_slots,) bool: one whose sequences have ended repeats its last frame."""


def label_of_class(names: Sequence[str]) -> np.ndarray:
    """Of each of `data.synthetic.CLASSES`, its place among a detector's classes; -1 where it is none of them."""
    return np.array([names.index(name) if name in names else -1 for name in CLASSES])


def depth_strides(num_levels: int) -> list[int]:
    """Pixels of an image to one of a map of depth, level by level."""
    return [4 * 2**level for level in range(num_levels)]


def normalised(pictures: Tensor) -> Tensor:
    """Images (..., 3, H, W) float32 of pictures (..., H, W, 3) uint8, by ImageNet's mean and deviation."""
    planes = zip(pictures.unbind(-1), MEAN, DEVIATION)
    return torch.stack([(plane.float() - mean) / deviation for plane, mean, deviation in planes], dim=-3)


def on_device(array: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of an array. It travels from memory that neither the host nor a GPU has to wait for."""
    tensor = torch.from_numpy(array) if dtype is None else torch.from_numpy(array).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def slots_of(rank: int, world_size: int, batch_size: int) -> range:
    """The sample slots of a batch that a process works on.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of the {world_size} processes; got {batch_size}")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)
