"""Folders of annotated frames: nuScenes' layout, or a single frame in the form of a rig."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reimplementation.data.keyframe import Keyframe
from reimplementation.data.nuscenes import NuScenes
from reimplementation.data.rig import Rig

RIG_FILE = "sample.json"


class Recordings:
    """The scenes of a folder.

    Args:
        folder: in nuScenes' layout, with one folder of tables whose name begins with ``v1.0``; or a rig's, which is a
            scene of one frame.

    Attributes:
        scenes: by name, the tokens of each scene's frames in order.

    Raises:
        ValueError: the folder is neither, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._nuscenes: NuScenes | None = None
        if (self.folder / RIG_FILE).is_file():
            self.scenes = {self.folder.name: [self.folder.name]}
            return
        versions = sorted(path.name for path in self.folder.glob("v1.0*") if path.is_dir())
        if len(versions) != 1:
            found = ", ".join(versions) or "neither"
            raise ValueError(f"{self.folder} must hold {RIG_FILE}, or one folder v1.0-… of tables; it has {found}")
        self._nuscenes = NuScenes(self.folder, versions[0])
        self.scenes = self._nuscenes.scenes

    def keyframe(self, token: str, with_images: bool = True) -> Keyframe:
        """Read a frame; a ValueError where something of it is missing or damaged."""
        if self._nuscenes is None:
            return Keyframe.of_rig(Rig.load(self.folder), token)
        return self._nuscenes.keyframe(token, with_images)

    def points(self, token: str) -> np.ndarray:
        """The lidar's points (n, 3) in a frame, in its own frame; none where there was no lidar."""
        return np.zeros((0, 3)) if self._nuscenes is None else self._nuscenes.points(token)
