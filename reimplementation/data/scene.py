"""A built-in surround view: a street of flat-coloured boxes around the car, one ray cast per pixel.

The renderer knows what a real image does not tell, the box behind every pixel, so every sampled colour can be
compared with the colour that was painted. Coordinates are the rig's (see rig.py): x right, y forward, z up.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .rig import Box, Camera, Rig, nuscenes_like_rig

IMAGE_WIDTH, IMAGE_HEIGHT = 704, 256  # SparseDrive's input size

FIXED_KEY_POINTS = (  # SparseDrive's fix_scale: the centre, and 0.45 of the extent towards each face
    (0.0, 0.0, 0.0),
    *((0.45, 0.0, 0.0), (-0.45, 0.0, 0.0)),
    *((0.0, 0.45, 0.0), (0.0, -0.45, 0.0)),
    *((0.0, 0.0, 0.45), (0.0, 0.0, -0.45)),
)
FREE_KEY_POINTS = (  # in place of the six that a network learns: inside, between the fixed ones
    *((0.3, 0.3, 0.0), (0.3, -0.3, 0.0), (-0.3, 0.3, 0.0), (-0.3, -0.3, 0.0)),
    *((0.0, 0.0, 0.25), (0.0, 0.0, -0.25)),
)
KEY_POINTS = np.array(FIXED_KEY_POINTS + FREE_KEY_POINTS)

NEAR = 0.1  # metres: nothing nearer to a camera is drawn
_EXTENTS = {  # length, width, height in metres
    "car": (4.4, 1.85, 1.45),
    "van": (5.4, 2.0, 2.3),
    "truck": (8.5, 2.5, 3.3),
    "bus": (12.0, 2.6, 3.2),
    "cyclist": (1.8, 0.65, 1.7),
    "pedestrian": (0.7, 0.7, 1.75),
}
_FORWARD, _ONCOMING, _LEFT, _RIGHT = 90, -90, 180, 0
_TRAFFIC = [  # label, x, y (metres), heading (degrees from +x), speed (m/s); the car stands at the origin
    # the lanes of our direction, at x = 0 and x = 3.5
    ("car", 0.0, 27.0, _FORWARD, 6),
    ("van", 0.0, 46.0, _FORWARD, 7),
    ("car", 3.5, 14.5, _FORWARD, 5),
    ("truck", 3.5, 38.0, _FORWARD, 5),
    ("car", 0.0, -13.0, _FORWARD, 6),
    ("truck", 3.5, -24.0, _FORWARD, 6),
    # the oncoming lanes, at x = -3.5 and x = -7
    ("car", -3.5, 24.0, _ONCOMING, 8),
    ("truck", -3.5, 43.0, _ONCOMING, 7),
    ("car", -3.5, -22.0, _ONCOMING, 8),
    ("car", -7.0, 15.0, _ONCOMING, 9),
    ("van", -7.0, 38.0, _ONCOMING, 9),
    ("bus", -7.0, -18.0, _ONCOMING, 7),
    # parked along both kerbs
    ("car", 6.5, 12.0, _FORWARD, 0),
    ("van", 6.5, 24.0, _FORWARD, 0),
    ("car", 6.5, -1.2, _FORWARD, 0),
    ("car", 6.5, -12.0, _FORWARD, 0),
    ("car", -10.0, 10.0, _ONCOMING, 0),
    ("van", -10.0, 26.0, _ONCOMING, 0),
    ("car", -10.0, -0.4, _ONCOMING, 0),
    ("van", -10.0, -19.0, _ONCOMING, 0),
    # out of a drive to the right
    ("car", 16.0, 7.0, _LEFT, 2),
    # on two wheels
    ("cyclist", 4.9, 4.5, _FORWARD, 4),
    ("cyclist", -7.0, -4.1, _ONCOMING, 4),
    ("cyclist", 2.6, -8.0, _FORWARD, 5),
    # on foot: the right pavement, the left one, and the crossing ahead
    ("pedestrian", 9.6, 3.9, _FORWARD, 1),
    ("pedestrian", 9.2, 2.4, _ONCOMING, 1),
    ("pedestrian", 8.9, -6.3, _FORWARD, 1),
    ("pedestrian", 9.2, -9.2, _ONCOMING, 1),
    ("pedestrian", 9.6, 16.0, _FORWARD, 1),
    ("pedestrian", -13.2, 7.6, _FORWARD, 1),
    ("pedestrian", -12.4, 5.2, _ONCOMING, 1),
    ("pedestrian", -13.0, -4.4, _FORWARD, 1),
    ("pedestrian", -12.8, -10.5, _FORWARD, 1),
    ("pedestrian", -12.4, -13.0, _ONCOMING, 1),
    ("pedestrian", -2.5, 10.2, _RIGHT, 1),
    ("pedestrian", -3.4, 10.6, _RIGHT, 1),
    ("pedestrian", 4.6, 11.0, _LEFT, 1),
]

_SKY = np.array([(232, 176, 138), (96, 92, 130), (38, 46, 84)]) / 255  # from the horizon upwards
_ASPHALT, _PAVEMENT, _GRASS = (np.array(rgb) / 255 for rgb in [(58, 61, 68), (104, 103, 108), (66, 82, 66)])
_WHITE, _YELLOW = (np.array(rgb) / 255 for rgb in [(206, 206, 202), (206, 170, 80)])


@dataclass(frozen=True, eq=False)
class View:
    """What one camera sees: for every pixel the box hit first.

    box_ids  (height, width) int32, index into the rig's boxes, -1 where there is none
    depth    (height, width) float64, metres along the optical axis; infinite where nothing is hit
    """

    box_ids: np.ndarray
    depth: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A rig whose cameras have images, the colour painted on each of its boxes, and what every camera sees.

    colors  (num_boxes, 3) uint8 RGB
    """

    rig: Rig
    colors: np.ndarray
    views: tuple[View, ...]


