"""Pictures of synthetic drives, drawn by torch on any device: one ray a pixel, against boxes and a road.

A ray enters a box where it has entered all three of its slabs (Kay and Kajiya, SIGGRAPH 1986). That is arithmetic on
every pixel alike, so that a GPU draws many frames at once; only boxes that a camera may see are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .rig import Rig
from .synthetic import CLASSES, CROSSING, LIDAR_HEIGHT, PAVEMENT, RANGE, Moment

NEAR = 0.1  # metres: nothing nearer to a camera is drawn
PROBES = (-0.8, 0.0, 0.8)  # in half extents: a grid of points in each box, at which the lidar looks
HAZE = 150.0  # metres in which the air hides two thirds
AMBIENT, DIFFUSE = 0.55, 0.5
LINE = 0.09  # metres: half the width of a painted line
_SKY = ((0.80, 0.84, 0.88), (0.42, 0.60, 0.85))  # at the horizon, and above
_GRASS, _PAVING, _ASPHALT = (0.28, 0.38, 0.20), (0.52, 0.50, 0.48), (0.25, 0.26, 0.28)
_WHITE, _YELLOW = (0.86, 0.86, 0.84), (0.85, 0.68, 0.25)
_GLASS, _LAMP, _REAR_LAMP, _SKIN = (0.10, 0.13, 0.17), (0.98, 0.96, 0.85), (0.75, 0.05, 0.05), (0.80, 0.60, 0.48)
_VEHICLES = ("car", "truck", "construction_vehicle", "bus", "trailer", "motorcycle")
_WITH_GLASS = ("car", "bus")  # on all sides
_WITH_WINDSCREEN = ("car", "bus", "truck", "construction_vehicle")


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

    The same moments give the same pictures everywhere, but for the last bit of some pixels, as devices round.

    Args:
        moments: of any drives.
        rig: whose cameras have one size, in the lidar's frame, as `synthetic_rig` gives it.
        device: where the work is done, and the result is.
    """
    device = torch.device(device)
    (width, height), *others = {(camera.width, camera.height) for camera in rig.cameras}
    if others:
        raise ValueError(f"all cameras must have one size; got {width} x {height} and {others[0]}")
    rays = _camera_rays(rig, len(moments), device)
    boxes = _boxes_in_view(moments, rig, device)
    depth, nearest = _trace(rays, boxes)
    color, depth = _paint_background(rays, depth, moments)
    row = boxes.row.gather(2, nearest.clamp(min=0))
    is_box = (nearest >= 0) & (row >= 0) & (depth > 0)
    color = torch.where(is_box[..., None], _paint_boxes(rays, depth, boxes, nearest, moments), color)
    images = _develop(color, depth, moments)
    shape = (len(moments), len(rig.cameras), height, width)
    return Rendering(
        images=images.view(*shape, 3),
        box_ids=torch.where(is_box, row, -1).view(shape),
        depth=depth.view(shape),
        num_points=_lidar_points(moments, device),
    )


def _camera_rays(rig: Rig, batch_size: int, device: torch.device) -> _Rays:
    """A ray through every pixel's centre, of length 1 along the optical axis."""
    origins, directions = [], []
    for camera in rig.cameras:
        u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
        pixels = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3)
        directions.append(pixels @ np.linalg.inv(camera.intrinsics).T @ camera.world_to_camera[:3, :3])
        origins.append(camera.position)
    origin, direction = (_tensor(np.stack(x), device)[None] for x in (origins, directions))
    return _Rays(origin.expand(batch_size, -1, -1), direction.expand(batch_size, -1, -1, -1))


def _boxes_in_view(moments: Sequence[Moment], rig: Rig, device: torch.device) -> _Boxes:
    """The boxes whose surrounding sphere reaches into a camera's pyramid of view."""
    rows = [[_in_view(moment, camera) for camera in rig.cameras] for moment in moments]
    return _gather_boxes(moments, rows, device)


