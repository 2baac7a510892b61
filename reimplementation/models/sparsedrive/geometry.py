"""Boxes in their two forms, and rigid motion between frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reimplementation.ops.box_key_points import CENTRE, LOG_SIZE, SIN_COS_YAW

BOX_DIMS = 9  # x, y, z, three sizes (the first along the heading), yaw, vx, vy
ENCODED_DIMS = 10  # x, y, z, log sizes, sin yaw, cos yaw, vx, vy


def encode_boxes(boxes: Tensor) -> Tensor:
    """What the network predicts (..., 10) of boxes (..., 9): log sizes, and sine and cosine in place of the yaw."""
    position, size, yaw, velocity = boxes.split((3, 3, 1, 2), dim=-1)
    return torch.cat([position, size.log(), yaw.sin(), yaw.cos(), velocity], dim=-1)


def decode_boxes(anchor: Tensor) -> Tensor:
    """Boxes (..., 7 + v): x, y, z, sizes, yaw and v components of velocity, of anchors (..., 8 + v)."""
    sin, cos = anchor[..., SIN_COS_YAW].split(1, dim=-1)
    velocity = anchor[..., SIN_COS_YAW.stop :]
    return torch.cat([anchor[..., CENTRE], anchor[..., LOG_SIZE].exp(), torch.atan2(sin, cos), velocity], dim=-1)


def between_frames(T_source: Tensor, T_target: Tensor) -> Tensor:
    """The transform (…, 4, 4) from one frame's coordinates to another's, ``inverse(T_target) @ T_source``.

    Both are rigid, so that the inverse is a transposition: it needs no solver, which would wait for the GPU. Global
    positions span kilometres, so that both had better be float64.
    """
    rotation = T_target[..., :3, :3].mT
    turned = rotation @ T_source[..., :3, :3]
    moved = rotation @ (T_source[..., :3, 3:] - T_target[..., :3, 3:])
    last_row = T_source[..., 3:, :]
    return torch.cat([torch.cat([turned, moved], dim=-1), last_row], dim=-2)


def spread_boxes(count: int, radius: float) -> Tensor:
    """Anchors (count, 11) spread evenly over a disc on the ground: metre cubes at rest that look along +y.

    Training usually starts from the clusters of a data set's boxes; this start knows no data set. The centres lie on a
    sunflower's spiral.
    """
    index = torch.arange(count, dtype=torch.float32)
    distance = radius * ((index + 0.5) / count).sqrt()
    bearing = index * math.pi * (3 - math.sqrt(5))
    anchors = torch.zeros(count, 11)
    anchors[:, 0] = distance * bearing.cos()
    anchors[:, 1] = distance * bearing.sin()
    anchors[:, SIN_COS_YAW.start] = 1
    return anchors


def spread_lines(count: int, num_points: int, extent: tuple[float, ...]) -> Tensor:
    """Anchors (count, 2 * num_points): straight lines along the road, on a grid that covers the window around the car.

    Args:
        count: lines.
        num_points: points of a line.
        extent: metres across (x) and along (y).
    """
    columns = max(1, round(math.sqrt(count)))
    rows = math.ceil(count / columns)
    index = torch.arange(count)
    x = ((index % columns + 0.5) / columns - 0.5) * extent[0]
    step = extent[1] / rows
    y = (index // columns - rows / 2) * step
    along = torch.linspace(0, step, num_points)
    points = torch.stack([x[:, None].expand(-1, num_points), y[:, None] + along], dim=-1)
    return points.flatten(1)
