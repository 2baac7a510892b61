"""The colours of synthetic drives: what a ray that has met a box, the road or the sky brings home.

Every function here is arithmetic on tensors with one entry a ray, so that a compiler makes one kernel of all of them. A
colour is three such tensors, its red, green and blue from 0 to 1; what belongs to a moment broadcasts against rays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from .synthetic import CLASSES, CROSSING, PAVEMENT

HAZE = 150.0  # metres in which the air hides two thirds
AMBIENT, DIFFUSE = 0.55, 0.5
LINE = 0.09  # metres: half the width of a painted line
_SKY = ((0.80, 0.84, 0.88), (0.42, 0.60, 0.85))  # at the horizon, and above
_GRASS, _PAVING, _ASPHALT = (0.28, 0.38, 0.20), (0.52, 0.50, 0.48), (0.25, 0.26, 0.28)
_WHITE, _YELLOW = (0.86, 0.86, 0.84), (0.85, 0.68, 0.25)
_GLASS, _LAMP, _REAR_LAMP, _SKIN = (0.10, 0.13, 0.17), (0.98, 0.96, 0.85), (0.75, 0.05, 0.05), (0.80, 0.60, 0.48)
_RUBBER, _SPOKES = (0.06, 0.06, 0.07), (0.07, 0.07, 0.08)
_VEHICLES = ("car", "truck", "construction_vehicle", "bus", "trailer", "motorcycle")
_WITH_GLASS = ("car", "bus")  # on all sides
_WITH_WINDSCREEN = ("car", "bus", "truck", "construction_vehicle")

Color = tuple[Tensor, ...]


class Scenery(NamedTuple):
    """What a moment is like beside its objects; all of it broadcasts against rays (bs, v, r).

    bend, left, right, travelled  (bs, 1, 1): of the road, its kerbs and its beginning; see `synthetic.Road`
    middle, dividers, crossings   the line between the directions, (bs, 1, 1); further ones, and zebra crossings, each
                                  (n, bs, 1, 1): where a moment has fewer, the others are far away
    light                         (3, bs, 1, 1), towards the sun
    exposure                      (3, bs, v, 1)
    noise_seed                    (bs, 1, 1) int64
    """

    bend: Tensor
    left: Tensor
    right: Tensor
    travelled: Tensor
    middle: Tensor
    dividers: Tensor
    crossings: Tensor
    light: Tensor
    exposure: Tensor
    noise_seed: Tensor


class Surface(NamedTuple):
    """The places where rays meet boxes, and those boxes; (bs, v, r) each. Elsewhere they mean nothing.

    local        metres from the box's centre, along its axes: three tensors
    half         half extents: three
    cos, sin     of the yaw
    label        a place in `CLASSES`
    main, other  colours
    number       the object's
    """

    local: tuple[Tensor, ...]
    half: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor
    label: Tensor
    main: Color
    other: Color
    number: Tensor


def background(direction: Color, to_ground: Tensor, points: tuple[Tensor, Tensor], scenery: Scenery) -> Color:
    """Sky and road.

    Args:
        direction: x, y and z of rays.
        to_ground: how far along each the ground is; infinite: it is not met.
        points: x and y of where the ground is met.
        scenery: of the moments.
    """
    x, y, z = direction
    elevation = (z / (x * x + y * y + z * z).sqrt()).clamp(0, 0.4) / 0.4
    ground = _road(points, scenery)
    sky = [horizon + elevation * (zenith - horizon) for horizon, zenith in zip(*_SKY)]
    return tuple(torch.where(to_ground.isfinite(), *planes) for planes in zip(ground, sky))


def _road(points: tuple[Tensor, Tensor], scenery: Scenery) -> Color:
    """Asphalt with its markings, pavements and grass."""
    s, l = _road_coordinates(points, scenery.bend)  # noqa: E741
    outside = torch.maximum(scenery.left - l, l - scenery.right)
    grass: Color = tuple(torch.full_like(s, value) for value in _GRASS)
    color = _choose(outside < PAVEMENT, _PAVING, grass)
    color = _choose(outside.abs() < 0.12, _WHITE, _choose(outside < 0, _ASPHALT, color))
    from_beginning = s + scenery.travelled
    zebra = reduce(or_, [(s - middle).abs() < CROSSING / 2 for middle in scenery.crossings.unbind()])
    dash = from_beginning % 6 < 3
    dashed = dash & reduce(or_, [(l - divider).abs() < LINE for divider in scenery.dividers.unbind()])
    centre = (l - scenery.middle).abs() < LINE
    color = _choose(centre & ~zebra, _YELLOW, _choose(dashed & ~zebra, _WHITE, color))
    color = _choose(zebra & (outside < -0.3) & (l % 1.0 < 0.5), _WHITE, color)
    grain = _hash((4 * from_beginning).floor().long(), (4 * l).floor().long())
    light = (AMBIENT + DIFFUSE * scenery.light[2]) * (0.85 + 0.3 * grain)
    return tuple(plane * light for plane in color)


def _road_coordinates(points: tuple[Tensor, Tensor], bend: Tensor) -> tuple[Tensor, Tensor]:
    """s and l, metres, of points: the inverse of `Road.points`."""
    side = bend.sign()
    x, y = side * (points[0] + 1 / bend), side * points[1]
    return torch.atan2(y, x) / bend, side * torch.hypot(x, y) - 1 / bend


def boxes(surface: Surface, light: Tensor) -> Color:
    """The boxes' paint in the light of the sun."""
    unit = [local / half.clamp(min=1e-3) for local, half in zip(surface.local, surface.half)]
    reach = [place.abs() for place in unit]
    is_end = (reach[0] >= reach[1]) & (reach[0] >= reach[2])
    is_side = ~is_end & (reach[1] >= reach[2])
    place = torch.where(is_end, unit[0], torch.where(is_side, unit[1], unit[2]))
    side = place.sign()
    color = _livery(unit, is_end, is_side, side, surface)
    cos, sin = surface.cos, surface.sin
    facing = torch.where(is_end, cos * light[0] + sin * light[1], light[2])
    facing = side * torch.where(is_side, cos * light[1] - sin * light[0], facing)
    cell = [(6 * local).floor().long() for local in surface.local]
    grain = _hash(cell[0] + 64 * cell[2], cell[1] + 977 * surface.number.long())
    shade = (AMBIENT + DIFFUSE * facing.clamp(min=0)) * (0.88 + 0.24 * grain)
    return tuple(plane * shade for plane in color)


