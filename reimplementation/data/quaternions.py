"""Rotations as nuScenes writes them: unit quaternions (w, x, y, z)."""

from __future__ import annotations

import numpy as np


def to_matrix(quaternion: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) of a quaternion (4,), whose length does not matter."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def from_matrix(rotation: np.ndarray) -> np.ndarray:
    """The quaternion (4,) with w >= 0 of a rotation (3, 3).

    It is the eigenvector of a symmetric matrix's largest eigenvalue, which no angle makes ill-conditioned (Bar-Itzhack,
    "New method for extracting the quaternion from a rotation matrix", 2000).
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    symmetric = np.array(
        [
            [xx + yy + zz, zy - yz, xz - zx, yx - xy],
            [zy - yz, xx - yy - zz, xy + yx, xz + zx],
            [xz - zx, xy + yx, yy - xx - zz, yz + zy],
            [yx - xy, xz + zx, yz + zy, zz - xx - yy],
        ]
    )
    quaternion = np.linalg.eigh(symmetric)[1][:, -1]
    return quaternion if quaternion[0] >= 0 else -quaternion


def pose(record: dict) -> np.ndarray:
    """(4, 4) of a record with ``translation`` and ``rotation``, from its own frame to its parent's."""
    matrix = np.eye(4)
    matrix[:3, :3] = to_matrix(np.array(record["rotation"], dtype=np.float64))
    matrix[:3, 3] = record["translation"]
    return matrix


def record_of(pose: np.ndarray) -> dict:
    """The ``translation`` and ``rotation`` of a pose (4, 4), as JSON holds them."""
    return {"translation": pose[:3, 3].tolist(), "rotation": from_matrix(pose[:3, :3]).tolist()}
