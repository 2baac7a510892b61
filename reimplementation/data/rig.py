"""Cameras, boxes and the rig they form.

The world frame is the one the boxes are given in: x right, y forward, z up, metres. A camera looks along its
own +z, with x right and y down. Pixel coordinates are continuous: the image's left edge is 0, its right edge
`width`, and pixel i spans [i, i + 1).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .documents import entries_of, file_below, numbers, read_json, require_keys, shown, text

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGE_PIXELS = 40_000_000
MAX_RIG_PIXELS = 200_000_000  # of all images together, which are held at once
MAX_IMAGE_BYTES = 256 * 2**20
MAX_CAMERAS = 64
MAX_BOXES = 4096
MAX_MAGNITUDE = 1e6  # metres or pixels; far beyond any rig, and small enough that no later arithmetic overflows
MIN_DEPTH = 1e-5  # metres; SparseDrive divides by no less


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera.

    intrinsics       (3, 3) float64, pixels; last row (0, 0, 1)
    world_to_camera  (4, 4) float64, a rigid transform; last row (0, 0, 0, 1)
    image            (height, width, 3) uint8, or None

    Raises ValueError where a field has another shape, is not finite, or is no such matrix.
    """

    name: str
    width: int
    height: int
    intrinsics: np.ndarray
    world_to_camera: np.ndarray
    image: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", text(self.name, "name"))
        for key in ("width", "height"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{key} must be a positive whole number of pixels; got {shown(value)}")
        if self.width * self.height > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"width x height must be at most {MAX_IMAGE_PIXELS} pixels; "
                f"got {shown(self.width)} x {shown(self.height)}"
            )
        object.__setattr__(self, "intrinsics", _coordinates(self.intrinsics, "intrinsics", (3, 3)))
        object.__setattr__(self, "world_to_camera", _coordinates(self.world_to_camera, "world_to_camera", (4, 4)))
        focal = self.intrinsics[[0, 1], [0, 1]]
        if not np.allclose(self.intrinsics[2], (0, 0, 1)) or not (focal > 0).all():
            raise ValueError("intrinsics must have positive focal lengths and the last row (0, 0, 1)")
        rotation = self.world_to_camera[:3, :3]
        rigid = np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) and np.linalg.det(rotation) > 0
        if not rigid or not np.allclose(self.world_to_camera[3], (0, 0, 0, 1)):
            raise ValueError("world_to_camera must be a rotation and a translation, with the last row (0, 0, 0, 1)")
        if self.image is not None and self.image.shape != (self.height, self.width, 3):
            raise ValueError(f"image must be ({self.height}, {self.width}, 3); got {self.image.shape}")

    @property
    def pixels(self) -> np.ndarray:
        """The image; ValueError where there is none."""
        if self.image is None:
            raise ValueError(f"camera {self.name} has no image")
        return self.image

    @property
    def projection_mat(self) -> np.ndarray:
        """(4, 4) float64: homogeneous world points to (u * depth, v * depth, depth, 1)."""
        padded = np.eye(4)
        padded[:3, :3] = self.intrinsics
        return padded @ self.world_to_camera

    @property
    def position(self) -> np.ndarray:
        """(3,) float64: the optical centre in the world frame, metres."""
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]

    def with_image(self, path: Path) -> Camera:
        """This camera with the image of a file, of the camera's size; ValueError where it cannot be read."""
        return replace(self, image=_read_image(path, self.width, self.height))

    def scaled_to(self, width: int, height: int) -> Camera:
        """This camera resized to `width`, then cropped from the top to `height`; intrinsics and image follow.

        So 1600 x 900 becomes 704 x 256 as in SparseDrive: times 0.44 to 704 x 396, less the top 140 rows.
        Raises ValueError where the resized image has fewer than `height` rows, or too many pixels to hold.
        """
        resized_height = round(self.height * width / self.width)
        if width * resized_height > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"camera {self.name}: {self.width} x {self.height} resized to width {width} has {resized_height} rows, "
                f"more than {MAX_IMAGE_PIXELS} pixels; use wider images"
            )
        cropped = resized_height - height
        if cropped < 0:
            raise ValueError(
                f"camera {self.name}: {self.width} x {self.height} resized to width {width} has "
                f"{resized_height} rows, fewer than the {height} asked for; use less wide images"
            )
        intrinsics = self.intrinsics.copy()
        intrinsics[0] *= width / self.width
        intrinsics[1] *= resized_height / self.height
        intrinsics[1, 2] -= cropped
        image = None if self.image is None else _resized(self.image, width, resized_height)[cropped:].copy()
        return replace(self, width=width, height=height, intrinsics=intrinsics, image=image)


