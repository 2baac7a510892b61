"""The picture of a detection: boxes in every camera's image, and all of them from above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Polygon

from reimplementation.data.rig import Box, Camera, Rig
from reimplementation.data.scene import NEAR

from .detection import Detections
from .drawing import (
    ACCENT,
    BACKGROUND,
    FAINT,
    GAP,
    MARGIN,
    MUTED,
    TEXT,
    WIDTH,
    add_panel,
    new_page,
    save,
    surround_rows,
    write,
)

HEADER, VIEW_LABEL, LEGEND_ROW, FOOTER = 132, 34, 26, 40  # pixels
ABOVE = 480  # pixels: width and height of the view from above
RANGE = 55.0  # metres that it shows to every side
LEGEND_COLUMNS = 3
SAMPLES_PER_EDGE = 40


def draw(path: str | Path, rig: Rig, found: Detections, title: str, note: str, warning: bool = False) -> None:
    """Write the picture; its format follows its suffix.

    Args:
        path: the file.
        rig: whose cameras have images.
        found: what to draw.
        title, note: the header's two lines.
        warning: whether the note is one, and is to be seen.
    """
    rows = surround_rows(rig.cameras)
    columns = max(len(row) for row in rows)
    view_width = (WIDTH - 2 * MARGIN - columns * GAP - ABOVE) / columns
    view_height = view_width * max(camera.height / camera.width for camera in rig.cameras)
    labels = sorted({box.label for box in found.boxes} | {line.label for line in found.lines})
    colors = {label: to_hex(colormaps["tab20"](number % 20)) for number, label in enumerate(labels)}
    legend_rows = math.ceil(len(labels) / LEGEND_COLUMNS)
    body = max(len(rows) * (view_height + VIEW_LABEL), VIEW_LABEL + ABOVE + legend_rows * LEGEND_ROW)

    figure, page = new_page(HEADER + body + FOOTER)
    write(page, MARGIN, 66, title, 38, TEXT, weight="bold")
    write(page, MARGIN, 104, note, 18, ACCENT if warning else MUTED)
    for i, row in enumerate(rows):
        top = HEADER + i * (view_height + VIEW_LABEL) + VIEW_LABEL
        for j, index in enumerate(row):
            x, camera = MARGIN + j * (view_width + GAP), rig.cameras[index]
            write(page, x, top - 12, camera.name.removeprefix("CAM_").replace("_", " ").lower(), 15, MUTED)
            _view(add_panel(figure, x, top, view_width, view_height), camera, found.boxes, colors)
    left = WIDTH - MARGIN - ABOVE
    write(page, left, HEADER + VIEW_LABEL - 12, f"from above, {RANGE:.0f} m to every side", 15, MUTED)
    _from_above(add_panel(figure, left, HEADER + VIEW_LABEL, ABOVE, ABOVE), found, colors)
    for i, label in enumerate(labels):
        legend_row, column = divmod(i, LEGEND_COLUMNS)
        x, y = left + column * ABOVE / LEGEND_COLUMNS, HEADER + VIEW_LABEL + ABOVE + (legend_row + 1) * LEGEND_ROW
        write(page, x, y, label.replace("_", " "), 15, colors[label])
    save(figure, path)


def _view(axes: Axes, camera: Camera, boxes: Sequence[Box], colors: dict) -> None:
    """An image with the boxes' edges in it, the worse ones below the better."""
    axes.imshow(camera.pixels, extent=(0, camera.width, camera.height, 0), interpolation="antialiased")
    axes.set(xlim=(0, camera.width), ylim=(camera.height, 0), anchor="N")
    for box in reversed(boxes):
        axes.plot(*_edges(camera, box).T, color=colors[box.label], linewidth=1.1, solid_capstyle="round")


def _edges(camera: Camera, box: Box) -> np.ndarray:
    """(n, 2) pixels along the box's twelve edges, NaN where an edge is out of view, or ends."""
    corners = box.corners()
    ends = np.array([(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit])
    along = np.linspace(0, 1, SAMPLES_PER_EDGE)[:, None]
    points = corners[ends[:, 0], None] * (1 - along) + corners[ends[:, 1], None] * along
    projected = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1) @ camera.projection_mat[:3].T
    depth = projected[..., 2]
    pixels = projected[..., :2] / np.maximum(depth, NEAR)[..., None]
    inside = (depth > NEAR) & (pixels >= 0).all(axis=-1) & (pixels < (camera.width, camera.height)).all(axis=-1)
    pixels[~inside] = np.nan
    return np.insert(pixels, SAMPLES_PER_EDGE, np.nan, axis=1).reshape(-1, 2)


def _from_above(axes: Axes, found: Detections, colors: dict) -> None:
    """The ground around the car, which looks upwards; a stroke marks the side that a box heads for."""
    axes.set(xlim=(-RANGE, RANGE), ylim=(-RANGE, RANGE), aspect="equal")
    axes.add_patch(
        Polygon(RANGE * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), facecolor=BACKGROUND, edgecolor=FAINT)
    )
    for line in reversed(found.lines):
        axes.plot(*line.points.T, color=colors[line.label], linewidth=1.0, alpha=0.8)
    for box in reversed(found.boxes):
        outline = box.points(0.5 * np.array([(1, 1, 0), (1, -1, 0), (-1, -1, 0), (-1, 1, 0)]))[:, :2]
        axes.add_patch(Polygon(outline, facecolor="none", edgecolor=colors[box.label], linewidth=1.2))
        front = box.points(np.array([(0.0, 0, 0), (0.5, 0, 0)]))[:, :2]
        axes.plot(*front.T, color=colors[box.label], linewidth=1.2)
    axes.plot([0, -1, 1, 0], [2.5, -2.5, -2.5, 2.5], color=TEXT, linewidth=1.2)
