"""The picture of the demo of deformable aggregation: what cameras see, where boxes were sampled, which colours came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from reimplementation.data.rig import Box, Camera, Rig
from reimplementation.data.scene import NEAR, View, key_points

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
    area,
    new_page,
    save,
    surround_rows,
    write,
)

if TYPE_CHECKING:
    from .recovery import Recovery

HEADER, VIEW_LABEL, PANEL_TITLE, FOOTER = 132, 34, 76, 36  # pixels, like everything below
SWATCHES_PER_ROW, SWATCH_HEIGHT, MAX_SWATCHES = 10, 58, 120
NUMBERED_FROM = 14  # pixels: boxes that appear smaller than this bear no number
SAMPLES_PER_EDGE = 160
HARDLY_BEHIND = 1.01  # an edge this much deeper than what its pixel shows still lies on it

_SAMPLED: dict[str, Any] = {"marker": "o", "color": "#ffffff", "edgecolors": "#0d1117", "linewidths": 0.6}
_SEEN: dict[str, Any] = {"marker": "o", "color": "none", "edgecolors": "#ffffff", "linewidths": 0.9}
_HIDDEN: dict[str, Any] = {"marker": "o", "color": "#0d1117", "edgecolors": "#9198a1", "linewidths": 0.5, "alpha": 0.7}


def draw(
    path: str | Path, rig: Rig, views: Sequence[View], recovery: Recovery, painted: np.ndarray | None = None
) -> None:
    """Write the picture; its format follows its suffix.

    Cameras stand as they look: those facing forward in the upper row, the others below, left ones left.
    `painted` (num_boxes, 3) uint8, where known, is shown beside the recovered colours.
    """
    rows = surround_rows(rig.cameras)
    columns = max(len(row) for row in rows)
    view_width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) / columns
    view_height = view_width * max(camera.height / camera.width for camera in rig.cameras)
    shown = min(len(rig.boxes), MAX_SWATCHES)
    panel_top = HEADER + len(rows) * (view_height + VIEW_LABEL)
    height = panel_top + PANEL_TITLE + math.ceil(shown / SWATCHES_PER_ROW) * SWATCH_HEIGHT + FOOTER

    figure, page = new_page(height)
    _header(page, rig, recovery, painted)
    for i, row in enumerate(rows):
        top = HEADER + i * (view_height + VIEW_LABEL) + VIEW_LABEL
        left = (WIDTH - len(row) * view_width - (len(row) - 1) * GAP) / 2
        for j, camera_index in enumerate(row):
            x = left + j * (view_width + GAP)
            name = rig.cameras[camera_index].name.removeprefix("CAM_").replace("_", " ").lower()
            write(page, x, top - 12, _shortened(name, int(view_width / 10)), 15, MUTED)
            axes = add_panel(figure, x, top, view_width, view_height)
            _view(axes, rig, views, recovery, camera_index)
    _swatches(page, panel_top, rig, recovery, painted)
    save(figure, path)


def _header(page: Axes, rig: Rig, recovery: Recovery, painted: np.ndarray | None) -> None:
    write(page, MARGIN, 66, "Deformable aggregation", 38, TEXT, weight="bold")
    subtitle = f"{len(rig.boxes)} boxes, {recovery.seen.shape[1]} key points in each, {len(rig.cameras)} cameras"
    write(page, MARGIN, 104, subtitle, 18, MUTED)
    if painted is not None:
        error = np.abs(recovery.colors - painted).mean(axis=1)[recovery.counted].mean()
        write(page, WIDTH - MARGIN, 66, f"{_error(error)} / 255", 38, ACCENT, weight="bold", ha="right")
        note = f"mean colour error over {recovery.counted.sum()} boxes in plain sight"
        write(page, WIDTH - MARGIN, 104, note, 18, MUTED, ha="right")

    x = WIDTH / 2 - 400
    for label, style in (
        ("gives its colour (larger: more weight)", _SAMPLED),
        ("seen, footprint not clean", _SEEN),
        ("hidden from this camera", _HIDDEN),
    ):
        page.scatter(x, 98, s=area(5.5), **style)
        write(page, x + 16, 104, label, 16, MUTED)
        x += 40 + 8.6 * len(label)


def _view(axes: Axes, rig: Rig, views: Sequence[View], recovery: Recovery, index: int) -> None:
    camera, view = rig.cameras[index], views[index]
    axes.imshow(camera.pixels, extent=(0, camera.width, camera.height, 0), interpolation="antialiased")
    axes.set(xlim=(0, camera.width), ylim=(camera.height, 0), anchor="N")

    outlines = [_visible_edges(camera, view, rig.boxes[i]) for i in np.unique(view.box_ids[view.box_ids >= 0])]
    if outlines:
        x, y = np.concatenate(outlines).T
        axes.plot(x, y, color="#ffffff", linewidth=0.8, alpha=0.9, solid_capstyle="round")

    pixels, depth = rig.project(key_points(rig.boxes))
    pixels, depth = pixels[..., index, :], depth[..., index]
    inside = (depth > NEAR) & (pixels >= 0).all(axis=-1) & (pixels < (camera.width, camera.height)).all(axis=-1)
    weights, seen = recovery.weights[..., index], recovery.seen[..., index]
    extent = np.ptp(pixels, axis=1).min(axis=1, keepdims=True)  # small boxes get small dots
    radius = np.clip(extent / 12, 1.2, 4.0) * (0.8 + 1.4 * np.sqrt(weights))
    for chosen, style in (
        (inside & ~seen, _HIDDEN),
        (inside & seen & (weights == 0), _SEEN),
        (inside & (weights > 0), _SAMPLED),
    ):
        axes.scatter(pixels[chosen, 0], pixels[chosen, 1], s=area(radius[chosen]), **style)
    _numbers(axes, rig, views, index)


def _visible_edges(camera: Camera, view: View, box: Box) -> np.ndarray:
    """(n, 2) pixels along the box's twelve edges, NaN where an edge is hidden, out of view, or ends."""
    corners = box.corners()
    ends = np.array([(a, a | bit) for a in range(8) for bit in (1, 2, 4) if not a & bit])
    along = np.linspace(0, 1, SAMPLES_PER_EDGE)[:, None]
    points = corners[ends[:, 0], None] * (1 - along) + corners[ends[:, 1], None] * along
    projected = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1) @ camera.projection_mat[:3].T
    depth = projected[..., 2]
    pixels = projected[..., :2] / np.maximum(depth, NEAR)[..., None]

    inside = (depth > NEAR) & (pixels >= 0).all(axis=-1) & (pixels < (camera.width, camera.height)).all(axis=-1)
    column, row = (np.where(inside, pixels[..., axis], 0).astype(int) for axis in (0, 1))
    # A silhouette runs between two pixels, so it shows where any pixel next to it is as deep.
    behind = [
        view.depth[np.clip(row + down, 0, camera.height - 1), np.clip(column + right, 0, camera.width - 1)]
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
    ]
    pixels[~(inside & (depth <= np.max(behind, axis=0) * HARDLY_BEHIND))] = np.nan
    return np.insert(pixels, SAMPLES_PER_EDGE, np.nan, axis=1).reshape(-1, 2)


