"""Pictures of synthetic drives, drawn by torch on any device: one ray a pixel, against boxes and a road.

A ray enters a box where it has entered all three of its slabs (Kay and Kajiya, SIGGRAPH 1986). That is arithmetic on
every pixel alike, so that a GPU draws many frames at once; only boxes that a camera may see are tried. `painting.py`
says what the rays bring home. On a GPU with Triton the boxes are tried by a kernel, `tracing.py`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import painting
from .rig import Camera, Rig
from .synthetic import LIDAR_HEIGHT, RANGE, Moment

NEAR = 0.1  # metres: nothing nearer to a camera is drawn
PROBES = (-0.8, 0.0, 0.8)  # in half extents: a grid of points in each box, at which the lidar looks
SIGHT = 150.0  # metres: a crossing that is farther takes less than a sixth of a pixel's height
NUM_CROSSINGS, NUM_DIVIDERS = 8, 2  # that are within sight at most, the divider in the middle not counted


class Rendering(NamedTuple):
    """Pictures of a batch of moments.

    images      (bs, num_cams, H, W, 3) uint8 RGB
    box_ids     (bs, num_cams, H, W) int64: the object behind each pixel, a row of the moment's; -1: none
    depth       (bs, num_cams, H, W) float32 metres along the optical axis; infinite: sky
    num_points  (bs, n) int64: how many of 27 points in each object the lidar sees; objects are padded to n
    """

    images: Tensor
    box_ids: Tensor
    depth: Tensor
    num_points: Tensor


class _Rays(NamedTuple):
    """Rays from points: origin (bs, v, 3), direction (bs, v, r, 3)."""

    origin: Tensor
    direction: Tensor


class _Boxes(NamedTuple):
    """The boxes that each view may see: center, half (bs, v, k, 3), cos_sin (bs, v, k, 2), row (bs, v, k), -1: none."""

    center: Tensor
    half: Tensor
    cos_sin: Tensor
    row: Tensor


@torch.no_grad()
def render(moments: Sequence[Moment], rig: Rig, device: torch.device | str = "cpu") -> Rendering:
    """Draw moments as a rig of cameras sees them.

    The same moments give the same pictures everywhere, but for the last bit of some pixels, as devices round. Nothing
    waits for a GPU.

    Args:
        moments: of any drives.
        rig: whose cameras have one size, in the lidar's frame, as `synthetic_rig` gives it.
        device: where the work is done, and the result is.
    """
    device = torch.device(device)
    (width, height), *others = {(camera.width, camera.height) for camera in rig.cameras}
    if others:
        raise ValueError(f"all cameras must have one size; got {width} x {height} and {others[0]}")
    rays = _Rays(*(part.expand(len(moments), *part.shape) for part in _camera_rays(rig, device)))
    boxes = _boxes_in_view(moments, rig, device)
    depth, nearest = _trace(rays, boxes)
    images, box_ids, depth = _paint(rays, boxes, _appearance(moments, boxes), _scenery(moments, device), depth, nearest)
    shape = (len(moments), len(rig.cameras), height, width)
    return Rendering(
        images=images.view(*shape, 3),
        box_ids=box_ids.view(shape),
        depth=depth.view(shape),
        num_points=_lidar_points(moments, device),
    )


@functools.lru_cache(maxsize=4)
def _camera_rays(rig: Rig, device: torch.device) -> _Rays:
    """A ray through every pixel's centre, of length 1 along the optical axis: origin (v, 3), direction (v, r, 3)."""
    origins, directions = [], []
    for camera in rig.cameras:
        u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
        directions.append(pixels @ np.linalg.inv(camera.intrinsics).T @ camera.world_to_camera[:3, :3])
        origins.append(camera.position)
    return _Rays(*(_tensor(np.stack(x), device) for x in (origins, directions)))


def _boxes_in_view(moments: Sequence[Moment], rig: Rig, device: torch.device) -> _Boxes:
    """The boxes whose surrounding sphere reaches into a camera's pyramid of view."""
    center, size, _ = _objects(moments)
    radius = np.linalg.norm(size, axis=-1) / 2
    in_view = [(radius > 0) & _in_view(center, radius, camera) for camera in rig.cameras]
    return _gather_boxes(moments, np.stack(in_view, axis=1), device)


def _in_view(center: np.ndarray, radius: np.ndarray, camera: Camera) -> np.ndarray:
    """Whether spheres (…, 3), (…) reach into what a camera sees."""
    x, y, z = np.moveaxis(center @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3], -1, 0)
    inside = z > -radius
    for focal, middle, extent, across in (
        (camera.intrinsics[0, 0], camera.intrinsics[0, 2], camera.width, x),
        (camera.intrinsics[1, 1], camera.intrinsics[1, 2], camera.height, y),
    ):
        low, high = -middle / focal, (extent - middle) / focal  # slopes of the pyramid's sides
        inside &= across - low * z > -radius * np.hypot(1, low)
        inside &= high * z - across > -radius * np.hypot(1, high)
    return inside