@dataclass(frozen=True, eq=False)
class Box:
    """A 3D box in the world frame.

    center       (3,) metres
    size_lwh     (3,) metres: extent along the heading, across it, and height
    yaw          radians, counter-clockwise from +x about z
    velocity_xy  (2,) metres per second
    """

    center: np.ndarray
    size_lwh: np.ndarray
    yaw: float
    label: str
    velocity_xy: np.ndarray = field(default_factory=lambda: np.zeros(2))

    def __post_init__(self) -> None:
        object.__setattr__(self, "center", _coordinates(self.center, "center", (3,)))
        object.__setattr__(self, "size_lwh", _coordinates(self.size_lwh, "size_lwh", (3,)))
        object.__setattr__(self, "yaw", float(_coordinates(self.yaw, "yaw", ())))
        object.__setattr__(self, "label", text(self.label, "label"))
        object.__setattr__(self, "velocity_xy", _coordinates(self.velocity_xy, "velocity_xy", (2,)))
        if not (self.size_lwh > 1e-3).all():
            raise ValueError(f"size_lwh must be positive, at least a millimetre; got {self.size_lwh.tolist()}")

    @property
    def rotation(self) -> np.ndarray:
        """(3, 3) float64: the box's own axes (along, across, up) to the world frame."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])

    def points(self, scale: np.ndarray) -> np.ndarray:
        """World positions (..., 3) of points given in fractions of the box's size from its centre."""
        return (np.asarray(scale) * self.size_lwh) @ self.rotation.T + self.center

    def corners(self) -> np.ndarray:
        """(8, 3) float64: corner 4i + 2j + k lies at the low (0) or high (1) ends i, j, k of its axes."""
        return self.points(np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing="ij"), axis=-1).reshape(8, 3))

    def anchor(self) -> np.ndarray:
        """(11,) float64, SparseDrive's anchor: x, y, z, log extents, sin yaw, cos yaw, vx, vy, vz = 0."""
        heading = (math.sin(self.yaw), math.cos(self.yaw))
        return np.concatenate([self.center, np.log(self.size_lwh), heading, self.velocity_xy, [0.0]])


@dataclass(frozen=True, eq=False)
class Rig:
    """Cameras around a vehicle, and the boxes around it. `frame` describes the world frame in words."""

    cameras: tuple[Camera, ...]
    boxes: tuple[Box, ...] = ()
    frame: str = "x right, y forward, z up; metres"

    @classmethod
    def load(cls, folder: str | Path) -> Rig:
        """Read `sample.json` and its images from a folder; docs/rig-format.md describes the format.

        The files are not trusted: whatever does not fit raises a ValueError that names the file and the key,
        and nothing outside the folder is read. Needs Pillow, which comes with the `demo` extra.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        path = file_below(folder, "sample.json")
        document = read_json(path)
        frame = document.get("frame", cls.frame)
        if not isinstance(frame, str):
            raise ValueError(f"{path}: frame must be text; got {shown(frame)}")
        cameras = [
            _load_camera(entry, f"{path}: cameras[{i}]")
            for i, entry in enumerate(entries_of(document, "cameras", MAX_CAMERAS, str(path)))
        ]
        if not cameras:
            raise ValueError(f"{path}: cameras must list at least one camera")
        pixels = sum(camera.width * camera.height for camera in cameras)
        if pixels > MAX_RIG_PIXELS:
            raise ValueError(f"{path}: cameras must have at most {MAX_RIG_PIXELS} pixels together; got {pixels}")
        boxes = [
            _load_box(entry, f"{path}: boxes[{i}]")
            for i, entry in enumerate(entries_of(document, "boxes", MAX_BOXES, str(path)))
        ]
        seeing = [
            _with_image(camera, document["cameras"][i]["image"], folder, f"{path}: cameras[{i}]")
            for i, camera in enumerate(cameras)
        ]
        return cls(tuple(seeing), tuple(boxes), frame)

    def scaled_to(self, width: int, height: int) -> Rig:
        """The rig with every camera resized and cropped; see `Camera.scaled_to`."""
        return replace(self, cameras=tuple(camera.scaled_to(width, height) for camera in self.cameras))

    @property
    def projection_mat(self) -> np.ndarray:
        """(num_cams, 4, 4) float64; see `Camera.projection_mat`."""
        return np.stack([camera.projection_mat for camera in self.cameras])

    @property
    def image_wh(self) -> np.ndarray:
        """(num_cams, 2) float64: width and height in pixels."""
        return np.array([(camera.width, camera.height) for camera in self.cameras], dtype=np.float64)

    @property
    def anchors(self) -> np.ndarray:
        """(num_boxes, 11) float64; see `Box.anchor`."""
        return np.array([box.anchor() for box in self.boxes]).reshape(-1, 11)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where cameras see world points (..., 3): pixels (..., num_cams, 2), depth (..., num_cams), metres.

        A point behind a camera has depth <= 0, and its pixel is meaningless.
        """
        homogeneous = np.concatenate([points, np.ones_like(points[..., :1])], axis=-1)
        projected = np.einsum("nij,...j->...ni", self.projection_mat[:, :3], homogeneous)
        depth = projected[..., 2]
        return projected[..., :2] / np.maximum(depth, MIN_DEPTH)[..., None], depth


