"""Whatever is done to a frame, a place in the world lands on the pixel that shows it."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from reimplementation.data.keyframe import Keyframe
from reimplementation.data.rig import Camera, Rig, nuscenes_like_rig
from reimplementation.training.augmentation import (
    AugmentationConfig,
    View,
    draw_view,
    grid_mask,
    recoloured,
    seen_as,
    turned,
)

pytest.importorskip("PIL")
WIDTH, HEIGHT = 176, 64
FOCAL, SOURCE_WIDTH, SOURCE_HEIGHT = 320.0, 400, 225
PLACES = np.array([[0.3, 8.0, -0.6], [-2.0, 9.0, -0.9], [2.1, 9.5, -1.2]])  # in front of the camera, metres
VIEWS = [
    View(),
    View(zoom=1.068, left=0.9),
    View(zoom=0.909),
    View(bottom=0.1),
    View(flipped=True),
    View(angle=math.radians(5.4)),
    View(1.05, 0.2, 0.05, True, math.radians(-4)),
]


def spotted(place: np.ndarray) -> Rig:
    """A camera that looks along y, and sees nothing but a spot of light, at a place."""
    world_to_camera = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    intrinsics = np.array([[FOCAL, 0, SOURCE_WIDTH / 2], [0, FOCAL, 0.45 * SOURCE_HEIGHT], [0, 0, 1]])
    camera = Camera("CAM_FRONT", SOURCE_WIDTH, SOURCE_HEIGHT, intrinsics, world_to_camera)
    (u, v), _ = (x[0] for x in Rig((camera,)).project(place))
    y, x = np.mgrid[:SOURCE_HEIGHT, :SOURCE_WIDTH] + 0.5
    light = 255 * np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * 6**2))
    image = np.repeat(light.astype(np.uint8)[..., None], 3, axis=-1)
    return Rig((dataclasses.replace(camera, image=image),))


def spot(picture: np.ndarray) -> np.ndarray:
    """The middle of the light, in pixels."""
    light = picture[..., 0].astype(float)
    y, x = np.mgrid[: light.shape[0], : light.shape[1]] + 0.5
    return np.array([(light * x).sum(), (light * y).sum()]) / light.sum()


def projected(matrix: np.ndarray, place: np.ndarray) -> np.ndarray:
    u, v, depth, _ = matrix @ [*place, 1]
    return np.array([u, v]) / depth


@pytest.mark.parametrize("view", VIEWS, ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_the_projection_follows_the_image(view, place):
    seen = seen_as(spotted(place), view, WIDTH, HEIGHT)
    assert seen.pictures.shape == (1, HEIGHT, WIDTH, 3)
    expected = projected(seen.projection_mat[0], place)
    assert 12 < expected[0] < WIDTH - 12 and 12 < expected[1] < HEIGHT - 12  # all of the spot is in the picture
    assert spot(seen.pictures[0]) == pytest.approx(expected, abs=0.25)
    assert seen.focal == pytest.approx(FOCAL * view.zoom * WIDTH / SOURCE_WIDTH, rel=0.01)


def test_a_mirror_is_a_mirror():
    left, right = (seen_as(spotted(PLACES[1]), View(flipped=flipped), WIDTH, HEIGHT) for flipped in (False, True))
    assert np.array_equal(left.pictures, right.pictures[:, :, ::-1])


def test_unchanged_is_as_a_rig_is_scaled():
    rig = nuscenes_like_rig()
    image = np.random.default_rng(0).integers(0, 256, (900, 1600, 3), dtype=np.uint8)
    rig = Rig(tuple(dataclasses.replace(camera, image=image) for camera in rig.cameras[:1]))
    seen, scaled = seen_as(rig, View(), 704, 256), rig.scaled_to(704, 256)
    assert np.array_equal(seen.pictures[0], scaled.cameras[0].image)
    assert seen.projection_mat == pytest.approx(scaled.projection_mat)


@pytest.mark.parametrize("angle", [0.3925, -2.0])
def test_a_turned_scene_is_the_same_scene(angle):
    """Boxes land on the same pixels, are at the same places of the world, and move over them alike."""
    rig = nuscenes_like_rig()
    T_global = np.eye(4)
    T_global[:3, 3] = (600, 1600, 2)
    boxes = np.array([[3.0, 20, 0.5, 4, 2, 1.5, 0.4, 5, -1], [-8, -6, 1, 1, 1, 2, -2.0, math.nan, math.nan]])
    nothing = np.zeros(2, dtype=np.int64)
    before = Keyframe("", 0.0, T_global, rig, nothing, boxes, nothing, nothing)
    after = turned(before, angle)
    pixels, depths = zip(*(frame.rig.project(frame.boxes[:, :3]) for frame in (before, after)))
    ahead = depths[0] > 0
    assert pixels[1][ahead] == pytest.approx(pixels[0][ahead]) and depths[1] == pytest.approx(depths[0])
    worlds = []
    for frame in (before, after):
        heads = np.stack([np.cos(frame.boxes[:, 6]), np.sin(frame.boxes[:, 6]), 0 * frame.boxes[:, 6]], axis=1)
        turn = frame.T_global[:3, :3]
        velocity = np.concatenate([frame.boxes[:, 7:], np.zeros((2, 1))], axis=1)
        worlds.append((frame.boxes[:, :3] @ turn.T + frame.T_global[:3, 3], heads @ turn.T, velocity @ turn.T))
    for ours, theirs in zip(*worlds):
        assert ours == pytest.approx(theirs, nan_ok=True)
    assert before.boxes[0, 0] == 3.0  # the frame that was given is as it was


def test_views_are_within_their_bounds():
    config, random = AugmentationConfig(), np.random.default_rng(0)
    views = [draw_view(config, random) for _ in range(200)]
    assert {view.flipped for view in views} == {False, True}
    assert config.zoom[0] <= min(v.zoom for v in views) < 0.92 < 1.05 < max(v.zoom for v in views) <= config.zoom[1]
    assert 0.09 < max(abs(view.angle) for view in views) <= math.radians(5.4)
    still = AugmentationConfig(zoom=(1.0, 1.0), rotate=0.0, flip=False)
    assert draw_view(still, random)._replace(left=0.5) == View()


def test_colours():
    grey = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    random = np.random.default_rng(0)
    only = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    unchanged = recoloured(grey, AugmentationConfig(**only), random)
    assert np.array_equal(unchanged, grey)
    colour = np.array([[[[200, 100, 60]]]], dtype=np.uint8)
    luminance = np.array([0.299, 0.587, 0.114])
    paler = recoloured(colour, AugmentationConfig(**only | {"saturation": 0.5}), random)[0, 0, 0]
    assert paler @ luminance == pytest.approx(colour[0, 0, 0] @ luminance, abs=1)
    assert np.ptp(paler) != np.ptp(colour)
    assert abs(recoloured(grey, AugmentationConfig(**only | {"hue": 18.0}), random).astype(int) - 100).max() <= 1
    brighter = recoloured(np.concatenate([grey] * 20), AugmentationConfig(**only | {"brightness": 32.0}), random)
    assert 10 < abs(brighter.astype(int) - 100).max() <= 32


def test_grid_mask():
    random = np.random.default_rng(0)
    images = torch.ones(2, 3, 64, 176)
    shares = []
    for _ in range(50):
        masked = grid_mask(images, random)
        assert torch.equal(masked[0, 0], masked[1, 2])  # all images of a batch alike
        shares.append((masked == 0).float().mean().item())
    assert 0.18 < np.mean(shares) < 0.28 and max(shares) < 0.6
    assert (images == 1).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zoom": (0.0, 1.0)}, "zoom must be positive"),
        ({"crop_bottom": (0.2, 0.1)}, "crop_bottom must be a low and a high value"),
        ({"grid_mask": 2.0}, r"grid_mask must be in \[0, 1\]; got 2.0"),
    ],
)
def test_errors(values, message):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**values)
    with pytest.raises(ValueError, match="camera CAM_FRONT has no image"):
        seen_as(nuscenes_like_rig(), View(), 176, 64)