def _in_view(moment: Moment, camera) -> np.ndarray:
    center = moment.objects.center @ camera.world_to_camera[:3, :3].T + camera.world_to_camera[:3, 3]
    radius = np.linalg.norm(moment.objects.size, axis=1) / 2
    x, y, z = center.T
    inside = z > -radius
    for focal, middle, extent, across in (
        (camera.intrinsics[0, 0], camera.intrinsics[0, 2], camera.width, x),
        (camera.intrinsics[1, 1], camera.intrinsics[1, 2], camera.height, y),
    ):
        low, high = -middle / focal, (extent - middle) / focal  # slopes of the pyramid's sides
        inside &= across - low * z > -radius * np.hypot(1, low)
        inside &= high * z - across > -radius * np.hypot(1, high)
    return np.nonzero(inside)[0]


def _gather_boxes(moments: Sequence[Moment], rows: Sequence[Sequence[np.ndarray]], device: torch.device) -> _Boxes:
    """Boxes by their rows for every view of every moment, padded to the longest list."""
    most = max(1, max(len(row) for views in rows for row in views))
    shape = (len(moments), len(rows[0]), most)
    row = np.full(shape, -1, dtype=np.int64)
    center, half, cos_sin = np.zeros((*shape, 3)), np.zeros((*shape, 3)), np.zeros((*shape, 2))
    for i, (moment, views) in enumerate(zip(moments, rows)):
        for j, found in enumerate(views):
            place = (i, j, slice(len(found)))
            row[place] = found
            center[place], half[place] = moment.objects.center[found], moment.objects.size[found] / 2
            cos_sin[place] = np.stack([np.cos(moment.objects.yaw[found]), np.sin(moment.objects.yaw[found])], axis=1)
    tensors = (_tensor(x, device) for x in (center, half, cos_sin))
    return _Boxes(*tensors, torch.from_numpy(row).to(device))


def _trace(rays: _Rays, boxes: _Boxes) -> tuple[Tensor, Tensor]:
    """How far along each ray the first box begins (bs, v, r), infinite: none; and which one, -1: none.

    A GPU traces all views at once. A processor traces one after another, whose rays its cache holds, and tries no
    padding.
    """
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


def _paint_background(rays: _Rays, distance: Tensor, moments: Sequence[Moment]) -> tuple[Tensor, Tensor]:
    """The colours of sky and road, and how far the ray goes, where no box is nearer; a box below the road is hidden."""
    dz = rays.direction[..., 2]
    to_ground = torch.where(dz < 0, -(rays.origin[..., None, 2] + LIDAR_HEIGHT) / dz, torch.inf)
    elevation = (dz / rays.direction.norm(dim=-1)).clamp(0, 0.4)[..., None] / 0.4
    horizon, zenith = (dz.new_tensor(color) for color in _SKY)
    sky = horizon + elevation * (zenith - horizon)
    reach = to_ground.clamp(max=1000.0)
    points = rays.origin[..., None, :2] + reach[..., None] * rays.direction[..., :2]
    ground = _road_color(points, moments)
    color = torch.where((dz < 0)[..., None], ground, sky)
    return color, torch.minimum(distance, to_ground)


def _road_color(points: Tensor, moments: Sequence[Moment]) -> Tensor:
    """Asphalt with its markings, pavements and grass at points (bs, v, r, 2)."""
    s, l = _road_coordinates(points, moments)  # noqa: E741
    left, right = (_of_moments([m.road.kerbs[i] for m in moments], s) for i in range(2))
    outside = torch.maximum(left - l, l - right)
    color = _choose(outside < PAVEMENT, _PAVING, _choose(outside < PAVEMENT, _GRASS, s.new_tensor(_GRASS)))
    color = _choose(outside.abs() < 0.12, _WHITE, _choose(outside < 0, _ASPHALT, color))
    zebra, dashed = torch.zeros_like(s, dtype=torch.bool), torch.zeros_like(s, dtype=torch.bool)
    on_road = outside < -0.3
    travelled = _of_moments([m.travelled for m in moments], s)
    for middle in _padded([m.road.crossings for m in moments], s):
        zebra = zebra | ((s - middle).abs() < CROSSING / 2)
    for divider in _padded([m.road.dividers[1:] for m in moments], s):
        dashed = dashed | (((l - divider).abs() < LINE) & ((s + travelled) % 6 < 3))
    centre = (l - _of_moments([m.road.dividers[0] for m in moments], s)).abs() < LINE
    color = _choose(centre & ~zebra, _YELLOW, _choose(dashed & ~zebra, _WHITE, color))
    color = _choose(zebra & on_road & (l % 1.0 < 0.5), _WHITE, color)
    grain = _hash((4 * (s + travelled)).floor().long(), (4 * l).floor().long())
    light = _of_moments([AMBIENT + DIFFUSE * m.light[2] for m in moments], s)
    return color * (light * (0.85 + 0.3 * grain))[..., None]


