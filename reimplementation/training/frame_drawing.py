"""The picture of a frame: what is there and what was found, in the cameras' images and from above, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from reimplementation.data.rig import Box

from .held_out import Judged

MIN_SCORE = 0.3  # what scores less is not drawn
RANGE = 55.0  # metres that the view from above shows to every side
CAMERA_COLUMNS = 3
NEAR = 0.3  # metres: an edge that comes nearer to a camera is cut off there
EDGE_POINTS = 20


def draw_found(path: Path, found: Mapping[str, Judged], classes: Sequence[str]) -> None:
    """Draw a batch's first frame: what is there, and what was found; the format follows the file's suffix.

    Args:
        path: the file.
        found: the batch, as detectors were judged in it, by the titles that they get.
        classes: the names that labels are places in.
    """
    (first, *_) = found.values()
    columns = {"there": first.truth[0], **{title: judged.found[0] for title, judged in found.items()}}
    pictures = first.batch.pictures[0].cpu().numpy()
    projections = first.batch.metas["projection_mat"][0].cpu().numpy()
    palette = colormaps["tab20"]
    colors = {name: palette(2 * i % 20 + i // 10) for i, name in enumerate(classes)}
    rows = -(-len(pictures) // CAMERA_COLUMNS)
    width, height = 7.0, 7.0 + 7.0 * rows / CAMERA_COLUMNS * pictures.shape[1] / pictures.shape[2]
    figure = Figure(figsize=(width * len(columns), height + 0.8), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, (title, sample) in zip(parts, columns.items()):
        boxes = _boxes(sample, classes)
        part.suptitle(f"{title}: {len(boxes)} boxes")
        grid = part.add_gridspec(rows + 1, CAMERA_COLUMNS, height_ratios=[*[1] * rows, CAMERA_COLUMNS * 2.2])
        for index, (picture, matrix) in enumerate(zip(pictures, projections)):
            _draw_view(part.add_subplot(grid[divmod(index, CAMERA_COLUMNS)]), picture, matrix, boxes, colors)
        _draw_from_above(part.add_subplot(grid[rows, :]), boxes, colors)
    handles = [Polygon(np.zeros((3, 2)), color=colors[name], label=name.replace("_", " ")) for name in classes]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(classes))
    figure.savefig(path, dpi=90)


def _boxes(sample: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[Box]:
    """The boxes to draw, the better ones last; what an untrained detector finds may be no box at all."""
    boxes = []
    for box, label, score in zip(sample["boxes_3d"], sample["labels_3d"], sample["scores_3d"]):
        is_box = np.isfinite(box[:7]).all() and (abs(box[:3]) < 2 * RANGE).all()
        if score >= MIN_SCORE and is_box and (0.05 < box[3:6]).all() and (box[3:6] < 30).all():
            boxes.append(Box(box[:3], box[3:6], box[6], classes[int(label)]))
    return boxes[::-1]


def _draw_view(axes: Axes, picture: np.ndarray, matrix: np.ndarray, boxes: Sequence[Box], colors: Mapping) -> None:
    height, width = picture.shape[:2]
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    for box in boxes:
        axes.plot(*_edges(box, matrix).T, color=colors[box.label], linewidth=0.9)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=(), yticks=())


def _edges(box: Box, matrix: np.ndarray) -> np.ndarray:
    """(n, 2) pixels along the twelve edges, NaN between two of them and behind the camera."""
    corners = box.corners()
    ends = np.array([(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit])
    along = np.linspace(0, 1, EDGE_POINTS)[:, None]
    points = corners[ends[:, 0], None] * (1 - along) + corners[ends[:, 1], None] * along
    u, v, depth = np.moveaxis(points @ matrix[:3, :3].T + matrix[:3, 3], -1, 0)
    behind = depth < NEAR
    pixels = np.stack([u, v], axis=-1) / np.where(behind, np.nan, depth)[..., None]
    return np.insert(pixels, EDGE_POINTS, np.nan, axis=1).reshape(-1, 2)


def _draw_from_above(axes: Axes, boxes: Sequence[Box], colors: Mapping) -> None:
    """The ground around the car, which looks upwards; a stroke marks the side that a box heads for."""
    for box in boxes:
        outline = box.points(0.5 * np.array([(1, 1, 0), (1, -1, 0), (-1, -1, 0), (-1, 1, 0)]))[:, :2]
        axes.add_patch(Polygon(outline, facecolor="none", edgecolor=colors[box.label], linewidth=1.3))
        axes.plot(*box.points(np.array([(0.0, 0, 0), (0.5, 0, 0)]))[:, :2].T, color=colors[box.label], linewidth=1.3)
    axes.plot([0, -1, 1, 0], [2.5, -2.5, -2.5, 2.5], color="black", linewidth=1.2)
    axes.set(xlim=(-RANGE, RANGE), ylim=(-RANGE, RANGE), aspect="equal", xlabel="metres", xticks=(-50, 0, 50))
    axes.set_yticks((-50, 0, 50))
    axes.grid(alpha=0.3)
