"""The picture of the demo of multi-scale deformable attention: where queries look, and the colours their heads read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Wedge

from .drawing import BACKGROUND, GAP, MARGIN, MUTED, TEXT, WIDTH, add_panel, area, new_page, save, write
from .reading import STRIDES, Reading, color_pyramid

HEADER, TITLE, FOOTER = 132, 62, 40  # pixels, like everything below
FLOWER_RADIUS, POINT_RADIUS = 25, 3.2
LEVEL_IN_VIEW = 1  # its points lie outside the flowers, and do not reach the next query's
CLOSE_UP = (17.5, 10)  # pixels of each level: columns, rows

_POINT: dict[str, Any] = {"marker": "o", "color": "#ffffff", "edgecolors": BACKGROUND, "linewidths": 0.6}
_PLACE: dict[str, Any] = {"marker": "o", "color": BACKGROUND, "edgecolors": "#ffffff", "linewidths": 1.4, "zorder": 3}


def draw(path: str | Path, image: np.ndarray, reading: Reading) -> None:
    """Write the picture: the image (H, W, 3) uint8 with its queries, and one query's points level by level.

    The format follows the file's suffix.
    """
    height, width = image.shape[:2]
    view_width = WIDTH - 2 * MARGIN
    view_height = view_width * height / width
    close_up_width = (view_width - (len(STRIDES) - 1) * GAP) / len(STRIDES)
    close_up_height = close_up_width * CLOSE_UP[1] / CLOSE_UP[0]
    close_up_top = HEADER + view_height + TITLE
    page_height = close_up_top + close_up_height + FOOTER

    figure, page = new_page(page_height)
    _header(page, reading)
    chosen = int(reading.colors.std(axis=1).sum(axis=-1).argmax())
    view = add_panel(figure, MARGIN, HEADER, view_width, view_height)
    _view(view, image, reading, chosen, scale=width / view_width)
    for level, (stride, pixels) in enumerate(zip(STRIDES, color_pyramid(image), strict=True)):
        x = MARGIN + level * (close_up_width + GAP)
        rows, columns = pixels.shape[1:]
        write(page, x, close_up_top - 14, f"stride {stride}: {columns} x {rows} pixels", 17, MUTED)
        axes = add_panel(figure, x, close_up_top, close_up_width, close_up_height)
        _close_up(axes, pixels.permute(1, 2, 0).numpy(), reading.places[chosen], reading.locations[chosen, :, level])
    save(figure, path)


def _header(page: Axes, reading: Reading) -> None:
    num_queries, num_heads, num_levels, num_points, _ = reading.locations.shape
    write(page, MARGIN, 66, "Multi-scale deformable attention", 38, TEXT, weight="bold")
    subtitle = f"{num_queries} queries, {num_heads} heads, each with {num_points} points in {num_levels} levels"
    write(page, MARGIN, 104, subtitle, 18, MUTED)
    legend = (
        f"petals: the mean colour that each head read; dots: its points at stride {STRIDES[LEVEL_IN_VIEW]}",
        "below, level by level: the query in the white ring, whose heads differ most",
    )
    for line, y in zip(legend, (66, 104), strict=True):
        write(page, WIDTH - MARGIN, y, line, 18, MUTED, ha="right")


def _view(axes: Axes, image: np.ndarray, reading: Reading, chosen: int, scale: float) -> None:
    """The image with every query, one of them chosen. ``scale`` is image pixels per pixel of the page."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0), interpolation="antialiased")
    axes.set(xlim=(0, width), ylim=(height, 0))
    points = reading.locations[:, :, LEVEL_IN_VIEW].reshape(-1, 2) * (width, height)
    axes.scatter(points[:, 0], points[:, 1], s=area(POINT_RADIUS), **_POINT)
    for place, colors in zip(reading.places * (width, height), reading.colors, strict=True):
        _flower(axes, place, colors, FLOWER_RADIUS * scale)
    x, y = reading.places[chosen] * (width, height)
    ring = Circle((x, y), 1.35 * FLOWER_RADIUS * scale, fill=False)
    ring.set(edgecolor=TEXT, linewidth=2)
    axes.add_patch(ring)


def _flower(axes: Axes, place: np.ndarray, colors: np.ndarray, radius: float) -> None:
    """One petal per head, in the direction in which it looks; y points down, as in the image."""
    angle = 360 / len(colors)
    centre = (float(place[0]), float(place[1]))
    axes.add_patch(Circle(centre, radius * 1.12, facecolor=BACKGROUND, edgecolor="none", alpha=0.9))
    for head, color in enumerate(colors):
        towards = head * angle
        petal = Wedge(centre, radius, towards - angle / 2, towards + angle / 2, linewidth=0.8, edgecolor=BACKGROUND)
        petal.set_facecolor(np.clip(color / 255, 0, 1))
        axes.add_patch(petal)


def _close_up(axes: Axes, pixels: np.ndarray, place: np.ndarray, locations: np.ndarray) -> None:
    """The pixels of one level around a place, and the points (heads, points, 2) that are sampled there.

    Beyond the image there is nothing to see, as there is for the op.
    """
    rows, columns = pixels.shape[:2]
    size = np.array([columns, rows])
    points, centre, half = locations * size, place * size, np.array(CLOSE_UP) / 2
    axes.imshow(np.clip(pixels, 0, 1), extent=(0, columns, rows, 0), interpolation="nearest")
    (left, top), (right, bottom) = centre - half, centre + half
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for ray in points:
        axes.plot(*np.vstack([centre, ray]).T, color="#ffffff", linewidth=0.9, alpha=0.55)
    axes.scatter(points[..., 0], points[..., 1], s=area(2 * POINT_RADIUS), **_POINT)
    axes.scatter(centre[0], centre[1], s=area(2.6 * POINT_RADIUS), **_PLACE)
