"""Rotation and constant-velocity motion of points, in full precision: `reimplementation.ops.transforms` says how."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reimplementation.ops.transforms import transform


def rotate(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Linear map (..., k, d) of vectors (..., d): what `transform` does without the translation."""
    return transform(vectors, F.pad(matrix, (0, 1)))


def in_3d(velocity: Tensor) -> Tensor:
    """A velocity (..., 0 to 3) with all three components; those it does not have are zero."""
    return F.pad(velocity, (0, 3 - velocity.shape[-1]))


def displacement(velocity: Tensor, time_interval: Tensor | float) -> Tensor:
    """Way covered at constant velocity.

    Args:
        velocity: (bs, num_anchor, 0 to 3), metres per second.
        time_interval: (bs,) or a scalar, seconds.

    Returns:
        (bs, num_anchor, 3), metres.
    """
    seconds = torch.as_tensor(time_interval, dtype=velocity.dtype, device=velocity.device)
    return in_3d(velocity) * seconds.reshape(-1, 1, 1)


def with_past_frames(
    key_points: Tensor,
    velocity: Tensor | None,
    T_cur2temp_list: Sequence[Tensor] | None,
    cur_timestamp: Tensor | None,
    temp_timestamps: Sequence[Tensor] | None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Key points, and where they were in earlier frames if there are any.

    Args:
        key_points: (bs, num_anchor, num_pts, 3) in the current frame.
        velocity: (bs, num_anchor, 0 to 3), metres per second, or None for points that stand still.
        T_cur2temp_list: per earlier frame (bs, 3 or 4, 4), from the current frame to that one.
        cur_timestamp: (bs,), seconds.
        temp_timestamps: per earlier frame (bs,), seconds.

    Returns:
        ``key_points`` alone where one of the last three is None or there is no timestamp; else ``key_points``
        and a list of the same shape per earlier frame, each in that frame's coordinates.

    Raises:
        ValueError: there are not as many transforms as timestamps.
    """
    if T_cur2temp_list is None or cur_timestamp is None or temp_timestamps is None or len(temp_timestamps) == 0:
        return key_points
    if len(T_cur2temp_list) != len(temp_timestamps):
        raise ValueError(
            f"T_cur2temp_list must hold one transform per timestamp, {len(temp_timestamps)}; got {len(T_cur2temp_list)}"
        )
    past = []
    for matrix, timestamp in zip(T_cur2temp_list, temp_timestamps, strict=True):
        points = key_points
        if velocity is not None:
            points = points - displacement(velocity, cur_timestamp - timestamp)[:, :, None]
        past.append(transform(points, matrix.to(points.dtype)[:, None, None, :3]))
    return key_points, past
