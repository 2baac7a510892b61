"""Frames of synthetic drives as a network takes them, with their targets."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from reimplementation.data.rendering import Rendering, render
from reimplementation.data.synthetic import CLASSES, Drive, Moment, synthetic_rig
from reimplementation.models.sparsedrive.config import SparseDriveConfig

from .batches import SECONDS_BETWEEN_PASSES, Batch, normalised, on_device
from .config import DataConfig
from .map_metrics import resample

SEEN_DRIVES = 64  # are looked at to know where boxes are


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
        names = model.det.classes
        self._label = np.array([names.index(name) if name in names else -1 for name in CLASSES])
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

    def boxes(self, drive: int) -> Iterator[np.ndarray]:
        """The boxes (n, 9) of every frame of a drive, seen or not."""
        for frame in range(self.data.frames_per_drive):
            yield _boxes_of(self._drive(drive).moment(frame))

    def _metas(self, moments: Sequence[Moment], delay: np.ndarray) -> dict[str, Tensor]:
        count = len(moments)
        focal = np.array([camera.intrinsics[0, 0] for camera in self.rig.cameras])
        of_rig = {"projection_mat": self.rig.projection_mat, "image_wh": self.rig.image_wh, "focal": focal}
        metas = {name: on_device(np.stack([x] * count), self.device, torch.float32) for name, x in of_rig.items()}
        times = np.array([moment.timestamp for moment in moments]) + delay
        poses = np.stack([moment.T_global for moment in moments])
        return metas | {"timestamp": on_device(times, self.device), "T_global": on_device(poses, self.device)}

    def _targets(self, moments: Sequence[Moment], rendering: Rendering) -> dict[str, list[Tensor]]:
        targets: dict[str, list[Tensor]] = {"labels_3d": [], "boxes_3d": [], "instance_id": []}
        for moment, num_points in zip(moments, rendering.num_points.cpu().numpy()):
            objects = moment.objects
            distance = np.linalg.norm(objects.center[:, :2], axis=1)
            kept = (num_points[: len(objects.label)] > 0) & (distance < self.model.det.max_distance)
            label = self._label[objects.label]
            kept &= label >= 0
            targets["labels_3d"].append(torch.from_numpy(label[kept]))
            targets["boxes_3d"].append(torch.from_numpy(_boxes_of(moment)[kept]).float())
            targets["instance_id"].append(torch.from_numpy(objects.instance_id[kept]))
        if self.model.map is not None:
            num_points = self.model.map.num_points
            targets["map_labels"] = [torch.from_numpy(moment.map_labels) for moment in moments]
            lines = [np.concatenate([resample(line[None], num_points) for line in m.map_lines]) for m in moments]
            targets["map_lines"] = [torch.from_numpy(of_moment).float() for of_moment in lines]
        if self.model.num_depth_levels > 0:
            measured = torch.where(rendering.depth <= self.model.max_depth, rendering.depth, 0)
            strides = [4 * 2**level for level in range(self.model.num_depth_levels)]
            targets["depth"] = [measured[:, :, ::stride, ::stride] for stride in strides]
        return targets


class SyntheticTraining:
    """`Frames` of synthetic drives, for some slots of a batch.

    Args:
        frames: of the town.
        slots: of the batch.
        batch_size: of all processes together.
    """

    def __init__(self, frames: SyntheticFrames, slots: Sequence[int], batch_size: int):
        self._frames, self._slots, self._batch_size = frames, slots, batch_size

    def boxes(self) -> Iterator[np.ndarray]:
        """The boxes (n, 9) of drives from beginning to end, of `SEEN_DRIVES` at most."""
        count = self._frames.data.num_drives
        for drive in range(SEEN_DRIVES if count is None else min(count, SEEN_DRIVES)):
            yield from self._frames.boxes(drive)

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        return self._frames.batch(*places_at(step, self._slots, self._batch_size, self._frames.data))


class HeldOutDrives:
    """`HeldOutFrames` of synthetic drives, a drive a slot, in a town that no training sees; or those that are learnt.

    Args:
        data, model, device: as for `SyntheticFrames`.
    """

    def __init__(self, data: DataConfig, model: SparseDriveConfig, device: torch.device | str):
        self._frames = SyntheticFrames(data, model, device, held_out=not data.validate_on_learnt)
        self.num_slots, self.num_batches = data.num_validation_drives, data.frames_per_drive

    def at(self, number: int) -> tuple[Batch, np.ndarray]:
        """The frames of this number of all drives."""
        batch = self._frames.batch([(drive, number) for drive in range(self.num_slots)])
        return batch, np.ones(self.num_slots, dtype=bool)


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


def _boxes_of(moment: Moment) -> np.ndarray:
    """(n, 9): x, y, z, sizes, yaw, vx, vy."""
    objects = moment.objects
    return np.concatenate([objects.center, objects.size, objects.yaw[:, None], objects.velocity], axis=1)