def _road_coordinates(points: Tensor, moments: Sequence[Moment]) -> tuple[Tensor, Tensor]:
    """s and l, metres, of points (bs, v, r, 2): the inverse of `Road.points`."""
    bend = _of_moments([m.road.bend for m in moments], points[..., 0])
    side = bend.sign()
    x, y = side * (points[..., 0] + 1 / bend), side * points[..., 1]
    return torch.atan2(y, x) / bend, side * torch.hypot(x, y) - 1 / bend


def _paint_boxes(rays: _Rays, distance: Tensor, boxes: _Boxes, nearest: Tensor, moments: Sequence[Moment]) -> Tensor:
    """The colours (bs, v, r, 3) where rays meet boxes; elsewhere they mean nothing."""
    index = nearest.clamp(min=0)
    table = _appearance(moments, boxes)
    center, half, cos_sin, label, main, other, number = (_at(part, index) for part in (*boxes[:3], *table))
    reach = torch.where(distance.isfinite(), distance, 0)[..., None]
    x, y, z = (rays.origin[:, :, None] + reach * rays.direction - center).unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    local = torch.stack([cos * x + sin * y, cos * y - sin * x, z], dim=-1)
    unit = local / half.clamp(min=1e-3)
    axis = unit.abs().argmax(dim=-1)
    side = unit.gather(-1, axis[..., None]).squeeze(-1).sign()
    color = _livery(unit, axis, side, label.squeeze(-1), main, other)
    normal = (
        torch.where(axis == 0, cos, torch.where(axis == 1, -sin, 0)),
        torch.where(axis == 0, sin, torch.where(axis == 1, cos, 0)),
    )
    lx, ly, lz = (_of_moments([m.light[i] for m in moments], side) for i in range(3))
    facing = side * (normal[0] * lx + normal[1] * ly + (axis == 2) * lz)
    cell = (6 * local).floor().long()
    grain = _hash(cell[..., 0] + 64 * cell[..., 2], cell[..., 1] + 977 * number.squeeze(-1).long())
    shade = (AMBIENT + DIFFUSE * facing.clamp(min=0)) * (0.88 + 0.24 * grain)
    return color * shade[..., None]


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


def _livery(unit: Tensor, axis: Tensor, side: Tensor, label: Tensor, main: Tensor, other: Tensor) -> Tensor:
    """What is painted on a box, by place ``unit`` in half extents, and by the face: its axis, and its side."""
    along, across, up = unit.unbind(-1)
    upright, front, rear = axis < 2, (axis == 0) & (side > 0), (axis == 0) & (side < 0)
    glass = (up > 0.15) & (up < 0.8) & upright
    lamps = (across.abs() > 0.55) & (up > -0.45) & (up < -0.1)
    color = main
    color = _choose(_is(label, _VEHICLES) & (up < -0.65) & upright, (0.06, 0.06, 0.07), color)
    has_glass = _is(label, _WITH_GLASS) | (front & _is(label, _WITH_WINDSCREEN))
    color = _choose(has_glass & glass & (across.abs() < 0.9), _GLASS, color)
    color = _choose(_is(label, _VEHICLES) & lamps & front, _LAMP, color)
    color = _choose(_is(label, _VEHICLES) & lamps & rear, _REAR_LAMP, color)
    on_foot = _is(label, ("pedestrian",))
    color = torch.where((on_foot & (up < 0))[..., None], other, color)
    color = _choose(on_foot & (up > 0.72), _SKIN, color)
    color = _choose(_is(label, ("bicycle", "motorcycle")) & (up < -0.1), (0.07, 0.07, 0.08), color)
    stripes = _is(label, ("barrier",)) & ((3 * across).floor() % 2 == 0)
    stripes |= _is(label, ("traffic_cone",)) & (up > -0.1) & (up < 0.4)
    return torch.where(stripes[..., None], other, color)


