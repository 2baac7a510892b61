"""A moment that was annotated, wherever its files come from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rig import Rig
from .synthetic import CLASSES


@dataclass(frozen=True, eq=False)
class Keyframe:
    """A moment that was annotated.

    token        its name, unlike any other's in its data set
    timestamp    seconds
    T_global     (4, 4) from the lidar's frame to the global one
    rig          the cameras, in the lidar's frame; with images, if they were asked for
    labels       (n,) int64, places in `CLASSES`
    boxes        (n, 9) x, y, z, length, width, height, yaw, vx, vy in the lidar's frame; NaN: a velocity not known
    instance_id  (n,) int64, the same in all frames
    num_points   (n,) int64: points of lidar and radar in each box
    """

    token: str
    timestamp: float
    T_global: np.ndarray
    rig: Rig
    labels: np.ndarray
    boxes: np.ndarray
    instance_id: np.ndarray
    num_points: np.ndarray

    @classmethod
    def of_rig(cls, rig: Rig, token: str) -> Keyframe:
        """A rig with its boxes as a moment that stands alone; boxes of other classes than `CLASSES` are left out."""
        boxes = [box for box in rig.boxes if box.label in CLASSES]
        rows = [np.concatenate([box.center, box.size_lwh, [box.yaw], box.velocity_xy]) for box in boxes]
        return cls(
            token=token,
            timestamp=0.0,
            T_global=np.eye(4),
            rig=rig,
            labels=np.array([CLASSES.index(box.label) for box in boxes], dtype=np.int64),
            boxes=np.array(rows).reshape(-1, 9),
            instance_id=np.arange(len(boxes)),
            num_points=np.ones(len(boxes), dtype=np.int64),  # whoever lists a box has seen it
        )
