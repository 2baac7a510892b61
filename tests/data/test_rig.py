"""Cameras, boxes, and the reading of rigs that nobody vouches for."""

from __future__ import annotations

import copy
import json
import math
import struct
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reimplementation.data.rig import MAX_BOXES, MAX_CAMERAS, Box, Camera, Rig, nuscenes_like_rig

NUSCENES = Path(__file__).resolve().parents[3] / "shared" / "data" / "nuscenes_sample"
WIDTH, HEIGHT = 40, 30


def write_image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image.fromarray(pixels).save(path)


@pytest.fixture
def document() -> dict:
    return valid_document()


def valid_document() -> dict:
    camera = {
        "name": "front",
        "image": "front.png",
        "width": WIDTH,
        "height": HEIGHT,
        "intrinsics": [[30.0, 0.0, 20.0], [0.0, 30.0, 15.0], [0.0, 0.0, 1.0]],
        "lidar_to_camera": [[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]],
    }
    box = {
        "center": [1.0, 8.0, 0.0],
        "size_lwh": [4.0, 2.0, 1.5],
        "yaw": 0.3,
        "label": "car",
        "velocity_xy": [1, 2],
    }
    return {"frame": "x right, y forward, z up", "cameras": [camera], "boxes": [box]}


def save(folder: Path, document: dict) -> Path:
    (folder / "sample.json").write_text(json.dumps(document))
    if not (folder / "front.png").exists():
        write_image(folder / "front.png")
    return folder


def unproject(camera: Camera, pixel: np.ndarray, depth: float) -> np.ndarray:
    """The world point at a pixel and depth, by the camera's inverse matrices."""
    ray = np.linalg.inv(camera.intrinsics) @ [*pixel, 1.0]
    return (np.linalg.inv(camera.world_to_camera) @ [*(ray * depth), 1.0])[:3]


@pytest.mark.parametrize("index", range(6))
def test_projection_round_trip(index):
    rig = nuscenes_like_rig()
    point = unproject(rig.cameras[index], np.array([431.5, 212.25]), 17.0)
    pixels, depth = rig.project(point[None, None])
    assert pixels.shape == (1, 1, 6, 2) and depth.shape == (1, 1, 6)
    np.testing.assert_allclose(pixels[0, 0, index], (431.5, 212.25), rtol=1e-10)
    np.testing.assert_allclose(depth[0, 0, index], 17.0, rtol=1e-12)

    homogeneous = rig.projection_mat[index] @ [*point, 1.0]
    np.testing.assert_allclose(homogeneous, (431.5 * 17, 212.25 * 17, 17, 1), rtol=1e-10)


def test_every_camera_looks_where_its_name_says():
    rig = nuscenes_like_rig()
    headings = {
        "FRONT": 0,
        "FRONT_RIGHT": -55,
        "FRONT_LEFT": 55,
        "BACK": 180,
        "BACK_LEFT": 110,
        "BACK_RIGHT": -110,
    }
    for camera, (name, heading) in zip(rig.cameras, headings.items(), strict=True):
        assert camera.name == f"CAM_{name}"
        angle = math.radians(heading)
        ahead = camera.position + 10 * np.array([-math.sin(angle), math.cos(angle), 0])
        pixel, depth = Rig((camera,)).project(ahead)
        np.testing.assert_allclose(pixel[0], camera.intrinsics[:2, 2], atol=1e-9)
        np.testing.assert_allclose(depth[0], 10)
        above, _ = Rig((camera,)).project(ahead + (0, 0, 1))
        assert above[0, 1] < pixel[0, 1]


def test_scaled_as_sparsedrive_scales():
    camera = nuscenes_like_rig().cameras[0]
    scaled = camera.scaled_to(704, 256)
    expected = np.diag([0.44, 0.44, 1.0]) @ camera.intrinsics - [[0, 0, 0], [0, 0, 140], [0, 0, 0]]
    np.testing.assert_allclose(scaled.intrinsics, expected, rtol=1e-12)
    assert (scaled.width, scaled.height) == (704, 256)


def test_image_follows_intrinsics():
    pytest.importorskip("PIL")
    rows, columns = np.mgrid[:90, :160]
    image = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    matrix = np.array([[100.0, 0, 80], [0, 100, 45], [0, 0, 1]])
    camera = Camera("front", 160, 90, matrix, np.eye(4), image)
    scaled = camera.scaled_to(80, 30)
    assert scaled.image.shape == (30, 80, 3)
    assert scaled.image.base is None  # and does not hold the rows that were cut off
    point = np.array([0.11, 0.13, 1.0])  # the camera's frame is the world's here
    before, _ = Rig((camera,)).project(point)
    after, _ = Rig((scaled,)).project(point)
    column, row = after[0].astype(int)
    # The image's values are its pixel coordinates: half a pixel of resampling and half of rounding, twice.
    np.testing.assert_allclose(scaled.image[row, column, :2], before[0], atol=2)


