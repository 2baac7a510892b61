"""Frames that are changed a little each time they are seen, in SparseDrive's ways, with their projections following.

Images are resized, cropped, flipped and turned, each time alike through a whole sequence; the scene is turned about the
vertical; colours are changed; and squares of a grid are blackened (GridMask, arXiv 2001.04086). Pixels are continuous,
as in `data.rig`: an image's left edge is 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reimplementation.data.keyframe import Keyframe
from reimplementation.data.rig import Camera, Rig

LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How much frames are changed; the defaults are SparseDrive's, with Sparse4Dv3's turn of the scene.

    zoom         range of the image's scale, times the one that makes it as wide as the network's: 0.40 to 0.47 of 1600
                 pixels where the network sees 704
    crop_bottom  range of the share of rows that is cut off below; what is left over is cut off above
    rotate       degrees that an image is turned by, either way
    flip         whether half of the sequences are seen in a mirror
    turn         radians that the scene is turned by about the vertical, either way
    brightness   of 255, added or taken away
    contrast, saturation   by how much of themselves they grow or shrink
    hue          degrees, either way
    grid_mask    how many of the batches lose a quarter of their pixels to a grid of squares
    """

    zoom: tuple[float, ...] = (0.909, 1.068)
    crop_bottom: tuple[float, ...] = (0.0, 0.0)
    rotate: float = 5.4
    flip: bool = True
    turn: float = 0.3925
    brightness: float = 32.0
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 18.0
    grid_mask: float = 0.7

    def __post_init__(self) -> None:
        for name in ("zoom", "crop_bottom"):
            low_high = getattr(self, name)
            if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1]:
                raise ValueError(f"{name} must be a low and a high value of at least 0; got {low_high}")
        if self.zoom[0] == 0 or self.crop_bottom[1] >= 1:
            raise ValueError(f"zoom must be positive and crop_bottom below 1; got {self.zoom}, {self.crop_bottom}")
        if not 0 <= self.grid_mask <= 1:
            raise ValueError(f"grid_mask must be in [0, 1]; got {self.grid_mask}")


class View(NamedTuple):
    """How images are changed: their scale as `AugmentationConfig.zoom`, shares of what is cut off, and more.

    left    of the columns that are too many, 0 to 1: how many are cut off on the left
    bottom  of all rows, as `AugmentationConfig.crop_bottom`
    angle   radians, clockwise as the image is seen
    """

    zoom: float = 1.0
    left: float = 0.5
    bottom: float = 0.0
    flipped: bool = False
    angle: float = 0.0


def draw_view(config: AugmentationConfig, random: np.random.Generator) -> View:
    """A view at random."""
    return View(
        zoom=random.uniform(config.zoom[0], config.zoom[1]),
        left=random.uniform(),
        bottom=random.uniform(config.crop_bottom[0], config.crop_bottom[1]),
        flipped=bool(config.flip and random.random() < 0.5),
        angle=math.radians(random.uniform(-config.rotate, config.rotate)),
    )


class Seen(NamedTuple):
    """A rig's images as a network sees them.

    pictures        (num_cams, height, width, 3) uint8, black where an image ends
    projection_mat  (num_cams, 4, 4), to the pictures' pixels
    focal           (num_cams,) focal lengths in those pixels
    """

    pictures: np.ndarray
    projection_mat: np.ndarray
    focal: np.ndarray


def seen_as(rig: Rig, view: View, width: int, height: int) -> Seen:
    """A rig's images as a network of this input size sees them."""
    pictures, projections, focals = [], [], []
    for camera in rig.cameras:
        size = _resized(camera, view, width)
        matrix = _from_resized(view, size, width, height)
        pictures.append(_warped(camera, size, matrix, width, height))
        to_pixels = np.eye(4)
        to_pixels[:3, :3] = matrix @ np.diag([size[0] / camera.width, size[1] / camera.height, 1])
        projections.append(to_pixels @ camera.projection_mat)
        focals.append(camera.intrinsics[0, 0] * size[0] / camera.width)
    return Seen(np.stack(pictures), np.stack(projections), np.array(focals))