def built_in_scene() -> Scene:
    """The street at 704 x 256 pixels, seen by six cameras. The same on every call."""
    rig = replace(nuscenes_like_rig().scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT), boxes=street_boxes())
    colors = distinct_colors(len(rig.boxes))
    rendered = [render(camera, rig.boxes, colors) for camera in rig.cameras]
    cameras = tuple(replace(camera, image=image) for camera, (image, _) in zip(rig.cameras, rendered, strict=True))
    return Scene(replace(rig, cameras=cameras), colors, tuple(view for _, view in rendered))


def street_boxes() -> tuple[Box, ...]:
    """The vehicles and people of the built-in scene; no two of them overlap."""
    boxes = []
    for label, x, y, heading, speed in _TRAFFIC:
        length, width, height = _EXTENTS[label]
        yaw = math.radians(heading)
        velocity = speed * np.array([math.cos(yaw), math.sin(yaw)])
        # 0.02 m above the road: the underside then never fights the ground for a pixel.
        center = np.array([x, y, height / 2 + 0.02])
        boxes.append(Box(center, np.array([length, width, height]), yaw, label, velocity))
    return tuple(boxes)


def distinct_colors(count: int) -> np.ndarray:
    """(count, 3) uint8: hues a golden angle apart, so that neighbours in the list differ most."""
    golden = (math.sqrt(5) - 1) / 2
    rows = [
        colorsys.hsv_to_rgb((0.57 + i * golden) % 1, (0.62, 0.78, 0.5)[i % 3], (0.95, 0.82)[i % 2])
        for i in range(count)
    ]
    return np.round(np.array(rows).reshape(-1, 3) * 255).astype(np.uint8)


def render(camera: Camera, boxes: Sequence[Box], colors: np.ndarray) -> tuple[np.ndarray, View]:
    """Cast one ray through every pixel centre: sky, ground and boxes, each box in its one colour, unshaded.

    Returns the image (height, width, 3) uint8 and the view behind it.
    """
    view = trace_boxes(camera, boxes)
    directions = _ray_directions(camera)
    elevation = directions[..., 2] / np.linalg.norm(directions, axis=-1)
    image = _sky(elevation)

    with np.errstate(divide="ignore"):
        to_ground = np.where(directions[..., 2] < 0, -camera.position[2] / directions[..., 2], np.inf)
    ground = np.isfinite(to_ground)
    points = camera.position + directions[ground] * to_ground[ground][:, None]
    haze = np.exp(-to_ground[ground] / 60)[:, None]  # the far road fades into the horizon's colour
    image[ground] = haze * _ground_color(points[:, 0], points[:, 1]) + (1 - haze) * _SKY[0]

    pixels = np.round(image * 255).astype(np.uint8)
    hit = (view.box_ids >= 0) & (view.depth < to_ground)
    pixels[hit] = colors[view.box_ids[hit]]
    return pixels, View(np.where(hit, view.box_ids, -1), np.where(hit, view.depth, to_ground))


def trace_boxes(camera: Camera, boxes: Sequence[Box]) -> View:
    """The first box hit by the ray through every pixel centre; there is no ground here.

    A ray enters a box where it has entered all three of its slabs (Kay and Kajiya, SIGGRAPH 1986). A box that
    holds the camera is not drawn.
    """
    box_ids = np.full((camera.height, camera.width), -1, dtype=np.int32)
    depth = np.full((camera.height, camera.width), np.inf)
    directions = _ray_directions(camera)
    for index, box in enumerate(boxes):
        rows, columns = _screen_bounds(camera, box)
        rays = directions[rows, columns] @ box.rotation
        rays[rays == 0] = 1e-300  # a ray along a slab: its two crossings stay infinitely far, of either sign
        origin = (camera.position - box.center) @ box.rotation
        with np.errstate(over="ignore"):
            crossings = np.stack([(-box.size_lwh / 2 - origin) / rays, (box.size_lwh / 2 - origin) / rays])
        enters = crossings.min(axis=0).max(axis=-1)
        leaves = crossings.max(axis=0).min(axis=-1)
        nearest = (enters <= leaves) & (enters > NEAR) & (enters < depth[rows, columns])
        depth[rows, columns][nearest] = enters[nearest]
        box_ids[rows, columns][nearest] = index
    return View(box_ids, depth)