def _objects(moments: Sequence[Moment]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres and sizes (bs, n, 3) and yaws (bs, n) of the moments' objects, padded by such without extent."""
    most = max(1, max(len(moment.objects.label) for moment in moments))
    packed = np.zeros((len(moments), most, 7))
    for row, moment in zip(packed, moments):
        objects = moment.objects
        row[: len(objects.label)] = np.concatenate([objects.center, objects.size, objects.yaw[:, None]], axis=1)
    return packed[..., :3], packed[..., 3:6], packed[..., 6]


def _gather_boxes(moments: Sequence[Moment], in_view: np.ndarray, device: torch.device) -> _Boxes:
    """The objects that are in each view, (bs, v, n) bool; padding, up to the longest list, has no extent."""
    center, size, yaw = (values[:, None] for values in _objects(moments))
    most = max(1, in_view.sum(axis=-1).max())
    row = np.argsort(~in_view, axis=-1, kind="stable")[..., :most]  # those in view first, in their order
    is_box = np.take_along_axis(in_view, row, axis=-1)
    of_row = row[..., None]
    half = np.where(is_box[..., None], np.take_along_axis(size, of_row, axis=2) / 2, 0)
    cos_sin = np.take_along_axis(np.stack([np.cos(yaw), np.sin(yaw)], axis=-1), of_row, axis=2)
    parts = (np.take_along_axis(center, of_row, axis=2), half, cos_sin, np.where(is_box, row, -1))
    return _Boxes(*(_tensor(part, device) for part in parts))


def _trace(rays: _Rays, boxes: _Boxes) -> tuple[Tensor, Tensor]:
    """How far along each ray the first box begins (bs, v, r), infinite: none; and which one, -1: none.

    A GPU traces all views at once. A processor traces one after another, whose rays its cache holds, and tries no
    padding.
    """
    if boxes.row.device.type == "cuda" and importlib.util.find_spec("triton"):
        from .tracing import trace

        return trace(*rays, *boxes[:3], NEAR)
    if boxes.row.device.type != "cpu":
        return _trace_views(rays, boxes)
    bs, views = boxes.row.shape[:2]
    counts = (boxes.row >= 0).sum(-1)
    traced = []
    for place in ((i, j) for i in range(bs) for j in range(views)):
        view = _Rays(*(part[place][None, None] for part in rays))
        traced.append(_trace_views(view, _Boxes(*(part[place][None, None, : counts[place]] for part in boxes))))
    distance, nearest = (torch.cat(parts).view(bs, views, -1) for parts in zip(*traced))
    return distance, nearest


def _trace_views(rays: _Rays, boxes: _Boxes) -> tuple[Tensor, Tensor]:
    dx, dy, dz = rays.direction.unbind(-1)
    inverse_z = 1 / dz
    distance = torch.full_like(dx, torch.inf)
    nearest = torch.full(dx.shape, -1, device=dx.device)
    for k in range(boxes.row.shape[2]):
        cos, sin = boxes.cos_sin[:, :, k].unbind(-1)
        x, y, z = (rays.origin - boxes.center[:, :, k]).unbind(-1)
        half_x, half_y, half_z = (half[..., None] for half in boxes.half[:, :, k].unbind(-1))
        begins, ends = _slab((cos * x + sin * y)[..., None], half_x, 1 / (cos[..., None] * dx + sin[..., None] * dy))
        for near, far in (
            _slab((cos * y - sin * x)[..., None], half_y, 1 / (cos[..., None] * dy - sin[..., None] * dx)),
            _slab(z[..., None], half_z, inverse_z),
        ):
            begins, ends = torch.maximum(begins, near), torch.minimum(ends, far)
        is_nearest = (begins < ends) & (begins > NEAR) & (begins < distance)
        distance = torch.where(is_nearest, begins, distance)
        nearest = torch.where(is_nearest, k, nearest)
    return distance, nearest


def _slab(origin: Tensor, half: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter and leave -half <= origin + t * direction <= half, given 1 / direction."""
    middle, reach = -origin * inverse, half * inverse.abs()
    return middle - reach, middle + reach


def _paint(
    rays: _Rays,
    boxes: _Boxes,
    appearance: Sequence[Tensor],
    scenery: painting.Scenery,
    distance: Tensor,
    nearest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures (bs, v, r, 3) uint8, objects (bs, v, r), -1: none, and depths; a box below the road is hidden."""
    direction = rays.direction.unbind(-1)
    x, y, z = rays.origin[:, :, None].unbind(-1)
    to_ground = torch.where(direction[2] < 0, -(z + LIDAR_HEIGHT) / direction[2], torch.inf)
    reach = to_ground.clamp(max=1000.0)
    points = (x + reach * direction[0], y + reach * direction[1])
    color = painting.background(direction, to_ground, points, scenery)
    depth = torch.minimum(distance, to_ground)

    index = nearest.clamp(min=0)
    is_box = (nearest >= 0) & (distance < to_ground)
    painted = painting.boxes(_surface(rays, boxes, appearance, torch.where(is_box, distance, 0), index), scenery.light)
    color = tuple(torch.where(is_box, *planes) for planes in zip(painted, color))
    box_ids = torch.where(is_box, boxes.row.gather(2, index), -1)
    return painting.develop(color, depth, scenery), box_ids, depth


def _surface(
    rays: _Rays, boxes: _Boxes, appearance: Sequence[Tensor], reach: Tensor, index: Tensor
) -> painting.Surface:
    """The boxes by index (bs, v, r), and where rays of these lengths end in their coordinates."""
    center, half, cos_sin, label, main, other, number = (_at(part, index) for part in (*boxes[:3], *appearance))
    ends = (o + reach * d for o, d in zip(rays.origin[:, :, None].unbind(-1), rays.direction.unbind(-1)))
    x, y, z = (end - middle for end, middle in zip(ends, center))
    cos, sin = cos_sin
    local = (cos * x + sin * y, cos * y - sin * x, z)
    return painting.Surface(local, half, cos, sin, label[0], main, other, number[0])


def _appearance(moments: Sequence[Moment], boxes: _Boxes) -> tuple[Tensor, ...]:
    """Label, colours and number (bs, v, k, …) of the boxes in view."""
    most = max(1, max(len(m.objects.label) for m in moments))
    packed = np.zeros((len(moments), most, 8))
    for row, moment in zip(packed, moments):
        objects = moment.objects
        count = len(objects.label)
        colors = objects.colors.reshape(count, 6)
        row[:count] = np.concatenate([objects.label[:, None], colors, objects.instance_id[:, None]], axis=1)
    table = _tensor(packed, boxes.row.device)
    rows = boxes.row.clamp(min=0)
    return torch.stack([of[row] for of, row in zip(table, rows)]).split((1, 3, 3, 1), dim=-1)


def _scenery(moments: Sequence[Moment], device: torch.device) -> painting.Scenery:
    """What the moments are like, in the form that broadcasts against rays."""

    def of_moments(values: Sequence) -> Tensor:
        array = np.moveaxis(np.array(values), 0, -1)  # a moment's values come first
        return _tensor(array[..., None, None], device)

    roads = [moment.road for moment in moments]
    crossings = [road.crossings[np.abs(road.crossings) < SIGHT] for road in roads]
    return painting.Scenery(
        bend=of_moments([road.bend for road in roads]),
        left=of_moments([road.kerbs[0] for road in roads]),
        right=of_moments([road.kerbs[1] for road in roads]),
        travelled=of_moments([moment.travelled for moment in moments]),
        middle=of_moments([road.dividers[0] for road in roads]),
        dividers=of_moments([_padded(road.dividers[1:], NUM_DIVIDERS) for road in roads]),
        crossings=of_moments([_padded(of_road, NUM_CROSSINGS) for of_road in crossings]),
        light=of_moments([moment.light for moment in moments]),
        exposure=_tensor(np.stack([moment.exposure.T for moment in moments], axis=1)[..., None], device),
        noise_seed=of_moments([moment.noise_seed for moment in moments]),
    )


def _padded(places: Sequence[float], count: int) -> list[float]:
    return [*places, *[100 * RANGE] * (count - len(places))]


def _lidar_points(moments: Sequence[Moment], device: torch.device) -> Tensor:
    """How many points of a grid in each box no other box hides from the lidar (bs, n)."""
    exists = _objects(moments)[1][..., 0] > 0
    boxes = _gather_boxes(moments, exists[:, None], device)
    grid = _tensor(np.stack(np.meshgrid(*[PROBES] * 3, indexing="ij"), axis=-1).reshape(-1, 3), device)
    local = boxes.half[:, 0, :, None] * grid
    cos, sin = boxes.cos_sin[:, 0, :, None].unbind(-1)
    x, y, z = local.unbind(-1)
    target = boxes.center[:, 0, :, None] + torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1)
    rays = _Rays(target.new_zeros(len(moments), 1, 3), target.flatten(1, 2)[:, None])
    _, nearest = _trace(rays, boxes)
    own = torch.arange(target.shape[1], device=device)[:, None]
    return (nearest.view(target.shape[:3]) == own).sum(-1)


def _at(table: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """Columns (bs, v, r) of rows of a table (bs, v, k, d), by index (bs, v, r)."""
    return tuple(column.gather(2, index) for column in table.unbind(-1))


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """On the device: whole numbers as int64, others as float32. It travels from memory that a GPU need not wait for."""
    is_whole = np.issubdtype(array.dtype, np.integer)
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64 if is_whole else np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
