"""A detector on frames that no training saw: what is there, what it finds, and how good that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from reimplementation.models.sparsedrive import SparseDrive, SparseDriveConfig

from .batches import Batch, HeldOutFrames
from .evaluate import DISTANCES, DetectionMetrics, EvalBoxes, evaluate_detections, within_class_range
from .map_metrics import EvalLines, MapMetrics, evaluate_lines

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
)
Sample = Mapping[str, np.ndarray]
MOVING = 0.2  # metres a second
_ATTRIBUTES_OF = {  # of what moves, and of what stands
    **dict.fromkeys(("car", "truck", "trailer", "construction_vehicle"), ("vehicle.moving", "vehicle.parked")),
    "bus": ("vehicle.moving", "vehicle.stopped"),
    **dict.fromkeys(("motorcycle", "bicycle"), ("cycle.with_rider", "cycle.without_rider")),
    "pedestrian": ("pedestrian.moving", "pedestrian.standing"),
}


@dataclass(frozen=True)
class Evaluation:
    """The metrics of boxes, and of map lines where the detector finds such.

    present   the classes of which there is a box within their range; of the others every AP is 0, by nuScenes' rules
    """

    boxes: DetectionMetrics
    lines: MapMetrics | None
    present: tuple[str, ...]

    def average_precision_of_present(self, distance: float) -> float:
        """The mean AP at a distance of the classes that are there; NaN: none is."""
        found = [self.boxes.average_precision[name][distance] for name in self.present]
        return sum(found) / len(found) if found else math.nan

    def summary(self) -> dict[str, float]:
        """The numbers that a detector is known by."""
        numbers = {"mAP": self.boxes.mean_average_precision, "NDS": self.boxes.nd_score}
        return numbers if self.lines is None else {**numbers, "map_mAP": self.lines.mean_average_precision}

    def to_dict(self) -> dict:
        """What a JSON file holds."""
        return {
            "boxes": self.boxes.to_dict(),
            "lines": None if self.lines is None else self.lines.to_dict(),
            "present": list(self.present),
            "AP_of_present": {f"{distance:g}": self.average_precision_of_present(distance) for distance in DISTANCES},
        }


class Judged(NamedTuple):
    """A batch of frames: what is there and what is found, an entry a frame, as `SparseDrive.decode` gives it."""

    truth: Sequence[Sample]
    found: Sequence[Sample]
    batch: Batch


@torch.no_grad()
def moments(
    model: SparseDrive, frames: HeldOutFrames, device: torch.device, precision: str = "float32"
) -> Iterator[Judged]:
    """Let a detector see the frames that it is judged by.

    Args:
        model: on the device; it is put into evaluation.
        frames: the frames.
        device: where.
        precision: "float32", or "bfloat16" for autocast.
    """
    model.eval()
    state = model.initial_state(frames.num_slots)
    for number in range(frames.num_batches):
        batch, counts = frames.at(number)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs, state = model(batch.images, batch.metas, state, every_layer=False)
        found = [{name: x.float().cpu().numpy() for name, x in sample.items()} for sample in model.decode(outputs)]
        new, truth = [slot for slot, is_new in enumerate(counts) if is_new], _truth(batch)
        yield Judged([truth[slot] for slot in new], [found[slot] for slot in new], batch)


def judge(frames: Iterable[Judged], config: SparseDriveConfig) -> Evaluation:
    """The metrics of what `moments` yields."""
    truth: list[Sample] = []
    found: list[Sample] = []
    for judged in frames:  # whose images are not kept
        truth += judged.truth
        found += judged.found
    classes = config.det.classes
    true_boxes, found_boxes = (within_class_range(to_boxes(samples, classes), classes) for samples in (truth, found))
    lines = None
    if config.map is not None:
        lines = evaluate_lines(to_lines(truth), to_lines(found), config.map.classes)
    return Evaluation(
        evaluate_detections(true_boxes, found_boxes, classes),
        lines,
        present=tuple(classes[label] for label in np.unique(true_boxes.label)),
    )


def keeping(frames: Iterable[Judged], number: int, kept: list[Judged]) -> Iterator[Judged]:
    """The same frames; the batch of this number is put into a list as it passes."""
    for index, judged in enumerate(frames):
        if index == number:
            kept.append(judged)
        yield judged


def attributes(label: np.ndarray, velocity: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The attribute (n,) that a box's class and speed suggest, a place in `ATTRIBUTES`; -1: its class has none."""
    kinds = [_ATTRIBUTES_OF.get(name) for name in classes]
    table = np.array([[-1, -1] if kind is None else [ATTRIBUTES.index(name) for name in kind] for kind in kinds])
    stands = np.linalg.norm(velocity, axis=1) <= MOVING
    return table[label, stands.astype(int)]


def to_boxes(samples: Sequence[Sample], classes: Sequence[str]) -> EvalBoxes:
    """Boxes of samples 0, 1, … as `SparseDrive.decode` gives them, in the lidar's frames."""
    parts = []
    for index, sample in enumerate(samples):
        boxes, label = sample["boxes_3d"].astype(np.float64), sample["labels_3d"].astype(np.int64)
        parts.append(
            EvalBoxes(
                sample=np.full(len(boxes), index),
                label=label,
                center=boxes[:, :3],
                size=boxes[:, 3:6],
                yaw=boxes[:, 6],
                velocity=boxes[:, 7:],
                attribute=attributes(label, boxes[:, 7:], classes),
                ego_distance=np.linalg.norm(boxes[:, :2], axis=1),
                score=sample["scores_3d"].astype(np.float64),
            )
        )
    return EvalBoxes.concatenate(parts)


def to_lines(samples: Sequence[Sample]) -> EvalLines:
    """Map lines of samples 0, 1, … as `SparseDrive.decode` gives them."""
    return EvalLines.concatenate(
        [
            EvalLines(
                np.full(len(sample["map_lines"]), index),
                sample["map_labels"].astype(np.int64),
                sample["map_lines"].astype(np.float64),
                sample["map_scores"].astype(np.float64),
            )
            for index, sample in enumerate(samples)
        ]
    )


def _truth(batch: Batch) -> Sequence[Sample]:
    """The targets of each sample in the form of detections, with the score 1."""
    targets = {name: values for name, values in batch.targets.items() if name not in ("depth", "instance_id")}
    samples = [dict(zip(targets, values)) for values in zip(*targets.values())]
    arrays = [{name: value.cpu().numpy() for name, value in sample.items()} for sample in samples]
    for sample in arrays:
        sample["scores_3d"] = np.ones(len(sample["labels_3d"]))
        if "map_labels" in sample:
            sample["map_scores"] = np.ones(len(sample["map_labels"]))
    return arrays