def _numbers(axes: Axes, rig: Rig, views: Sequence[View], index: int) -> None:
    """Number each box in the view that shows most of it, above or below, where no other number stands."""
    box_ids = views[index].box_ids
    height, width = box_ids.shape
    counts = np.array([np.bincount(view.box_ids[view.box_ids >= 0], minlength=len(rig.boxes)) for view in views])
    taken: list[tuple[float, float]] = []
    for box in np.flatnonzero((counts.argmax(axis=0) == index) & (counts[index] > 0)):
        rows, columns = np.nonzero(box_ids == box)
        if min(np.ptp(rows), np.ptp(columns)) < NUMBERED_FROM:
            continue
        x = np.clip((columns.min() + columns.max()) / 2, 14, width - 14)
        for y in (rows.min() - 10, rows.max() + 12):
            clear = all(abs(x - other_x) > 30 or abs(y - other_y) > 18 for other_x, other_y in taken)
            if 9 < y < height - 9 and clear:
                taken.append((x, y))
                plate = {
                    "boxstyle": "round,pad=0.25",
                    "facecolor": BACKGROUND,
                    "edgecolor": "none",
                    "alpha": 0.72,
                }
                write(axes, x, y, str(box + 1), 12, TEXT, ha="center", va="center", bbox=plate)
                break


def _swatches(page: Axes, top: float, rig: Rig, recovery: Recovery, painted: np.ndarray | None) -> None:
    title = (
        "Mean image colour at the key points"
        if painted is None
        else "Painted (left), and recovered through the op (right)"
    )
    write(page, MARGIN, top + 46, title, 20, TEXT, weight="bold")
    cell = (WIDTH - 2 * MARGIN) / SWATCHES_PER_ROW
    for i, box in enumerate(rig.boxes[:MAX_SWATCHES]):
        x = MARGIN + i % SWATCHES_PER_ROW * cell
        y = top + PANEL_TITLE + i // SWATCHES_PER_ROW * SWATCH_HEIGHT
        recovered = recovery.colors[i]
        unseen = np.isnan(recovered).any()
        halves = [recovered] if painted is None else [painted[i], recovered]
        for j, color in enumerate(halves):
            blank = np.isnan(color).any()
            page.add_patch(
                Rectangle(
                    (x + j * 60 / len(halves), y),
                    60 / len(halves),
                    38,
                    facecolor=BACKGROUND if blank else np.clip(color / 255, 0, 1),
                    edgecolor=FAINT if blank else "none",
                    linewidth=1 if blank else 0,
                )
            )
        counted = recovery.counted[i] if painted is not None else not unseen
        label = _shortened(box.label.replace("_", " "), 13)
        write(page, x + 70, y + 15, f"{i + 1}  {label}", 15, TEXT if counted else MUTED)
        if unseen:
            note = "no camera sees it"
        elif painted is None:
            note = f"{recovery.seen[i].any(axis=1).sum()} of {recovery.seen.shape[1]} points seen"
        else:
            note = f"{'off by' if counted else 'uncounted:'} {_error(np.abs(recovered - painted[i]).mean())}"
        write(page, x + 70, y + 34, note, 12.5, MUTED)
    if len(rig.boxes) > MAX_SWATCHES:
        note = f"and {len(rig.boxes) - MAX_SWATCHES} more boxes"
        write(page, WIDTH - MARGIN, top + 46, note, 16, MUTED, ha="right")


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _error(value: float) -> str:
    return "< 0.001" if value < 0.0005 else f"{value:.3f}"
