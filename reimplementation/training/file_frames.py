"""Frames of files as a network takes them, with their targets; images are read by processes of their own."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from reimplementation.models.sparsedrive.config import SparseDriveConfig

from .augmentation import Seen, View, draw_view, grid_mask, recoloured, rotated, seen_as, turned
from .batches import SECONDS_BETWEEN_PASSES, Batch, Stream, depth_strides, label_of_class, normalised, on_device
from .config import DataConfig
from .recordings import Recordings


class Place(NamedTuple):
    """Where in a data set a slot is: a frame's token, the sequence's number, how often it was seen, and whether the
    frame is changed when it is read."""

    token: str
    sequence: int
    lap: int
    is_augmented: bool


class Frame(NamedTuple):
    """What a process reads: a frame as the network sees it, and its targets; depth is a map a level."""

    seen: Seen
    timestamp: float
    T_global: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    instance_id: np.ndarray
    depth: list[np.ndarray]


class FrameReader(Dataset):
    """Reads frames by their places.

    Args:
        recordings: the files.
        data, model: what frames are to be like.
        seed: of all that is drawn at random.
    """

    def __init__(self, recordings: Recordings, data: DataConfig, model: SparseDriveConfig, seed: int):
        self.recordings, self.data, self.model, self.seed = recordings, data, model, seed
        self._label = label_of_class(model.det.classes)

    def __getitem__(self, place: Place) -> Frame:
        keyframe, view, augmentation = self.recordings.keyframe(place.token), View(), self.data.augmentation
        points = self.recordings.points(place.token) if self.model.num_depth_levels else np.zeros((0, 3))
        if place.is_augmented and augmentation is not None:
            # A sequence is changed alike from frame to frame: only so do its instances go on.
            of_sequence = np.random.default_rng((self.seed, place.lap, place.sequence))
            view = draw_view(augmentation, of_sequence)
            angle = of_sequence.uniform(-augmentation.turn, augmentation.turn)
            keyframe, points = turned(keyframe, angle), rotated(points, angle)
        seen = seen_as(keyframe.rig, view, *self.data.image_wh)
        if place.is_augmented and augmentation is not None:
            of_frame = np.random.default_rng((self.seed, place.lap, *place.token.encode()))
            seen = seen._replace(pictures=recoloured(seen.pictures, augmentation, of_frame))
        label = self._label[keyframe.labels]
        near = np.linalg.norm(keyframe.boxes[:, :2], axis=1) < self.model.det.max_distance
        kept = (keyframe.num_points > 0) & near & (label >= 0)
        return Frame(
            seen,
            keyframe.timestamp + SECONDS_BETWEEN_PASSES * place.lap,
            keyframe.T_global,
            label[kept],
            keyframe.boxes[kept],
            keyframe.instance_id[kept],
            depth_maps(points, seen, self.model.num_depth_levels, self.model.max_depth),
        )


class FileTraining:
    """`Frames` of files, for some slots of a batch.

    Args:
        reader: of the frames.
        slots: of the batch.
        batch_size: of all processes together.
        device: where batches are to be.

    Raises:
        ValueError: the model finds map lines, which files have not, or no frame is left to learn from.
    """

    def __init__(self, reader: FrameReader, slots: Sequence[int], batch_size: int, device: torch.device):
        _check_model(reader)
        self._reader, self._slots, self._batch_size, self._device = reader, slots, batch_size, device
        scenes = reader.recordings.scenes
        learnt = [tokens for name, tokens in scenes.items() if name not in reader.data.validation_scenes]
        self._sequences = [part for tokens in learnt for part in _parts(tokens, reader.data.scene_parts)]
        if not self._sequences:
            raise ValueError(f"{reader.recordings.folder} has no scene to learn from beside validation_scenes")
        self._stream = Stream(reader, self.places, reader.data.num_workers)

    def boxes(self) -> Iterator[np.ndarray]:
        """The boxes (n, 9) of every frame, no image of which is read."""
        for token in itertools.chain(*self._sequences):
            yield self._reader.recordings.keyframe(token, with_images=False).boxes

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        batch = batch_of(self._stream.at(step), self._device)
        augmentation = self._reader.data.augmentation
        random = np.random.default_rng((self._reader.seed, step))
        if augmentation is None or random.random() >= augmentation.grid_mask:
            return batch
        return batch._replace(images=grid_mask(batch.images, random))

    def places(self, step: int) -> list[Place]:
        """Where the slots are.

        All sequences stand one behind the other, in another order each lap, and every slot walks along that line from
        a start of its own.
        """
        length = sum(map(len, self._sequences))
        starts = (slot * length // self._batch_size for slot in self._slots)
        return [self._place(*divmod(step + start, length)) for start in starts]

    def _place(self, lap: int, position: int) -> Place:
        order, ends = self._lap(lap)
        rank = bisect.bisect_right(ends, position)
        sequence = order[rank]
        tokens = self._sequences[sequence]
        return Place(tokens[position - ends[rank]], sequence, lap, is_augmented=True)  # from the end backwards

    @functools.lru_cache(maxsize=4)  # noqa: B019 -- it lives as long as the training
    def _lap(self, lap: int) -> tuple[list[int], list[int]]:
        """The order of the sequences in a lap, and where each ends."""
        order = np.random.default_rng((self._reader.seed, lap)).permutation(len(self._sequences)).tolist()
        return order, list(itertools.accumulate(len(self._sequences[sequence]) for sequence in order))


class HeldOutFiles:
    """`HeldOutFrames` of files: the validation scenes, or all of them if none were named.

    Args:
        reader: of the frames.
        device: where batches are to be.
        num_slots: how many scenes are seen side by side at most.
    """

    def __init__(self, reader: FrameReader, device: torch.device | str, num_slots: int = 6):
        _check_model(reader)
        scenes, named = reader.recordings.scenes, reader.data.validation_scenes
        if missing := sorted(set(named) - set(scenes)):
            raise ValueError(f"{reader.recordings.folder} has no scene {', '.join(missing)}")
        chosen = [tokens for name, tokens in scenes.items() if not named or name in named]
        self.num_slots = min(num_slots, len(chosen))
        self._lines = [list(itertools.chain(*chosen[slot :: self.num_slots])) for slot in range(self.num_slots)]
        self.num_batches = max(map(len, self._lines))
        self._stream = Stream(reader, self._places, reader.data.num_workers)
        self._device = torch.device(device)

    def at(self, number: int) -> tuple[Batch, np.ndarray]:
        """A batch, and which slots count."""
        return batch_of(self._stream.at(number), self._device), np.array([number < len(line) for line in self._lines])

    def _places(self, number: int) -> list[Place]:
        tokens = (line[min(number, len(line) - 1)] for line in self._lines)
        return [Place(token, 0, 0, is_augmented=False) for token in tokens]


def batch_of(frames: Sequence[Frame], device: torch.device) -> Batch:
    """Frames side by side on a device."""

    def stacked(arrays: Sequence[np.ndarray], dtype: torch.dtype | None = None) -> Tensor:
        return on_device(np.stack(arrays), device, dtype)

    pictures = stacked([frame.seen.pictures for frame in frames])
    width_height = np.array(frames[0].seen.pictures.shape[2:0:-1], dtype=np.float32)
    targets = {
        "labels_3d": [torch.from_numpy(frame.labels) for frame in frames],
        "boxes_3d": [torch.from_numpy(frame.boxes).float() for frame in frames],
        "instance_id": [torch.from_numpy(frame.instance_id) for frame in frames],
    }
    if frames[0].depth:
        targets["depth"] = [stacked(maps, torch.float32) for maps in zip(*(frame.depth for frame in frames))]
    return Batch(
        images=normalised(pictures),
        metas={
            "projection_mat": stacked([frame.seen.projection_mat for frame in frames], torch.float32),
            "image_wh": stacked([np.tile(width_height, (len(frame.seen.focal), 1)) for frame in frames]),
            "focal": stacked([frame.seen.focal for frame in frames], torch.float32),
            "timestamp": stacked([np.array(frame.timestamp) for frame in frames]),
            "T_global": stacked([frame.T_global for frame in frames]),
        },
        targets=targets,
        pictures=pictures,
    )


def depth_maps(points: np.ndarray, seen: Seen, num_levels: int, max_depth: float) -> list[np.ndarray]:
    """What a lidar measured, in the pixels of a pyramid's levels, whose strides are 4, 8, …

    Args:
        points: (n, 3) metres.
        seen: the images.
        num_levels: of the pyramid.
        max_depth: metres; what is farther counts as not measured.

    Returns:
        Maps (num_cams, H, W) float32, a level each: the depth in metres of the nearest point, 0: none was measured.
    """
    height, width = seen.pictures.shape[1:3]
    homogeneous = np.concatenate([points, np.ones((len(points), 1))], axis=1)
    u, v, depth = np.moveaxis((seen.projection_mat[:, :3] @ homogeneous.T), 1, 0)
    camera = np.arange(len(depth))[:, None].repeat(len(points), axis=1)
    ahead = (depth > 0.1) & (depth < max_depth)
    camera, depth = camera[ahead], depth[ahead]
    u, v = u[ahead] / depth, v[ahead] / depth
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    order = np.argsort(-depth[inside])  # the nearest comes last, and stays
    camera, u, v, depth = (values[inside][order] for values in (camera, u, v, depth))
    maps = []
    for stride in depth_strides(num_levels):
        level = np.zeros((len(seen.focal), -(-height // stride), -(-width // stride)), dtype=np.float32)
        level[camera, (v / stride).astype(int), (u / stride).astype(int)] = depth
        maps.append(level)
    return maps


def _parts(tokens: list[str], count: int) -> list[list[str]]:
    """A scene's frames in parts of about the same length, none of them empty."""
    cuts = [len(tokens) * part // count for part in range(count + 1)]
    return [tokens[begin:end] for begin, end in zip(cuts, cuts[1:]) if begin < end]


def _check_model(reader: FrameReader) -> None:
    if reader.model.map is not None:
        raise ValueError("the files hold no map lines: set the model's map to null, or train on synthetic drives")