def test_too_many_rows_asked_for():
    with pytest.raises(ValueError, match="CAM_FRONT: 1600 x 900 resized to width 704 has 396 rows, fewer than the 400"):
        nuscenes_like_rig().scaled_to(704, 400)


def test_box_corners_and_anchor():
    box = Box([1.0, 2.0, 3.0], [4.0, 2.0, 1.0], math.pi / 2, "car", [0.5, -1.0])
    corners = box.corners()
    np.testing.assert_allclose(corners.min(axis=0), (0, 0, 2.5), atol=1e-12)  # heading +y: the length lies along y
    np.testing.assert_allclose(corners.max(axis=0), (2, 4, 3.5), atol=1e-12)
    np.testing.assert_allclose(corners[7], (0, 4, 3.5), atol=1e-12)  # ahead, left, up
    expected = [1, 2, 3, math.log(4), math.log(2), 0, 1, 0, 0.5, -1, 0]
    np.testing.assert_allclose(box.anchor(), expected, atol=1e-12)


def test_load(tmp_path, document):
    rig = Rig.load(save(tmp_path, document))
    assert rig.cameras[0].image.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(rig.image_wh, [[WIDTH, HEIGHT]])
    np.testing.assert_array_equal(rig.cameras[0].world_to_camera, document["cameras"][0]["lidar_to_camera"])
    np.testing.assert_allclose(rig.anchors[0, :3], (1, 8, 0))
    assert rig.boxes[0].label == "car" and rig.frame == document["frame"]


@pytest.mark.parametrize("velocity", [None, [None, None]])
def test_unknown_velocity_is_zero(tmp_path, document, velocity):
    document["boxes"][0]["velocity_xy"] = velocity
    np.testing.assert_array_equal(Rig.load(save(tmp_path, document)).boxes[0].velocity_xy, (0, 0))


BROKEN = {  # what is wrong: (list, key, value; ... means that the key is left out, what the message says)
    "no intrinsics": ("cameras", "intrinsics", ..., r"cameras\[0\]: missing intrinsics"),
    "no image": ("cameras", "image", ..., r"cameras\[0\]: missing image"),
    "intrinsics 2 x 3": (
        "cameras",
        "intrinsics",
        [[1, 0, 0], [0, 1, 0]],
        r"intrinsics must be numbers of the shape \(3, 3\)",
    ),
    "ragged": ("cameras", "intrinsics", [[1, 0], [0]], "intrinsics must be numbers"),
    "text for numbers": ("cameras", "intrinsics", [["1"] * 3] * 3, "intrinsics must be numbers"),
    "no focal length": ("cameras", "intrinsics", [[0, 0, 0], [0, 0, 0], [0, 0, 1]], "positive focal lengths"),
    "NaN": ("cameras", "lidar_to_camera", [[math.nan] * 4] * 4, "lidar_to_camera must be finite"),
    "infinite": ("cameras", "lidar_to_camera", [[math.inf] * 4] * 4, "lidar_to_camera must be finite"),
    "not a rotation": (
        "cameras",
        "lidar_to_camera",
        np.diag([2, 2, 2, 1]).tolist(),
        "lidar_to_camera must be a rotation",
    ),
    "mirrored": (
        "cameras",
        "lidar_to_camera",
        np.diag([1, 1, -1, 1]).tolist(),
        "lidar_to_camera must be a rotation",
    ),
    "negative width": ("cameras", "width", -4, "width must be a positive whole number"),
    "fractional width": ("cameras", "width", 40.0, "width must be a positive whole number"),
    "true width": ("cameras", "width", True, "width must be a positive whole number"),
    "huge size": ("cameras", "width", 10**9, "at most 40000000 pixels"),
    "other size": ("cameras", "width", 41, r"front.png: it is 40 x 30 pixels; expected 41 x 30"),
    "absolute path": ("cameras", "image", "/etc/passwd", "neither absolute nor with"),
    "parent path": ("cameras", "image", "../front.png", "neither absolute nor with"),
    "zero byte": ("cameras", "image", "a\0b", "neither absolute nor with"),
    "no such image": ("cameras", "image", "back.png", "back.png does not exist"),
    "folder as image": ("cameras", "image", ".", "does not exist or is not a file"),
    "too long a path": ("cameras", "image", "a" * 5000, r"cameras\[0\]: .*(cannot be read|does not exist)"),
    "escape in a path": ("cameras", "image", "\x1b[31m.png", r"'.x1b\[31m.png' must be a printable path"),
    "half a character": ("cameras", "image", "\ud800.png", r"'.ud800.png' must be a printable path"),
    "number as path": ("cameras", "image", 7, "image must be a file name"),
    "escape in name": ("cameras", "name", "\x1b[31m", "name must be 1 to 64 printable characters"),
    "no center": ("boxes", "center", ..., r"boxes\[0\]: missing center"),
    "2D center": ("boxes", "center", [1, 2], r"boxes\[0\]: center must be numbers of the shape \(3,\)"),
    "NaN center": ("boxes", "center", [math.nan, 1, 2], "center must be finite"),
    "far away": ("boxes", "center", [1e200, 1, 2], "center must be finite and below"),
    "whole number beyond floats": ("boxes", "center", [10**400, 1, 2], "center must be finite and below"),
    "flat": ("boxes", "size_lwh", [4, 0, 1], "size_lwh must be positive"),
    "list for yaw": ("boxes", "yaw", [1], r"yaw must be numbers of the shape \(\)"),
    "number as label": ("boxes", "label", 3, "label must be"),
    "an object for numbers": ("boxes", "center", {"x": 1}, "center must be numbers of the shape"),
    "true for a number": ("boxes", "yaw", True, "yaw must be numbers"),
    "a list in a list, 300 times": ("boxes", "center", json.loads("[" * 300 + "]" * 300), "center must be numbers"),
    "one long text among short ones": ("boxes", "center", ["a"] * 1000 + ["b" * 10**6], "center must be numbers"),
    "velocity half known": ("boxes", "velocity_xy", [1, None], "velocity_xy must be numbers"),
}


