"""The demo of deformable aggregation: colours read back from boxes around a car, and the module on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reimplementation.bench.inputs import EMBED_DIMS, aggregation_problem
from reimplementation.bench.modules import Timing, measure_all, module_document
from reimplementation.data.rig import Rig
from reimplementation.data.scene import IMAGE_HEIGHT, IMAGE_WIDTH, View, built_in_scene, trace_boxes
from reimplementation.demo.recovery import MIN_PIXELS_ACROSS, Recovery, recover_colors


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What the demo looks at. painted: (num_boxes, 3) uint8, the truth; None for real images."""

    rig: Rig
    views: tuple[View, ...]
    painted: np.ndarray | None


def show(rig_folder: str | None, num_queries: int, output: Path, begins: Callable[[str], None]) -> dict:
    """Draw the picture and time the module; returns everything that was found, ready for JSON.

    Args:
        rig_folder: a folder with sample.json and images; None stands for the built-in street.
        num_queries: of the timed module.
        output: the picture's file; its format follows its suffix.
        begins: is told what comes next, in words.
    """
    from reimplementation.demo.aggregation_drawing import draw  # first: a missing extra is named before the work begins

    begins("looking around")
    surroundings = look_around(rig_folder)
    begins("reading colours")
    recovery = recover_colors(surroundings.rig, surroundings.views)
    begins("drawing")
    draw(output, surroundings.rig, surroundings.views, recovery, surroundings.painted)
    timings = measure_all(aggregation_problem(surroundings.rig, num_queries), begins)
    return _document(surroundings, recovery, timings, num_queries)


def look_around(folder: str | None = None) -> Surroundings:
    """The built-in street, or the rig in a folder at 704 x 256 pixels, and the box behind every pixel."""
    if folder is None:
        scene = built_in_scene()
        return Surroundings(scene.rig, scene.views, scene.colors)
    rig = Rig.load(folder).scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT)
    return Surroundings(rig, tuple(trace_boxes(camera, rig.boxes) for camera in rig.cameras), None)


def color_errors(recovered: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """(num_boxes,) mean absolute error over the three channels, in 1/255; NaN where nothing was recovered."""
    return np.abs(recovered - painted).mean(axis=1)


def _document(surroundings: Surroundings, recovery: Recovery, timings: list[Timing], queries: int) -> dict:
    """Everything the demo found, ready for JSON."""
    painted = surroundings.painted
    boxes: list[dict[str, Any]] = []
    for i, box in enumerate(surroundings.rig.boxes):
        unseen = np.isnan(recovery.colors[i, 0])
        entry: dict[str, Any] = {
            "label": box.label,
            "recovered_rgb": None if unseen else recovery.colors[i].tolist(),
            "key_points_seen": int(recovery.seen[i].any(axis=1).sum()),
        }
        if painted is not None:
            error = color_errors(recovery.colors, painted)[i]
            entry |= {
                "painted_rgb": painted[i].tolist(),
                "error": None if unseen else float(error),
                "counted": bool(recovery.counted[i]),
            }
        boxes.append(entry)
    document = {
        "cameras": [camera.name for camera in surroundings.rig.cameras],
        "boxes": boxes,
        "module": module_document(
            "DeformableFeatureAggregation",
            queries,
            f"{len(surroundings.rig.cameras)} cameras, {EMBED_DIMS} channels",
            timings,
        ),
    }
    if painted is not None:
        counted = [box["error"] for box in boxes if box["counted"]]
        document["colors"] = {
            "counted_boxes": len(counted),
            "rule": f"one view shows every key point, and the box at least {MIN_PIXELS_ACROSS} pixels across",
            "mean_absolute_error": float(np.mean(counted)),
            "unit": "1/255",
        }
    return document