def nuscenes_like_rig() -> Rig:
    """Six 1600 x 900 cameras laid out like a nuScenes car's (Caesar et al., CVPR 2020), in rounded numbers.

    The world frame's origin lies on the ground below the roof: x right, y forward, z up, metres.
    """
    layout = [  # name, heading (degrees left of straight ahead), focal length (pixels), position (metres)
        ("CAM_FRONT", 0, 1266, (0.0, 0.75, 1.50)),
        ("CAM_FRONT_RIGHT", -55, 1266, (0.5, 0.60, 1.50)),
        ("CAM_FRONT_LEFT", 55, 1266, (-0.5, 0.60, 1.50)),
        ("CAM_BACK", 180, 810, (0.0, -0.95, 1.55)),
        ("CAM_BACK_LEFT", 110, 1266, (-0.5, 0.05, 1.55)),
        ("CAM_BACK_RIGHT", -110, 1266, (0.5, 0.05, 1.55)),
    ]
    cameras = []
    for name, heading, focal, position in layout:
        angle = math.radians(heading)
        cos, sin = math.cos(angle), math.sin(angle)
        world_to_camera = np.eye(4)
        world_to_camera[:3, :3] = [
            [cos, sin, 0.0],
            [0.0, 0.0, -1.0],
            [-sin, cos, 0.0],
        ]  # right, down, forward
        world_to_camera[:3, 3] = -world_to_camera[:3, :3] @ position
        intrinsics = np.array([[focal, 0.0, 800.0], [0.0, focal, 490.0], [0.0, 0.0, 1.0]])
        cameras.append(Camera(name, 1600, 900, intrinsics, world_to_camera))
    return Rig(tuple(cameras), frame="x right, y forward, z up; metres; origin on the ground below the roof")


def _load_camera(entry: Any, where: str) -> Camera:
    """The camera, still without its image."""
    require_keys(entry, ("name", "image", "width", "height", "intrinsics", "lidar_to_camera"), where)
    try:
        return Camera(
            name=entry["name"],
            width=entry["width"],
            height=entry["height"],
            intrinsics=_coordinates(entry["intrinsics"], "intrinsics", (3, 3)),
            world_to_camera=_coordinates(entry["lidar_to_camera"], "lidar_to_camera", (4, 4)),
        )
    except ValueError as error:
        message = str(error).replace("world_to_camera", "lidar_to_camera")
        raise ValueError(f"{where}: {message}") from None


def _with_image(camera: Camera, name: Any, folder: Path, where: str) -> Camera:
    try:
        if not isinstance(name, str):
            raise ValueError(f"image must be a file name; got {shown(name)}")
        return camera.with_image(file_below(folder, name))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _load_box(entry: Any, where: str) -> Box:
    require_keys(entry, ("center", "size_lwh", "yaw", "label"), where)
    fields = {key: entry[key] for key in ("center", "size_lwh", "yaw", "label")}
    velocity = entry.get("velocity_xy")
    if velocity not in (None, [None, None]):  # nuScenes does not know every velocity
        fields["velocity_xy"] = velocity
    try:
        return Box(**fields)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read_image(path: Path, width: int, height: int) -> np.ndarray:
    from PIL import Image

    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"image {path} is larger than {MAX_IMAGE_BYTES >> 20} MiB")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("JPEG", "PNG")) as image:
                if image.size != (width, height):  # before a single pixel is decoded
                    raise ValueError(f"it is {image.size[0]} x {image.size[1]} pixels; expected {width} x {height}")
                return _rgb(image)
    except Image.UnidentifiedImageError:
        raise ValueError(f"image {path}: not a JPEG or PNG file") from None
    except Exception as error:  # a decoder raises anything on broken data: Pillow's also IndexError
        raise ValueError(f"image {path}: {error}") from None


def _rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8. Grey of 16 bits is scaled to 8, where Pillow would cut it off at 255."""
    if image.mode.startswith("I"):
        grey = np.round(np.asarray(image) / 257).astype(np.uint8)  # 65535 is white: 257 times 255
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.array(image.convert("RGB"))


def _resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    return np.array(Image.fromarray(image).resize((width, height)))


def _coordinates(value: Any, key: str, shape: tuple[int, ...]) -> np.ndarray:
    return numbers(value, key, shape, MAX_MAGNITUDE)
