"""Look at boxes through the op: images as features, boxes as queries; each box's colour comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from reimplementation import ops
from reimplementation.bench.inputs import STRIDES
from reimplementation.data.rig import Rig
from reimplementation.data.scene import View, key_points, pixels_across, visibility

MIN_PIXELS_ACROSS = 16


@dataclass(frozen=True, eq=False)
class Recovery:
    """What the op read at the boxes' key points.

    colors   (num_boxes, 3) float64 RGB in [0, 255]; NaN for a box of which no camera sees a key point
    weights  (num_boxes, num_pts, num_cams) float64, on the finest level; they sum to 1 a box, to 0 if unseen
    seen     (num_boxes, num_pts, num_cams) bool: the camera sees the key point unoccluded
    counted  (num_boxes,) bool: some view shows every key point of the box, and it at least 16 pixels across
    """

    colors: np.ndarray
    weights: np.ndarray
    seen: np.ndarray
    counted: np.ndarray


def recover_colors(rig: Rig, views: Sequence[View]) -> Recovery:
    """Aggregate the RGB pyramid of the rig's images (strides 4, 8, 16, 32) at the key points of its boxes.

    A trained network would have learnt the weights; here they follow from the box behind every pixel, which
    the views tell. All the weight lies on the finest level. There it is shared equally by the (key point,
    camera) pairs whose bilinear footprint, 8 x 8 image pixels, shows the point's own box and nothing else; in
    a box without such a pair, by the pairs whose own pixel shows the box.
    """
    pyramid = color_pyramid(np.stack([camera.pixels for camera in rig.cameras]))
    seen = visibility(rig, views)
    pure = seen & _pure_footprints(rig, views)
    shares = np.where(pure.any(axis=(1, 2), keepdims=True), pure, seen).astype(np.float64)
    weights = shares / np.maximum(shares.sum(axis=(1, 2), keepdims=True), 1)

    pixels, depth = rig.project(key_points(rig.boxes))
    locations = np.where(depth[..., None] > 0, pixels / rig.image_wh, -1.0)  # behind the camera: outside, so ignored
    level_weights = torch.zeros(*weights.shape, len(STRIDES), 1)
    level_weights[..., 0, 0] = torch.from_numpy(weights)
    rows, shapes, starts = ops.feature_maps_format(pyramid)
    colors = ops.deformable_aggregation_function(
        rows, shapes, starts, torch.from_numpy(locations).float()[None], level_weights[None]
    )[0].double()
    colors[torch.from_numpy(weights.sum(axis=(1, 2)) == 0)] = torch.nan

    across = pixels_across(len(rig.boxes), views)
    is_whole = seen.all(axis=1) & (across >= MIN_PIXELS_ACROSS)
    return Recovery(colors.numpy() * 255, weights, seen, np.any(is_whole, axis=1))


def color_pyramid(images: np.ndarray) -> list[Tensor]:
    """Images (num_cams, H, W, 3) uint8 as levels (1, num_cams, 3, H / stride, W / stride) in [0, 1]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return [avg_pool2d(pixels, stride)[None] for stride in STRIDES]


def _pure_footprints(rig: Rig, views: Sequence[View]) -> np.ndarray:
    """(num_boxes, num_pts, num_cams) bool: the four finest-level pixels under a point show only its box."""
    pixels, _ = rig.project(key_points(rig.boxes))
    own = np.arange(len(rig.boxes))[:, None]
    pure = np.ones(pixels.shape[:-1], dtype=bool)
    for i, view in enumerate(views):
        cells = _sole_owner(view.box_ids, STRIDES[0])
        rows, columns = cells.shape
        corner = np.floor(pixels[..., i, :] / STRIDES[0] - 0.5)
        for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
            column = np.clip(corner[..., 0] + right, -1, columns).astype(int)
            row = np.clip(corner[..., 1] + down, -1, rows).astype(int)
            inside = (column >= 0) & (column < columns) & (row >= 0) & (row < rows)
            pure[..., i] &= inside & (cells[np.where(inside, row, 0), np.where(inside, column, 0)] == own)
    return pure


def _sole_owner(box_ids: np.ndarray, stride: int) -> np.ndarray:
    """For every stride x stride cell the box that all its pixels show, -1 where they differ."""
    rows, columns = (size // stride for size in box_ids.shape)
    cells = box_ids[: rows * stride, : columns * stride].reshape(rows, stride, columns, stride)
    first = cells[:, 0, :, 0]
    return np.where((cells == first[:, None, :, None]).all(axis=(1, 3)), first, -1)