def key_points(boxes: Sequence[Box]) -> np.ndarray:
    """(num_boxes, 13, 3) float64: the key points of every box in the world frame, metres."""
    return np.array([box.points(KEY_POINTS) for box in boxes]).reshape(-1, len(KEY_POINTS), 3)


def visibility(rig: Rig, views: Sequence[View]) -> np.ndarray:
    """(num_boxes, 13, num_cams) bool: the key point's pixel in that camera shows the key point's own box."""
    pixels, depth = rig.project(key_points(rig.boxes))
    own = np.arange(len(rig.boxes))[:, None]
    seen = np.zeros(depth.shape, dtype=bool)
    for i, (camera, view) in enumerate(zip(rig.cameras, views, strict=True)):
        x, y = pixels[..., i, 0], pixels[..., i, 1]
        inside = (depth[..., i] > NEAR) & (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)
        column, row = (np.where(inside, value, 0).astype(int) for value in (x, y))
        seen[..., i] = inside & (view.box_ids[row, column] == own)
    return seen


def pixels_across(num_boxes: int, views: Sequence[View]) -> np.ndarray:
    """(num_boxes, num_cams) int: shorter side of the rectangle around the box's visible pixels, or 0."""
    across = np.zeros((num_boxes, len(views)), dtype=int)
    for i, view in enumerate(views):
        for box in np.unique(view.box_ids[view.box_ids >= 0]):
            rows, columns = np.nonzero(view.box_ids == box)
            across[box, i] = 1 + min(np.ptp(rows), np.ptp(columns))
    return across


def _ray_directions(camera: Camera) -> np.ndarray:
    """(height, width, 3): world directions through the pixel centres, of length 1 along the optical axis."""
    u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1)
    return pixels @ np.linalg.inv(camera.intrinsics).T @ camera.world_to_camera[:3, :3]


def _screen_bounds(camera: Camera, box: Box) -> tuple[slice, slice]:
    """Rows and columns that the box can cover; the whole image where it reaches behind the camera."""
    projected = np.concatenate([box.corners(), np.ones((8, 1))], axis=1) @ camera.projection_mat[:3].T
    depth = projected[:, 2]
    if (depth < NEAR).all():
        return slice(0, 0), slice(0, 0)
    if (depth < NEAR).any():
        return slice(0, camera.height), slice(0, camera.width)
    pixels = projected[:, :2] / depth[:, None]
    limits = (camera.width, camera.height)
    first = np.clip(np.floor(pixels.min(axis=0)), 0, limits).astype(int)
    last = np.clip(np.ceil(pixels.max(axis=0)), 0, limits).astype(int)
    return slice(first[1], last[1]), slice(first[0], last[0])


def _sky(elevation: np.ndarray) -> np.ndarray:
    heights = (0.0, 0.07, 0.16)  # sines of the elevations at which the three colours stand
    return np.stack([np.interp(elevation, heights, channel) for channel in _SKY.T], axis=-1)


def _ground_color(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    def near(value: np.ndarray, middle: float, half_width: float) -> np.ndarray:
        return abs(value - middle) < half_width

    drive = near(y, 7.0, 1.8) & (x > 7.75)
    road = ((x > -11.25) & (x < 7.75)) | drive
    pavement = (x > -15.5) & (x < 12.0)
    color = np.where(road[:, None], _ASPHALT, np.where(pavement[:, None], _PAVEMENT, _GRASS))

    crossing = near(y, 10.5, 1.4) & near(x, -1.75, 7) & (x % 1.2 < 0.6)
    dashes = (near(x, 1.75, 0.07) | near(x, -5.25, 0.07)) & (y % 8 < 3)
    edges = near(x, 5.25, 0.07) | near(x, -8.75, 0.07)
    bays = (near(x, 6.5, 1.25) | near(x, -10.0, 1.25)) & near((y + 4.5) % 6.6, 3.3, 0.07)
    clear_of_crossing = ~near(y, 10.5, 2.4)
    white = crossing | ((dashes | edges | bays) & clear_of_crossing)
    yellow = (near(x, -1.62, 0.05) | near(x, -1.88, 0.05)) & clear_of_crossing
    kerb = (near(x, 7.75, 0.12) | near(x, -11.25, 0.12)) & ~near(y, 7.0, 2.0) & clear_of_crossing
    color[kerb] = _PAVEMENT * 1.25
    color[white] = _WHITE
    color[yellow] = _YELLOW
    return color
