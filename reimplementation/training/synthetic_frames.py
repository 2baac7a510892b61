"""Frames of synthetic drives as a network takes them, with their targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reimplementation.data.rendering import Rendering, render
from reimplementation.data.synthetic import Drive, Moment, synthetic_rig
from reimplementation.models.sparsedrive.config import SparseDriveConfig

from .batches import SECONDS_BETWEEN_PASSES, Batch, Stream, depth_strides, label_of_class, normalised, on_device
from .config import DataConfig
from .map_metrics import resample

SEEN_DRIVES = 64  # are looked at to know where boxes are


class Place(NamedTuple):
    """Where a slot is: a drive, a frame of it, and how often it was driven before."""

    drive: int
    frame: int
    lap: int = 0


class Scene(NamedTuple):
    """What is where in a frame, still undrawn; map lines (m, num_points, 2) have as many points as the network's."""

    moment: Moment
    lines: np.ndarray
    delay: float


class DriveReader(Dataset):
    """Works out frames of synthetic drives by their places.

    Args:
        data: how the frames are.
        num_points: of a map line.
        held_out: of the town that no training sees.
    """

    def __init__(self, data: DataConfig, num_points: int, *, held_out: bool = False):
        self._data, self._num_points, self._town = data, num_points, 2 * data.seed + held_out

    def moment(self, place: Place) -> Moment:
        """What is where in a frame."""
        return self._drive(place.drive).moment(place.frame)

    def __getitem__(self, place: Place) -> Scene:
        moment = self.moment(place)
        lines = [resample(line[None], self._num_points) for line in moment.map_lines]
        return Scene(moment, np.concatenate(lines), SECONDS_BETWEEN_PASSES * place.lap)

    @functools.lru_cache(maxsize=256)  # noqa: B019 -- it lives as long as the training
    def _drive(self, index: int) -> Drive:
        return Drive(index, self._town, self._data.frames_per_drive)


class SyntheticFrames:
    """Batches of synthetic drives.

    Args:
        data: how the frames are.
        model: the detector that takes them: its classes, its points a line, its levels of depth.
        device: where they are drawn, and the batch is.
        places: which frames a step wants.
        held_out: of the town that no training sees.
    """

    def __init__(
        self,
        data: DataConfig,
        model: SparseDriveConfig,
        device: torch.device | str,
        places: Callable[[int], list[Place]],
        *,
        held_out: bool = False,
    ):
        self.data, self.model, self.device = data, model, torch.device(device)
        self.rig = synthetic_rig(*data.image_wh)
        if len(self.rig.cameras) != model.num_cams:
            raise ValueError(f"synthetic drives have {len(self.rig.cameras)} cameras; the model has {model.num_cams}")
        self._label = label_of_class(model.det.classes)
        self._reader = DriveReader(data, model.map.num_points if model.map else 2, held_out=held_out)
        self._stream = Stream(self._reader, places, data.num_workers)

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        scenes = self._stream.at(step)
        rendering = render([scene.moment for scene in scenes], self.rig, self.device)
        return Batch(
            images=normalised(rendering.images),
            metas=self._metas(scenes),
            targets=self._targets(scenes, rendering),
            pictures=rendering.images,
        )

    def boxes(self) -> Iterator[np.ndarray]:
        """The boxes (n, 9) of drives from beginning to end, of `SEEN_DRIVES` at most."""
        count = self.data.num_drives
        for drive in range(SEEN_DRIVES if count is None else min(count, SEEN_DRIVES)):
            for frame in range(self.data.frames_per_drive):
                yield _boxes_of(self._reader.moment(Place(drive, frame)))

    def _metas(self, scenes: Sequence[Scene]) -> dict[str, Tensor]:
        count = len(scenes)
        focal = np.array([camera.intrinsics[0, 0] for camera in self.rig.cameras])
        of_rig = {"projection_mat": self.rig.projection_mat, "image_wh": self.rig.image_wh, "focal": focal}
        metas = {name: on_device(np.stack([x] * count), self.device, torch.float32) for name, x in of_rig.items()}
        times = np.array([scene.moment.timestamp + scene.delay for scene in scenes])
        poses = np.stack([scene.moment.T_global for scene in scenes])
        return metas | {"timestamp": on_device(times, self.device), "T_global": on_device(poses, self.device)}

    def _targets(self, scenes: Sequence[Scene], rendering: Rendering) -> dict[str, list[Tensor]]:
        targets: dict[str, list[Tensor]] = {"labels_3d": [], "boxes_3d": [], "instance_id": []}
        for (moment, *_), num_points in zip(scenes, rendering.num_points.cpu().numpy()):
            objects = moment.objects
            distance = np.linalg.norm(objects.center[:, :2], axis=1)
            kept = (num_points[: len(objects.label)] > 0) & (distance < self.model.det.max_distance)
            label = self._label[objects.label]
            kept &= label >= 0
            targets["labels_3d"].append(torch.from_numpy(label[kept]))
            targets["boxes_3d"].append(torch.from_numpy(_boxes_of(moment)[kept]).float())
            targets["instance_id"].append(torch.from_numpy(objects.instance_id[kept]))
        if self.model.map is not None:
            targets["map_labels"] = [torch.from_numpy(scene.moment.map_labels) for scene in scenes]
            targets["map_lines"] = [torch.from_numpy(scene.lines).float() for scene in scenes]
        if self.model.num_depth_levels > 0:
            measured = torch.where(rendering.depth <= self.model.max_depth, rendering.depth, 0)
            strides = depth_strides(self.model.num_depth_levels)
            targets["depth"] = [measured[:, :, ::stride, ::stride] for stride in strides]
        return targets


def training_drives(
    data: DataConfig, model: SparseDriveConfig, device: torch.device | str, slots: Sequence[int], batch_size: int
) -> SyntheticFrames:
    """`Frames` to learn from, for some slots of a batch of this size."""
    return SyntheticFrames(data, model, device, functools.partial(places_at, slots, batch_size, data))


class HeldOutDrives:
    """`HeldOutFrames` of synthetic drives, a drive a slot, in a town that no training sees; or those that are learnt.

    Args:
        data, model, device: as for `SyntheticFrames`.
    """

    def __init__(self, data: DataConfig, model: SparseDriveConfig, device: torch.device | str):
        self.num_slots, self.num_batches = data.num_validation_drives, data.frames_per_drive
        self._frames = SyntheticFrames(data, model, device, self._places, held_out=not data.validate_on_learnt)

    def at(self, number: int) -> tuple[Batch, np.ndarray]:
        """The frames of this number of all drives."""
        return self._frames.at(number), np.ones(self.num_slots, dtype=bool)

    def _places(self, number: int) -> list[Place]:
        return [Place(drive, min(number, self.num_batches - 1)) for drive in range(self.num_slots)]


def places_at(slots: Sequence[int], batch_size: int, data: DataConfig, step: int) -> list[Place]:
    """Where each slot is.

    A slot follows a drive from its first frame to its last, then goes on with another. Slots start at different frames,
    so that a batch is never all beginnings.
    """
    places = []
    for slot in slots:
        lap, frame = divmod(step + slot * data.frames_per_drive // batch_size, data.frames_per_drive)
        drive = lap * batch_size + slot
        again, drive = (0, drive) if data.num_drives is None else divmod(drive, data.num_drives)
        places.append(Place(drive, frame, again))
    return places


def _boxes_of(moment: Moment) -> np.ndarray:
    """(n, 9): x, y, z, sizes, yaw, vx, vy."""
    objects = moment.objects
    return np.concatenate([objects.center, objects.size, objects.yaw[:, None], objects.velocity], axis=1)
