"""What the demo's pictures share: a dark page of a fixed width, measured in pixels, its colours and its type."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reimplementation.data.rig import Camera

BACKGROUND, TEXT, MUTED, FAINT, ACCENT = "#0d1117", "#f0f3f6", "#9198a1", "#3d444d", "#7ee2b8"
DPI = 100
POINTS_PER_PIXEL = 72 / DPI
WIDTH, MARGIN, GAP = 2224, 48, 8  # pixels, like everything below


def new_page(height: float) -> tuple[Figure, Axes]:
    """A page `WIDTH` pixels wide and so many high, and axes over all of it: pixels from its upper left corner."""
    figure = Figure(figsize=(WIDTH / DPI, height / DPI), dpi=DPI, facecolor=BACKGROUND)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    page.axis("off")
    return figure, page


def add_panel(figure: Figure, x: float, top: float, width: float, height: float) -> Axes:
    """Axes without lines at a place on a page, in pixels."""
    page_height = figure.get_figheight() * DPI
    bottom = 1 - (top + height) / page_height
    axes = figure.add_axes((x / WIDTH, bottom, width / WIDTH, height / page_height))
    axes.axis("off")
    return axes


def save(figure: Figure, path: str | Path) -> None:
    """Write a page; the format follows the suffix of the file's name."""
    figure.savefig(path, facecolor=BACKGROUND)


def write(axes: Axes, x: float, y: float, text: str, pixels: float, color: str, **style) -> None:
    """Put text of a height in pixels at (x, y); `style` goes to matplotlib."""
    # Labels come from files: a dollar sign in one is a dollar sign, not mathematics.
    axes.text(x, y, text, fontsize=pixels * POINTS_PER_PIXEL, color=color, parse_math=False, **style)


def area(radius: float | np.ndarray) -> float | np.ndarray:
    """What `scatter` calls a size, for a radius in pixels."""
    return (2 * radius * POINTS_PER_PIXEL) ** 2


def surround_rows(cameras: Sequence[Camera]) -> list[list[int]]:
    """Camera indices: those facing forward, then those facing back; in both rows left ones on the left."""
    axes = np.array([camera.world_to_camera[2, :2] for camera in cameras])
    to_the_right = np.degrees(np.arctan2(axes[:, 0], axes[:, 1]))
    order = np.argsort(to_the_right)
    front = [int(i) for i in order if abs(to_the_right[i]) <= 90]
    back = sorted(set(range(len(cameras))) - set(front), key=lambda i: -(to_the_right[i] % 360))
    return [row for row in (front, back) if row]