@pytest.mark.parametrize(("section", "key", "value", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_load_names_what_is_broken(tmp_path, document, section, key, value, message):
    if value is ...:
        del document[section][0][key]
    else:
        document[section][0][key] = value
    with pytest.raises(ValueError, match=message) as error:
        Rig.load(save(tmp_path, document))
    assert "sample.json" in str(error.value) and f"{section}[0]" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "cameras must be a list; the key is missing"),
        ('{"cameras": [], "boxes": []}', "at least one camera"),
        ('{"cameras": [3], "boxes": []}', r"cameras\[0\] must be an object"),
        ('{"cameras": 3, "boxes": []}', "cameras must be a list; got 3"),
        ('{"frame": 3, "cameras": [], "boxes": []}', "frame must be text"),
        (json.dumps({"cameras": [{}] * (MAX_CAMERAS + 1), "boxes": []}), "cameras must have at most 64"),
    ],
)
def test_load_names_broken_documents(tmp_path, text, message):
    (tmp_path / "sample.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Rig.load(tmp_path)
    assert "sample.json" in str(error.value)


def test_too_many_boxes(tmp_path, document):
    document["boxes"] = [copy.copy(document["boxes"][0])] * (MAX_BOXES + 1)
    with pytest.raises(ValueError, match="boxes must have at most 4096"):
        Rig.load(save(tmp_path, document))


def test_document_not_utf8(tmp_path):
    (tmp_path / "sample.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="sample.json is not valid JSON"):
        Rig.load(tmp_path)


def test_oversized_document(tmp_path):
    with open(tmp_path / "sample.json", "wb") as file:
        file.truncate(17 * 2**20)
    with pytest.raises(ValueError, match="larger than 16 MiB"):
        Rig.load(tmp_path)


def test_missing_folder_and_document(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Rig.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="sample.json does not exist"):
        Rig.load(tmp_path)


def test_links_that_lead_out(tmp_path, document):
    folder = tmp_path / "rig"
    folder.mkdir()
    write_image(tmp_path / "secret.png")
    (folder / "front.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="link that leads out") as error:
        Rig.load(save(folder, document))
    assert "front.png" in str(error.value)

    (folder / "front.png").unlink()
    (tmp_path / "outside.json").write_text(json.dumps(document))
    (folder / "sample.json").unlink()
    (folder / "sample.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match="link that leads out"):
        Rig.load(folder)


def test_links_that_stay_inside_or_go_round(tmp_path, document):
    write_image(tmp_path / "other.png")
    (tmp_path / "front.png").symlink_to("other.png")
    assert Rig.load(save(tmp_path, document)).cameras[0].image is not None

    (tmp_path / "front.png").unlink()
    (tmp_path / "front.png").symlink_to("front.png")
    (tmp_path / "sample.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="front.png"):
        Rig.load(tmp_path)


def test_images_that_are_none(tmp_path, document):
    save(tmp_path, document)
    complete = (tmp_path / "front.png").read_bytes()
    for content in (complete[: len(complete) // 2], complete[:20], b"", b"GIF89a", b"<svg/>"):
        (tmp_path / "front.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"sample.json: cameras\[0\]: image .*front.png"):
            Rig.load(tmp_path)


def test_grey_of_sixteen_bits_is_scaled(tmp_path, document):
    """65535 is as white as 255 is in eight bits; what lies between keeps its place."""
    image = pytest.importorskip("PIL.Image")
    grey = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    image.fromarray(grey).save(tmp_path / "front.png")
    with image.open(tmp_path / "front.png") as written:
        assert written.mode.startswith("I")  # not already eight bits
    read = Rig.load(save(tmp_path, document)).cameras[0].image
    assert read.shape == (HEIGHT, WIDTH, 3) and read.dtype == np.uint8
    np.testing.assert_array_equal(read, np.round(grey / 65535 * 255).astype(np.uint8)[..., None].repeat(3, -1))


@pytest.mark.parametrize("size", [(5000, 4000), (20000, 5000), (20000, 10000)])  # the last two alarm Pillow itself
def test_decompression_bomb_is_not_decoded(tmp_path, document, size, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    image.new("1", size).save(tmp_path / "front.png")
    monkeypatch.setattr(image.Image, "convert", lambda *_: pytest.fail("the pixels were decoded"))
    with pytest.raises(ValueError, match="front.png"):
        Rig.load(save(tmp_path, document))


def test_too_many_pixels_together(tmp_path, document):
    """Each image is as large as one may be; together they would fill the memory. None is opened."""
    document["cameras"][0] |= {"width": 8000, "height": 5000}
    document["cameras"] *= 6
    with pytest.raises(ValueError, match="at most 200000000 pixels together; got 240000000"):
        Rig.load(save(tmp_path, document))


def test_oversized_image_file(tmp_path, document):
    save(tmp_path, document)
    with open(tmp_path / "front.png", "ab") as file:
        file.truncate(257 * 2**20)
    with pytest.raises(ValueError, match="front.png is larger than 256 MiB"):
        Rig.load(tmp_path)


def test_an_image_too_narrow_to_be_widened(tmp_path, document):
    document["cameras"][0] |= {"width": 1, "height": 40_000}
    write_image(tmp_path / "front.png", (1, 40_000))
    rig = Rig.load(save(tmp_path, document))
    with pytest.raises(ValueError, match="1 x 40000 resized to width 704 has 28160000 rows, more than 40000000 pixels"):
        rig.scaled_to(704, 256)


def test_a_chunk_that_the_decoder_stumbles_over(tmp_path, document):
    """A colour profile that ends after its name: Pillow reads beyond it and raises IndexError."""
    save(tmp_path, document)
    png = (tmp_path / "front.png").read_bytes()
    name = b"x\0"
    chunk = b"iCCP" + name
    profile = struct.pack(">I", len(name)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = len(png) - 12  # of the IEND chunk
    (tmp_path / "front.png").write_bytes(png[:end] + profile + png[end:])
    with pytest.raises(ValueError, match="front.png"):
        Rig.load(tmp_path)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["..", "/", "a\0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_changed_document_is_read_or_refused(data):
    """Replace, remove or double something anywhere in a valid document: nothing but a ValueError comes of it."""
    document = valid_document()
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        place, key = document, None
        while (
            isinstance(place, (dict, list)) and len(place) > 0 and (key is None or data.draw(st.booleans(), "deeper"))
        ):
            parent, key = (
                place,
                data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))),
            )
            place = parent[key]
        change = data.draw(st.sampled_from(["replace", "remove", "double"]), "change")
        if change == "replace":
            parent[key] = data.draw(JSON_VALUES, "value")
        elif change == "remove":
            del parent[key]
        else:
            parent[key] = [place, place]
        if not document:
            break
    with tempfile.TemporaryDirectory() as folder:
        try:
            Rig.load(save(Path(folder), document)).scaled_to(64, 16)
        except ValueError as error:
            assert str(error).isprintable()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_changed_image_is_read_or_refused(suffix, data):
    document = valid_document()
    document["cameras"][0]["image"] = f"other.{suffix}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"other.{suffix}"
        write_image(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4), "changes")):
            at = data.draw(st.integers(0, max(len(content) - 1, 0)), "at")
            content[at : at + data.draw(st.integers(0, 9), "removed")] = data.draw(st.binary(max_size=9), "inserted")
        path.write_bytes(content)
        try:
            Rig.load(save(Path(folder), document))
        except ValueError as error:
            assert f"other.{suffix}" in str(error)


@pytest.mark.skipif(not NUSCENES.is_dir(), reason="the nuScenes sample is not here")
def test_nuscenes_sample():
    rig = Rig.load(NUSCENES).scaled_to(704, 256)
    assert [camera.image.shape for camera in rig.cameras] == [(256, 704, 3)] * 6
    assert rig.anchors.shape == (69, 11) and np.isfinite(rig.anchors).all()
    pixels, depth = rig.project(np.array([box.center for box in rig.boxes]))
    inside = (depth > 0) & (pixels > 0).all(axis=-1) & (pixels < rig.image_wh).all(axis=-1)
    assert inside.any(axis=1).sum() > 60  # nuScenes annotates what its cameras see