def turned(keyframe: Keyframe, angle: float) -> Keyframe:
    """A keyframe whose lidar looks another way: everything around it is turned by ``angle``, anticlockwise."""
    back = np.eye(4)
    back[:2, :2] = _rotation(-angle)
    boxes = keyframe.boxes.copy()
    boxes[:, :2] = rotated(boxes[:, :2], angle)
    boxes[:, 6] += angle
    boxes[:, 7:] = rotated(boxes[:, 7:], angle)
    cameras = tuple(replace(c, world_to_camera=c.world_to_camera @ back) for c in keyframe.rig.cameras)
    return replace(keyframe, boxes=boxes, T_global=keyframe.T_global @ back, rig=replace(keyframe.rig, cameras=cameras))


def rotated(vectors: np.ndarray, angle: float) -> np.ndarray:
    """Vectors (n, 2) or (n, 3) turned about the vertical by ``angle``, anticlockwise."""
    return np.concatenate([vectors[:, :2] @ _rotation(angle).T, vectors[:, 2:]], axis=1)


def recoloured(pictures: np.ndarray, config: AugmentationConfig, random: np.random.Generator) -> np.ndarray:
    """Pictures (n, H, W, 3) uint8, each with other brightness, contrast, saturation and hue.

    The last three are one matrix on colours: contrast scales it, saturation scales what differs from grey, and hue
    turns about the axis of greys.
    """
    changed = np.empty_like(pictures)
    for picture, result in zip(pictures, changed):
        brightness = random.uniform(-config.brightness, config.brightness)
        contrast = 1 + random.uniform(-config.contrast, config.contrast)
        saturation = 1 + random.uniform(-config.saturation, config.saturation)
        hue = math.radians(random.uniform(-config.hue, config.hue))
        grey = np.tile(LUMINANCE, (3, 1))
        matrix = contrast * (grey + saturation * (_about_grey(hue) - grey))
        result[:] = (picture.astype(np.float32) @ matrix.T.astype(np.float32) + np.float32(brightness)).clip(0, 255)
    return changed


def grid_mask(images: Tensor, random: np.random.Generator) -> Tensor:
    """Images (..., H, W) with zeros in the squares of a grid: a quarter of all pixels, at random spacing and place."""
    height, width = images.shape[-2:]
    period = int(random.integers(2, min(height, width)))
    is_cut = []
    for extent in (height, width):
        place = torch.arange(extent, device=images.device) + int(random.integers(period))
        is_cut.append(place % period < period // 2)
    return images.masked_fill(is_cut[0][:, None] & is_cut[1], 0)


def _resized(camera: Camera, view: View, width: int) -> tuple[int, int]:
    """Width and height of a camera's image at the view's scale, in whole pixels."""
    scale = view.zoom * width / camera.width
    return max(1, round(camera.width * scale)), max(1, round(camera.height * scale))


def _from_resized(view: View, size: tuple[int, int], width: int, height: int) -> np.ndarray:
    """(3, 3): from pixels of the resized image to those of the network: a crop, a mirror, a turn about the middle."""
    left = round(view.left * max(0, size[0] - width))
    top = round((1 - view.bottom) * size[1]) - height
    crop = np.array([[1.0, 0, -left], [0, 1, -top], [0, 0, 1]])
    mirror = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) if view.flipped else np.eye(3)
    cos, sin = math.cos(view.angle), math.sin(view.angle)
    to_middle = np.array([[1.0, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    turn = np.array([[cos, -sin, width / 2], [sin, cos, height / 2], [0, 0, 1]])
    return turn @ to_middle @ mirror @ crop


def _warped(camera: Camera, size: tuple[int, int], matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    from PIL import Image

    image = Image.fromarray(camera.pixels)
    if image.size != size:
        image = image.resize(size)
    backwards = np.linalg.inv(matrix)[:2].flatten().tolist()
    return np.array(image.transform((width, height), Image.Transform.AFFINE, backwards, Image.Resampling.BILINEAR))


def _about_grey(angle: float) -> np.ndarray:
    """(3, 3): the rotation of colours about the axis of greys (Rodrigues' formula)."""
    axis = np.full(3, 1 / math.sqrt(3))
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * (cross @ cross)


def _rotation(angle: float) -> np.ndarray:
    """(2, 2), anticlockwise."""
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin], [sin, cos]])
