"""nuScenes' own files, version 1.0: tables of JSON and images (Caesar et al., arXiv 1903.11027), without the devkit."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np

from .documents import file_below, require_keys
from .keyframe import Keyframe
from .quaternions import pose
from .rig import Camera, Rig
from .synthetic import CLASSES

TABLES = {  # and the keys that are read
    "category": ("token", "name"),
    "instance": ("token", "category_token"),
    "sensor": ("token", "channel"),
    "calibrated_sensor": ("token", "sensor_token", "translation", "rotation", "camera_intrinsic"),
    "ego_pose": ("token", "translation", "rotation"),
    "scene": ("token", "name", "first_sample_token"),
    "sample": ("token", "timestamp", "next"),
    "sample_data": ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "filename", "is_key_frame"),
    "sample_annotation": ("token", "sample_token", "instance_token", "translation", "size", "rotation", "prev", "next"),
}
CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
LIDAR = "LIDAR_TOP"
CLASS_OF_CATEGORY = {
    "vehicle.car": "car",
    "vehicle.truck": "truck",
    "vehicle.construction": "construction_vehicle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer",
    "movable_object.barrier": "barrier",
    "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
}
POINT_NUMBERS = 5  # of a point in a file: x, y, z, intensity, ring
MAX_SECONDS_BETWEEN = 1.5  # of two annotations from which a velocity follows


class NuScenes:
    """A folder in nuScenes' layout.

    Args:
        folder: with ``samples`` and the folder of tables in it.
        version: the folder of tables.

    Attributes:
        scenes: by name, the tokens of each scene's samples in order.

    Raises:
        ValueError: a table is missing or damaged.
    """

    def __init__(self, folder: str | Path, version: str = "v1.0-mini"):
        self.folder = Path(folder)
        if not (self.folder / version).is_dir():
            raise ValueError(f"{self.folder} holds no tables of the version {version}")
        self._tables = {name: _read_table(self.folder / version, name) for name in TABLES}
        self._row_of_instance = {token: row for row, token in enumerate(self._tables["instance"])}
        self._data: dict[str, dict[str, dict]] = defaultdict(dict)
        for record in self._tables["sample_data"].values():
            if record["is_key_frame"]:
                self._data[record["sample_token"]][self._channel(record)] = record
        self._annotations: dict[str, list[dict]] = defaultdict(list)
        for record in self._tables["sample_annotation"].values():
            self._annotations[record["sample_token"]].append(record)
        self.scenes = {scene["name"]: self._samples_of(scene) for scene in self._tables["scene"].values()}

    def keyframe(self, token: str, with_images: bool = True) -> Keyframe:
        """Read a sample.

        Raises:
            ValueError: there is none of this token, a sensor is missing, or an image is not there or damaged.
        """
        if token not in self._tables["sample"]:
            raise ValueError(f"{self.folder} has no sample {token!r}")
        data = self._data[token]
        missing = [name for name in (LIDAR, *CAMERAS) if name not in data]
        if missing:
            raise ValueError(f"sample {token} has no data of {', '.join(missing)}")
        T_global = self._sensor_to_global(data[LIDAR])
        cameras = tuple(self._camera(name, data[name], T_global, with_images) for name in CAMERAS)
        rows = [row for row in self._annotations[token] if self._class_of(row) is not None]
        boxes = np.array([self._box(row, T_global) for row in rows]).reshape(-1, 9)
        return Keyframe(
            token=token,
            timestamp=self._tables["sample"][token]["timestamp"] / 1e6,
            T_global=T_global,
            rig=Rig(cameras, frame="x right, y forward, z up; metres; origin at the lidar"),
            labels=np.array([CLASSES.index(str(self._class_of(row))) for row in rows], dtype=np.int64),
            boxes=boxes,
            instance_id=np.array([self._row_of_instance[row["instance_token"]] for row in rows], dtype=np.int64),
            num_points=np.array([row["num_lidar_pts"] + row["num_radar_pts"] for row in rows], dtype=np.int64),
        )

    def points(self, token: str) -> np.ndarray:
        """The lidar's cloud of points (n, 3) in a sample, metres in its own frame.

        Raises:
            ValueError: there is no such file, or it holds no whole number of points.
        """
        path = file_below(self.folder, self._data[token][LIDAR]["filename"])
        try:
            numbers = np.fromfile(path, dtype=np.float32)
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        if len(numbers) % POINT_NUMBERS:
            raise ValueError(f"{path} must hold {POINT_NUMBERS} numbers a point; got {len(numbers)} numbers")
        return numbers.reshape(-1, POINT_NUMBERS)[:, :3].astype(np.float64)

    def _samples_of(self, scene: dict) -> list[str]:
        tokens, token = [], scene["first_sample_token"]
        while token:
            tokens.append(token)
            token = self._get("sample", token)["next"]
            if len(tokens) > len(self._tables["sample"]):
                raise ValueError(f"{self.folder}: the samples of scene {scene['name']} go round in a circle")
        return tokens

    def _get(self, table: str, token: str) -> dict:
        try:
            return self._tables[table][token]
        except KeyError:
            raise ValueError(f"{self.folder}: {table} has no record {token!r}") from None

    def _channel(self, data: dict) -> str:
        sensor = self._get("calibrated_sensor", data["calibrated_sensor_token"])
        return self._get("sensor", sensor["sensor_token"])["channel"]

    def _class_of(self, annotation: dict) -> str | None:
        category = self._get("instance", annotation["instance_token"])["category_token"]
        return CLASS_OF_CATEGORY.get(self._get("category", category)["name"])

    def _sensor_to_global(self, data: dict) -> np.ndarray:
        sensor = self._get("calibrated_sensor", data["calibrated_sensor_token"])
        return pose(self._get("ego_pose", data["ego_pose_token"])) @ pose(sensor)

    def _camera(self, name: str, data: dict, T_global: np.ndarray, with_image: bool) -> Camera:
        """A camera, seen from where the lidar was: the car moves between the two exposures."""
        sensor = self._get("calibrated_sensor", data["calibrated_sensor_token"])
        camera = Camera(
            name=name,
            width=data["width"],
            height=data["height"],
            intrinsics=np.array(sensor["camera_intrinsic"], dtype=np.float64),
            world_to_camera=np.linalg.inv(self._sensor_to_global(data)) @ T_global,
        )
        return camera.with_image(file_below(self.folder, data["filename"])) if with_image else camera

    def _box(self, annotation: dict, T_global: np.ndarray) -> np.ndarray:
        to_lidar = np.linalg.inv(T_global)
        box = to_lidar @ pose(annotation)
        width, length, height = annotation["size"]
        velocity = to_lidar[:3, :3] @ self._velocity(annotation)
        yaw = math.atan2(box[1, 0], box[0, 0])
        return np.array([*box[:3, 3], length, width, height, yaw, *velocity[:2]])

    def _velocity(self, annotation: dict) -> np.ndarray:
        """From the annotation before to the one after, or from and to this one at an end: global, NaN if not known."""
        ends = [self._get("sample_annotation", annotation[way]) for way in ("prev", "next") if annotation[way]]
        first, last = (ends[0] if annotation["prev"] else annotation), (ends[-1] if annotation["next"] else annotation)
        times = [self._get("sample", end["sample_token"])["timestamp"] / 1e6 for end in (first, last)]
        passed = times[1] - times[0]
        if not 0 < passed <= MAX_SECONDS_BETWEEN * len(ends):
            return np.full(3, math.nan)
        return (np.array(last["translation"]) - np.array(first["translation"])) / passed


def _read_table(folder: Path, name: str) -> dict[str, dict]:
    """The records of a table by their tokens."""
    path = folder / f"{name}.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path} must hold a list of records")
    for index, row in enumerate(rows):
        require_keys(row, TABLES[name], f"{path}: record {index}")
    return {row["token"]: row for row in rows}