def _develop(color: Tensor, depth: Tensor, moments: Sequence[Moment]) -> Tensor:
    """Haze, each camera's exposure, and the noise of its sensor: uint8."""
    clear = torch.exp(-depth.clamp(max=1e4) / HAZE)[..., None]
    is_sky = depth.isinf()[..., None]
    color = torch.where(is_sky, color, clear * color + (1 - clear) * color.new_tensor(_SKY[0]))
    exposure = _tensor(np.stack([m.exposure for m in moments]), color.device)[:, :, None]
    pixel = torch.arange(color.shape[2], device=color.device)
    view = torch.arange(color.shape[1], device=color.device)[:, None]
    seed = torch.tensor([m.noise_seed for m in moments], device=color.device)[:, None, None]
    noise = (_hash(pixel, view + 64 * seed) - 0.5)[..., None] * 0.06
    return ((color * exposure + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _lidar_points(moments: Sequence[Moment], device: torch.device) -> Tensor:
    """How many points of a grid in each box no other box hides from the lidar (bs, n)."""
    rows = [[np.arange(len(moment.objects.label))] for moment in moments]
    boxes = _gather_boxes(moments, rows, device)
    grid = torch.cartesian_prod(*[torch.tensor(PROBES, device=device)] * 3)
    local = boxes.half[:, 0, :, None] * grid
    cos, sin = boxes.cos_sin[:, 0, :, None].unbind(-1)
    x, y, z = local.unbind(-1)
    target = boxes.center[:, 0, :, None] + torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1)
    rays = _Rays(target.new_zeros(len(moments), 1, 3), target.flatten(1, 2)[:, None])
    _, nearest = _trace(rays, boxes)
    own = torch.arange(target.shape[1], device=device)[:, None]
    return (nearest.view(target.shape[:3]) == own).sum(-1)


def _hash(a: Tensor, b: Tensor) -> Tensor:
    """Numbers in [0, 1) that look random, of whole numbers: the same on every device."""
    mixed = ((a * 73856093) ^ (b * 19349663)) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((mixed ^ (mixed >> 15)) & 0xFFFF).float() / 0x10000


def _choose(where: Tensor, color: Sequence[float], otherwise: Tensor) -> Tensor:
    return torch.where(where[..., None], otherwise.new_tensor(color), otherwise)


def _is(label: Tensor, names: Sequence[str]) -> Tensor:
    return torch.isin(label, label.new_tensor([CLASSES.index(name) for name in names]))


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Rows (bs, v, r, d) of a table (bs, v, k, d), by index (bs, v, r)."""
    return table.gather(2, index[..., None].expand(-1, -1, -1, table.shape[-1]))


def _of_moments(values: Sequence[float], like: Tensor) -> Tensor:
    """A value a moment, which broadcasts against (bs, v, r)."""
    return like.new_tensor(np.array(values, dtype=np.float64))[:, None, None]


def _padded(lists: Sequence[Sequence[float]], like: Tensor) -> list[Tensor]:
    """Lists of a moment each, transposed: tensors that broadcast against (bs, v, r), far away where a list ends."""
    most = max(len(values) for values in lists)
    rows = [[*values, *[100 * RANGE] * (most - len(values))] for values in lists]
    return [_of_moments(column, like) for column in zip(*rows)]


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(device)
