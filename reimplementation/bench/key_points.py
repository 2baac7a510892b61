"""Where the key points of a benchmark's queries lie, and the cameras that look at them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reimplementation.data.rig import Rig, nuscenes_like_rig
from reimplementation.data.scene import IMAGE_HEIGHT, IMAGE_WIDTH

MAP_HEIGHTS = (0.0, 0.5, -0.5, 1.0, -1.0)  # metres above the ground, as SparseDrive's map head has them
MAP_POINTS = 20  # of a polyline


def _boxes(random: np.random.Generator, batch_size: int, num_queries: int, num_points: int) -> np.ndarray:
    """Random points of random boxes within 50 m."""
    queries = (batch_size, num_queries, 1)
    distance = 50 * np.sqrt(random.uniform(0.005, 1, queries))  # uniform over the disc, not inside the car
    bearing, yaw = random.uniform(-np.pi, np.pi, (2, *queries))
    size = np.array([4.5, 1.9, 1.6]) * random.uniform(0.5, 1.5, (*queries, 3))
    local = random.uniform(-0.5, 0.5, (batch_size, num_queries, num_points, 3)) * size
    x = distance * np.cos(bearing) + local[..., 0] * np.cos(yaw) - local[..., 1] * np.sin(yaw)
    y = distance * np.sin(bearing) + local[..., 0] * np.sin(yaw) + local[..., 1] * np.cos(yaw)
    return np.stack([x, y, 0.8 + local[..., 2]], axis=-1)


def _polylines(random: np.random.Generator, batch_size: int, num_queries: int, num_points: int) -> np.ndarray:
    """Straight lines on the ground within 60 x 30 m, at every point of which key points stand at every height.

    In the order of `reimplementation.models.deformable.SparsePoint3DKeyPointsGenerator`: points of the line, then
    heights, then the places that a query learns around these, here within a metre.
    """
    places, rest = divmod(num_points, MAP_POINTS * len(MAP_HEIGHTS))
    if rest or not places:
        raise ValueError(f"points of a map must be a multiple of {MAP_POINTS * len(MAP_HEIGHTS)}; got {num_points}")
    ends = random.uniform(-1, 1, (2, batch_size, num_queries, 1, 2)) * np.array([15, 30])
    along = np.linspace(0, 1, MAP_POINTS)[:, None]
    line = ends[0] + (ends[1] - ends[0]) * along
    shape = (batch_size, num_queries, MAP_POINTS, len(MAP_HEIGHTS), places)
    around = line[:, :, :, None, None] + random.normal(0, 0.5, (*shape, 2))
    height = np.broadcast_to(np.array(MAP_HEIGHTS)[:, None, None], (*shape, 1))
    return np.concatenate([around, height], axis=-1).reshape(batch_size, num_queries, num_points, 3)


def _trajectories(random: np.random.Generator, batch_size: int, num_queries: int, num_points: int) -> np.ndarray:
    """Key points around ways ahead of the car, up to 50 m and 55 degrees to either side, below 2 m."""
    shape = (batch_size, num_queries, num_points)
    bearing = np.radians(90 + random.uniform(-55, 55, (batch_size, num_queries, 1)))
    distance = 2 + 48 * np.sort(random.uniform(0, 1, shape), axis=-1)
    x, y = (distance * turn(bearing) + random.normal(0, 1, shape) for turn in (np.cos, np.sin))
    return np.stack([x, y, random.uniform(0, 2, shape)], axis=-1)


_DRAWN: dict[str, tuple[Callable[..., np.ndarray], int]] = {  # and how many of the rig's cameras look
    "rig": (_boxes, 6),
    "map": (_polylines, 6),
    "planner": (_trajectories, 3),
}
GEOMETRIES = tuple(_DRAWN)


def key_points(geometry: str, batch_size: int, num_queries: int, num_points: int, seed: int) -> tuple[Rig, np.ndarray]:
    """The cameras, at 704 x 256 pixels, and (batch_size, num_queries, num_points, 3) places in metres.

    Args:
        geometry: "rig", boxes around the car; "map", polylines on the ground; "planner", ways ahead of the car, before
            the three cameras that look there.
        batch_size, num_queries, num_points: sizes; a map has a multiple of 100 points a query.
        seed: of the random generator.
    """
    draw, num_cams = _DRAWN[geometry]
    rig = Rig(nuscenes_like_rig().scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT).cameras[:num_cams])
    return rig, draw(np.random.default_rng(seed), batch_size, num_queries, num_points)