def _livery(unit: Sequence[Tensor], is_end: Tensor, is_side: Tensor, side: Tensor, surface: Surface) -> Color:
    """What is painted on a box, by place ``unit`` in half extents, and by the face: an end, a side, or the top."""
    _, across, up = unit
    label, other = surface.label, surface.other
    upright, front, rear = is_end | is_side, is_end & (side > 0), is_end & (side < 0)
    glass = (up > 0.15) & (up < 0.8) & upright
    lamps = (across.abs() > 0.55) & (up > -0.45) & (up < -0.1)
    is_vehicle = _is(label, _VEHICLES)
    color = _choose(is_vehicle & (up < -0.65) & upright, _RUBBER, surface.main)
    has_glass = _is(label, _WITH_GLASS) | (front & _is(label, _WITH_WINDSCREEN))
    color = _choose(has_glass & glass & (across.abs() < 0.9), _GLASS, color)
    color = _choose(is_vehicle & lamps & front, _LAMP, color)
    color = _choose(is_vehicle & lamps & rear, _REAR_LAMP, color)
    on_foot = _is(label, ("pedestrian",))
    color = _choose(on_foot & (up < 0), other, color)
    color = _choose(on_foot & (up > 0.72), _SKIN, color)
    color = _choose(_is(label, ("bicycle", "motorcycle")) & (up < -0.1), _SPOKES, color)
    stripes = _is(label, ("barrier",)) & ((3 * across).floor() % 2 == 0)
    stripes = stripes | (_is(label, ("traffic_cone",)) & (up > -0.1) & (up < 0.4))
    return _choose(stripes, other, color)


def develop(color: Color, depth: Tensor, scenery: Scenery) -> Tensor:
    """Haze, each camera's exposure, and the noise of its sensor: (bs, v, r, 3) uint8."""
    clear = torch.where(depth.isinf(), 1.0, torch.exp(-depth.clamp(max=1e4) / HAZE))
    pixel = torch.arange(depth.shape[2], device=depth.device)
    view = torch.arange(depth.shape[1], device=depth.device)[:, None]
    noise = (_hash(pixel, view + 64 * scenery.noise_seed) - 0.5) * 0.06
    hazy = (clear * plane + (1 - clear) * horizon for plane, horizon in zip(color, _SKY[0]))
    exposed = torch.stack([plane * exposure + noise for plane, exposure in zip(hazy, scenery.exposure)], dim=-1)
    return (exposed.clamp(0, 1) * 255).round().to(torch.uint8)


def _hash(a: Tensor, b: Tensor) -> Tensor:
    """Numbers in [0, 1) that look random, of whole numbers: the same on every device."""
    mixed = ((a * 73856093) ^ (b * 19349663)) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1274126177) & 0x7FFFFFFF
    return ((mixed ^ (mixed >> 15)) & 0xFFFF).float() / 0x10000


def _choose(where: Tensor, color: Sequence[float | Tensor], otherwise: Color) -> Color:
    return tuple(torch.where(where, value, plane) for value, plane in zip(color, otherwise))


def _is(label: Tensor, names: Sequence[str]) -> Tensor:
    return reduce(or_, [label == CLASSES.index(name) for name in names])
