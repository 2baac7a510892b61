"""Synthetic frames as a network takes them, with their targets."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reimplementation.data.rendering import Rendering, render
from reimplementation.data.synthetic import Drive, Moment, synthetic_rig
from reimplementation.models.sparsedrive.config import SparseDriveConfig

from .config import DataConfig
from .map_metrics import resample

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's red, green and blue, in 0..255
SECONDS_BETWEEN_PASSES = 1e4  # when a drive is driven again, it is long after


class Batch(NamedTuple):
    """Frames side by side, as `SparseDrive.forward` and `SparseDrive.loss` take them.

    pictures  (bs, num_cams, H, W, 3) uint8, what ``images`` were made of
    """

    images: Tensor
    metas: dict[str, Tensor]
    targets: dict[str, list[Tensor]]
    pictures: Tensor


class SyntheticFrames:
    """Frames of synthetic drives, by the drive's number and the frame's.

    Args:
        data: how the frames are.
        model: the detector that takes them: its classes, its points a line, its levels of depth.
        device: where they are drawn, and the batch is.
        held_out: of the town that no training sees.
    """

    def __init__(
        self, data: DataConfig, model: SparseDriveConfig, device: torch.device | str, *, held_out: bool = False
    ):
        self.data, self.model, self.device = data, model, torch.device(device)
        self.rig = synthetic_rig(*data.image_wh)
        if len(self.rig.cameras) != model.num_cams:
            raise ValueError(f"synthetic drives have {len(self.rig.cameras)} cameras; the model has {model.num_cams}")
        town = 2 * data.seed + held_out
        self._drive = functools.lru_cache(maxsize=256)(lambda index: Drive(index, town, data.frames_per_drive))

    def batch(self, places: Sequence[tuple[int, int]], passes: Sequence[int] | None = None) -> Batch:
        """The frames at places (drive, frame), each driven for the nth time, 0 by default."""
        moments = [self._drive(drive).moment(frame) for drive, frame in places]
        rendering = render(moments, self.rig, self.device)
        delay = SECONDS_BETWEEN_PASSES * np.array(passes if passes is not None else [0] * len(places))
        return Batch(
            images=normalised(rendering.images),
            metas=self._metas(moments, delay),
            targets=self._targets(moments, rendering),
            pictures=rendering.images,
        )

    def _metas(self, moments: Sequence[Moment], delay: np.ndarray) -> dict[str, Tensor]:
        count = len(moments)
        focal = np.array([camera.intrinsics[0, 0] for camera in self.rig.cameras])
        metas = {
            "projection_mat": torch.from_numpy(self.rig.projection_mat).float().repeat(count, 1, 1, 1),
            "image_wh": torch.from_numpy(self.rig.image_wh).float().repeat(count, 1, 1),
            "focal": torch.from_numpy(focal).float().repeat(count, 1),
            "timestamp": torch.from_numpy(np.array([moment.timestamp for moment in moments]) + delay),
            "T_global": torch.from_numpy(np.stack([moment.T_global for moment in moments])),
        }
        return {name: tensor.to(self.device) for name, tensor in metas.items()}

    def _targets(self, moments: Sequence[Moment], rendering: Rendering) -> dict[str, list[Tensor]]:
        targets: dict[str, list[Tensor]] = {"labels_3d": [], "boxes_3d": [], "instance_id": []}
        for moment, num_points in zip(moments, rendering.num_points.cpu().numpy()):
            objects = moment.objects
            distance = np.linalg.norm(objects.center[:, :2], axis=1)
            kept = (num_points[: len(objects.label)] > 0) & (distance < self.model.det.max_distance)
            boxes = np.concatenate([objects.center, objects.size, objects.yaw[:, None], objects.velocity], axis=1)
            targets["labels_3d"].append(torch.from_numpy(objects.label[kept]).to(self.device))
            targets["boxes_3d"].append(torch.from_numpy(boxes[kept]).float().to(self.device))
            targets["instance_id"].append(torch.from_numpy(objects.instance_id[kept]).to(self.device))
        if self.model.map is not None:
            num_points = self.model.map.num_points
            targets["map_labels"] = [torch.from_numpy(moment.map_labels).to(self.device) for moment in moments]
            lines = [np.concatenate([resample(line[None], num_points) for line in m.map_lines]) for m in moments]
            targets["map_lines"] = [torch.from_numpy(of_moment).float().to(self.device) for of_moment in lines]
        if self.model.num_depth_levels > 0:
            measured = torch.where(rendering.depth <= self.model.max_depth, rendering.depth, 0)
            strides = [4 * 2**level for level in range(self.model.num_depth_levels)]
            targets["depth"] = [measured[:, :, ::stride, ::stride] for stride in strides]
        return targets


def slots_of(rank: int, world_size: int, batch_size: int) -> range:
    """The sample slots of a batch that a process works on.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    if batch_size % world_size:
        raise ValueError(f"batch_size must be a multiple of the {world_size} processes; got {batch_size}")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def places_at(step: int, slots: Sequence[int], batch_size: int, data: DataConfig) -> tuple[list, list[int]]:
    """Which drive and frame each slot is at, and how often that drive was driven before.

    A slot follows a drive from its first frame to its last, then goes on with another. Slots start at different frames,
    so that a batch is never all beginnings.
    """
    places, passes = [], []
    for slot in slots:
        lap, frame = divmod(step + slot * data.frames_per_drive // batch_size, data.frames_per_drive)
        drive = lap * batch_size + slot
        places.append((drive if data.num_drives is None else drive % data.num_drives, frame))
        passes.append(0 if data.num_drives is None else drive // data.num_drives)
    return places, passes


def normalised(pictures: Tensor) -> Tensor:
    """Images (..., 3, H, W) float32 of pictures (..., H, W, 3) uint8, by ImageNet's mean and deviation."""
    mean, deviation = (torch.tensor(values, device=pictures.device) for values in (MEAN, DEVIATION))
    return ((pictures.float() - mean) / deviation).movedim(-1, -3).contiguous()
