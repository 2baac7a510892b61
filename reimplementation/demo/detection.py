"""A detector looks at one moment: the images of a rig in, boxes and map lines out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from reimplementation.data.rig import Box, Rig
from reimplementation.data.scene import IMAGE_HEIGHT, IMAGE_WIDTH, built_in_scene
from reimplementation.models.sparsedrive import SparseDrive, SparseDriveConfig, load_checkpoint

MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet's red, green and blue, in 0..255
SMALLEST, LARGEST, FARTHEST = 0.01, 100.0, 200.0  # metres: what is no such box is not shown
SEED = 0


@dataclass(frozen=True, eq=False)
class Line:
    """A map line. points: (num_points, 2) metres, seen from above."""

    points: np.ndarray
    label: str


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found, best first, and each one's score in [0, 1]."""

    boxes: tuple[Box, ...]
    box_scores: tuple[float, ...]
    lines: tuple[Line, ...]
    line_scores: tuple[float, ...]

    def best(self, least: float, most_boxes: int, most_lines: int) -> Detections:
        """What scores at least so much, and no more of it than so many."""
        boxes = min(most_boxes, sum(score >= least for score in self.box_scores))
        lines = min(most_lines, sum(score >= least for score in self.line_scores))
        return Detections(self.boxes[:boxes], self.box_scores[:boxes], self.lines[:lines], self.line_scores[:lines])


def look_around(folder: str | None) -> Rig:
    """The rig in a folder, or the built-in street, with images of the size that the detector is made for."""
    return built_in_scene().rig if folder is None else Rig.load(folder).scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT)


def build(config: str | Path | None, checkpoint: str | Path | None, rig: Rig) -> SparseDrive:
    """The detector that a YAML file describes, SparseDrive-S by default; without a checkpoint its weights are random.

    Raises:
        ValueError: the rig has not as many cameras as the detector, or a file does not fit.
    """
    settings = SparseDriveConfig() if config is None else SparseDriveConfig.from_yaml(config)
    if len(rig.cameras) != settings.num_cams:
        raise ValueError(f"this detector looks through {settings.num_cams} cameras; the rig has {len(rig.cameras)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SparseDrive(settings)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model.eval()


@torch.no_grad()
def detect(model: SparseDrive, rig: Rig) -> Detections:
    """Run a detector on a rig's images, as if the moment were the first."""
    device = next(model.parameters()).device
    images = np.stack([camera.pixels for camera in rig.cameras])
    normalised = (torch.from_numpy(images).float() - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    metas = {
        "projection_mat": torch.from_numpy(rig.projection_mat).float()[None],
        "image_wh": torch.from_numpy(rig.image_wh).float()[None],
        "timestamp": torch.zeros(1, dtype=torch.float64),
        "T_global": torch.eye(4, dtype=torch.float64)[None],
    }
    metas = {name: tensor.to(device) for name, tensor in metas.items()}
    outputs, _ = model.step(normalised.permute(0, 3, 1, 2)[None].to(device), metas, state=None, every_layer=False)
    (found,) = model.decode(outputs)
    return _detections({name: tensor.float().cpu().numpy() for name, tensor in found.items()}, model.config)


def _detections(found: dict[str, np.ndarray], config: SparseDriveConfig) -> Detections:
    boxes = found["boxes_3d"]
    extent, distance = boxes[:, 3:6], np.abs(boxes[:, :3]).max(axis=1)
    sensible = np.isfinite(boxes).all(axis=1) & (distance <= FARTHEST)
    sensible &= ((extent >= SMALLEST) & (extent <= LARGEST)).all(axis=1)
    kept = [
        (Box(box[:3], box[3:6], box[6], config.det.classes[int(label)], box[7:9]), float(score))
        for box, label, score in zip(
            boxes[sensible], found["labels_3d"][sensible], found["scores_3d"][sensible], strict=True
        )
    ]
    kinds = () if config.map is None else config.map.classes
    lines = [
        (Line(points, kinds[int(label)]), float(score))
        for points, label, score in zip(
            found.get("map_lines", ()), found.get("map_labels", ()), found.get("map_scores", ())
        )
        if np.isfinite(points).all()
    ]
    return Detections(
        tuple(box for box, _ in kept),
        tuple(score for _, score in kept),
        tuple(line for line, _ in lines),
        tuple(score for _, score in lines),
    )
