"""Writes synthetic drives as nuScenes' tables and images, for whoever reads that layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .nuscenes import CLASS_OF_CATEGORY, LIDAR
from .quaternions import record_of
from .rig import Camera, Rig
from .synthetic import CLASSES, LIDAR_HEIGHT, Moment

VERSION = "v1.0-mini"
ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
)
_CATEGORIES = {name: category for category, name in reversed(CLASS_OF_CATEGORY.items())}
_VISIBILITIES = ("v0-40", "v40-60", "v60-80", "v80-100")
_LIDAR_TO_EGO = np.array([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, LIDAR_HEIGHT], [0, 0, 0, 1]])  # x forward, y left


class Writer:
    """A folder in nuScenes' layout that is being written; `close` writes its tables.

    Args:
        folder: it is made, and must not hold such tables yet.
        rig: the cameras of all drives.
    """

    def __init__(self, folder: Path, rig: Rig):
        if (folder / VERSION).exists():
            raise ValueError(f"{folder} holds a data set already; choose another folder")
        self.folder, self.rig = folder, rig
        self._tables: dict[str, list[dict]] = {
            "category": [{"token": _token(c), "name": c, "description": ""} for c in _CATEGORIES.values()],
            "attribute": [{"token": _token(a), "name": a, "description": ""} for a in ATTRIBUTES],
            "visibility": [{"token": str(i + 1), "level": v, "description": ""} for i, v in enumerate(_VISIBILITIES)],
            "log": [{"token": _token("log"), "logfile": "", "vehicle": "", "date_captured": "", "location": "town"}],
            "map": [{"token": _token("map"), "log_tokens": [_token("log")], "category": "", "filename": ""}],
        }
        for name in (LIDAR, *(camera.name for camera in rig.cameras)):
            modality = "lidar" if name == LIDAR else "camera"
            self._add("sensor", name, channel=name, modality=modality)
            (folder / "samples" / name).mkdir(parents=True, exist_ok=True)
        self._add_calibration(LIDAR, _LIDAR_TO_EGO, [])
        for camera in rig.cameras:
            to_ego = _LIDAR_TO_EGO @ np.linalg.inv(camera.world_to_camera)
            self._add_calibration(camera.name, to_ego, camera.intrinsics.tolist())

    def add_drive(self, name: str, frames: Iterator[tuple[Moment, np.ndarray, np.ndarray]]) -> None:
        """Write a drive.

        Args:
            name: of the scene, unlike any other's.
            frames: in order; each a moment, its pictures (num_cams, H, W, 3) uint8, and how many points of every object
                the lidar sees. Objects of which it sees none are left out.
        """
        tokens: list[str] = []
        annotations: dict[int, list[dict]] = {}
        for moment, pictures, num_points in frames:
            tokens.append(_token(name, "sample", len(tokens)))
            self._add_data(name, len(tokens) - 1, moment, pictures)
            for row in np.nonzero(np.asarray(num_points)[: len(moment.objects.label)])[0].tolist():
                record = self._annotation(name, tokens[-1], moment, row, int(num_points[row]))
                annotations.setdefault(int(moment.objects.instance_id[row]), []).append(record)
            self._tables.setdefault("sample", []).append(
                {"token": tokens[-1], "timestamp": round(moment.timestamp * 1e6), "scene_token": _token(name)}
            )
        _link(self._tables["sample"][-len(tokens) :])
        for records in annotations.values():
            self._add_instance(records)
        self._tables.setdefault("scene", []).append(
            {
                "token": _token(name),
                "name": name,
                "description": "",
                "log_token": _token("log"),
                "nbr_samples": len(tokens),
                "first_sample_token": tokens[0],
                "last_sample_token": tokens[-1],
            }
        )

    def close(self) -> None:
        """Write the tables."""
        tables = self.folder / VERSION
        tables.mkdir()
        for name, rows in self._tables.items():
            (tables / f"{name}.json").write_text(json.dumps(rows, indent=0))

    def _add(self, table: str, *key: object, **fields: object) -> None:
        self._tables.setdefault(table, []).append({"token": _token(table, *key), **fields})

    def _add_calibration(self, name: str, to_ego: np.ndarray, intrinsics: list) -> None:
        fields = {"sensor_token": _token("sensor", name), "camera_intrinsic": intrinsics, **record_of(to_ego)}
        self._add("calibrated_sensor", name, **fields)

    def _add_data(self, drive: str, frame: int, moment: Moment, pictures: np.ndarray) -> None:
        """A record of every sensor's data in a frame, its ego pose, and the images."""
        time = round(moment.timestamp * 1e6)
        ego_pose = record_of(moment.T_global @ np.linalg.inv(_LIDAR_TO_EGO))
        sensors: list[tuple[str, Camera | None]] = [(LIDAR, None), *((c.name, c) for c in self.rig.cameras)]
        for index, (name, camera) in enumerate(sensors):
            filename = f"samples/{name}/{drive}__{name}__{time}." + ("pcd.bin" if camera is None else "jpg")
            if camera is None:
                (self.folder / filename).write_bytes(b"")  # synthetic drives have no cloud of points
            else:
                _write_image(self.folder / filename, pictures[index - 1])
            key = (drive, frame, name)
            self._add("ego_pose", *key, timestamp=time, **ego_pose)
            self._add(
                "sample_data",
                *key,
                sample_token=_token(drive, "sample", frame),
                ego_pose_token=_token("ego_pose", *key),
                calibrated_sensor_token=_token("calibrated_sensor", name),
                timestamp=time,
                fileformat="pcd" if camera is None else "jpg",
                is_key_frame=True,
                height=0 if camera is None else camera.height,
                width=0 if camera is None else camera.width,
                filename=filename,
                prev="",
                next="",
            )

    def _annotation(self, drive: str, sample: str, moment: Moment, row: int, num_points: int) -> dict:
        objects = moment.objects
        label, number = CLASSES[objects.label[row]], int(objects.instance_id[row])
        box = np.eye(4)
        cos, sin = np.cos(objects.yaw[row]), np.sin(objects.yaw[row])
        box[:2, :2], box[:3, 3] = [[cos, -sin], [sin, cos]], objects.center[row]
        length, width, height = objects.size[row].tolist()
        attribute = _attribute(label, bool(np.linalg.norm(objects.velocity[row]) > 0.2))
        return {
            "token": _token(sample, number),
            "sample_token": sample,
            "instance_token": _token(drive, "instance", number),
            "category": _CATEGORIES[label],
            "visibility_token": str(1 + min(3, 4 * num_points // 28)),
            "attribute_tokens": [] if attribute is None else [_token(attribute)],
            "size": [width, length, height],
            "num_lidar_pts": num_points,
            "num_radar_pts": 0,
            **record_of(moment.T_global @ box),
        }

    def _add_instance(self, annotations: list[dict]) -> None:
        """An object with its annotations, which lose the category that the object has."""
        categories = [record.pop("category") for record in annotations]
        _link(annotations)
        self._tables.setdefault("sample_annotation", []).extend(annotations)
        self._tables.setdefault("instance", []).append(
            {
                "token": annotations[0]["instance_token"],
                "category_token": _token(categories[0]),
                "nbr_annotations": len(annotations),
                "first_annotation_token": annotations[0]["token"],
                "last_annotation_token": annotations[-1]["token"],
            }
        )


def _link(records: list[dict]) -> None:
    """Let each record name the one before and the one after."""
    tokens = ["", *(record["token"] for record in records), ""]
    for index, record in enumerate(records):
        record.update(prev=tokens[index], next=tokens[index + 2])


def _attribute(name: str, moves: bool) -> str | None:
    if name in ("barrier", "traffic_cone"):
        return None
    if name == "pedestrian":
        return "pedestrian.moving" if moves else "pedestrian.standing"
    if name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moves else "cycle.without_rider"
    return "vehicle.moving" if moves else "vehicle.parked"


def _write_image(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(picture).save(path, quality=95)


def _token(*key: object) -> str:
    """32 hexadecimal digits, the same for the same key."""
    return hashlib.md5("/".join(map(str, key)).encode(), usedforsecurity=False).hexdigest()
