"""Endless drives through a made-up town: what is where at every moment, and how it is painted.

A drive follows a road that bends evenly, so that the road looks the same from everywhere on it and every place has a
simple form: s metres along the road from the car, and l metres to the right of the car's lane. Objects keep their l;
those that move have one speed a lane, so that no two ever touch. Coordinates are the lidar's: x right, y forward, z up,
metres, the origin `LIDAR_HEIGHT` above the ground.

A drive is its two seeds: the same numbers on every machine, with nothing kept. `rendering.py` draws it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .rig import Rig, nuscenes_like_rig

CLASSES = (  # nuScenes' ten, in the order of its detection task
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)
MAP_CLASSES = ("ped_crossing", "divider", "boundary")
LIDAR_HEIGHT = 1.84
FRAMES_PER_SECOND = 2
FRAMES_PER_DRIVE = 40  # twenty seconds, as in nuScenes
RANGE = 60.0  # metres: what is farther from the car is not there
EXTENT = (30.0, 60.0)  # metres across and along: the window that map lines are cut to
LANE, STRIP, PAVEMENT = 3.5, 2.5, 5.0  # metres: widths of a lane, of a strip for parking, of a pavement
CROSSING = 4.0  # metres along the road that a crossing takes
_SIZES = {  # length, width, height in metres
    "car": (4.6, 1.95, 1.7),
    "truck": (6.9, 2.5, 2.9),
    "construction_vehicle": (6.2, 2.8, 3.2),
    "bus": (11.0, 2.9, 3.5),
    "trailer": (10.5, 2.6, 3.8),
    "barrier": (0.5, 2.3, 1.0),
    "motorcycle": (2.1, 0.8, 1.5),
    "bicycle": (1.75, 0.65, 1.35),
    "pedestrian": (0.75, 0.7, 1.75),
    "traffic_cone": (0.4, 0.4, 1.0),
}
_TRAFFIC = {"car": 0.66, "truck": 0.11, "bus": 0.08, "trailer": 0.07, "motorcycle": 0.08}
_PARKED = {"car": 0.68, "truck": 0.12, "motorcycle": 0.1, "trailer": 0.05, "bus": 0.05}


class Objects(NamedTuple):
    """Objects, an entry each.

    label        (n,) int64, a place in `CLASSES`
    instance_id  (n,) int64, the same through all of a drive
    center       (n, 3) metres
    size         (n, 3) metres: along the heading, across it, and height
    yaw          (n,) radians, counter-clockwise from +x
    velocity     (n, 2) metres a second over the ground, in the directions of x and y
    colors       (n, 2, 3) from 0 to 1: what paints the most of it, and the rest
    """

    label: np.ndarray
    instance_id: np.ndarray
    center: np.ndarray
    size: np.ndarray
    yaw: np.ndarray
    velocity: np.ndarray
    colors: np.ndarray


@dataclass(frozen=True, eq=False)
class Road:
    """A road that bends evenly.

    bend       one over the radius in metres, positive to the left, never 0
    kerbs      l of the left and of the right kerb
    dividers   l of the lines between lanes, the first between the two directions
    crossings  s of the middles of zebra crossings, from where the drive begins
    """

    bend: float
    kerbs: tuple[float, float]
    dividers: tuple[float, ...]
    crossings: np.ndarray

    def points(self, s: np.ndarray, l: np.ndarray) -> np.ndarray:  # noqa: E741
        """(..., 2): x and y of places on the road, seen from s = 0, l = 0."""
        angle = self.bend * s
        along = np.stack([(np.cos(angle) - 1) / self.bend, np.sin(angle) / self.bend], axis=-1)
        return along + l[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


@dataclass(frozen=True, eq=False)
class Moment:
    """A frame of a drive, as far as it is no picture.

    timestamp   seconds
    T_global    (4, 4) from the lidar's frame to the global one
    travelled   metres along the road since the drive began
    objects     what is within `RANGE`
    road        with crossings at s from the car
    map_labels  (m,) int64, places in `MAP_CLASSES`
    map_lines   m polylines (k, 2) in metres; a closed one ends where it begins
    light       towards the sun, (3,) of length 1
    exposure    (num_cams, 3), what each camera makes of red, green and blue
    noise_seed  of the picture
    """

    timestamp: float
    T_global: np.ndarray
    travelled: float
    objects: Objects
    road: Road
    map_labels: np.ndarray
    map_lines: list[np.ndarray]
    light: np.ndarray
    exposure: np.ndarray
    noise_seed: int


class Drive:
    """One drive of many.

    Args:
        index: which one, from 0 on without end.
        seed: of the town; each has drives of its own.
        num_frames: for how many frames the road is peopled.
    """

    def __init__(self, index: int, seed: int = 0, num_frames: int = FRAMES_PER_DRIVE):
        if index < 0 or seed < 0 or num_frames < 1:
            raise ValueError(f"index and seed must be at least 0 and num_frames 1; got {index}, {seed}, {num_frames}")
        self.index, self.num_frames = index, num_frames
        random = np.random.default_rng((seed, index))
        self._noise_seed = int(random.integers(2**30))
        self._start_time = 1.5e9 + 100.0 * index
        self._start_place = random.uniform(300, 2000, 2)
        self._speed = float(random.choice([0.0, random.uniform(2, 12)], p=[0.1, 0.9]))
        self._duration = (num_frames - 1) / FRAMES_PER_SECOND
        self._lanes = [int(count) for count in random.integers(1, 3, size=2)]  # of the other direction, and of ours
        self._has_strip = random.random(2) < 0.7  # on the left, on the right
        self._road = self._make_road(random)
        self._people(random)
        sun = random.uniform(0, 2 * math.pi), random.uniform(0.4, 1.2)
        horizontal = math.cos(sun[1])
        self._light = np.array([horizontal * math.cos(sun[0]), horizontal * math.sin(sun[0]), math.sin(sun[1])])
        self._exposure = random.uniform(0.75, 1.2, (6, 1)) * random.uniform(0.95, 1.05, (6, 3))

    def moment(self, frame: int) -> Moment:
        """What is where in a frame.

        Raises:
            ValueError: the drive has no such frame.
        """
        if not 0 <= frame < self.num_frames:
            raise ValueError(f"frame must be in [0, {self.num_frames}); got {frame}")
        seconds = frame / FRAMES_PER_SECOND
        travelled = self._speed * seconds
        road = replace(self._road, crossings=self._road.crossings - travelled)
        labels, lines = zip(*map_lines(road))
        return Moment(
            timestamp=self._start_time + seconds,
            T_global=self._pose(travelled),
            travelled=travelled,
            objects=self._objects(seconds, travelled),
            road=road,
            map_labels=np.array(labels),
            map_lines=list(lines),
            light=self._turned_light(travelled),
            exposure=self._exposure,
            noise_seed=self._noise_seed + frame,
        )

    def _make_road(self, random: np.random.Generator) -> Road:
        bend = random.uniform(1e-4, 1 / 120) * random.choice([-1, 1]) * random.choice([0.1, 1.0])
        edges = LANE * (np.array([-1, 1]) * self._lanes - 0.5)
        kerbs = edges + STRIP * self._has_strip * np.array([-1, 1])
        dividers = [-LANE / 2]
        dividers += [-1.5 * LANE] * (self._lanes[0] - 1) + [LANE / 2] * (self._lanes[1] - 1)
        length = self._speed * self._duration + 2 * RANGE
        crossings = np.cumsum(random.uniform(40, 100, math.ceil(length / 40))) - RANGE - 40
        return Road(float(bend), (float(kerbs[0]), float(kerbs[1])), tuple(dividers), crossings)

    def _pose(self, travelled: float) -> np.ndarray:
        angle = self._road.bend * travelled
        pose = np.eye(4)
        pose[:2, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        pose[:2, 3] = self._start_place + self._road.points(np.array(travelled), np.array(0.0))
        pose[2, 3] = LIDAR_HEIGHT
        return pose

    def _turned_light(self, travelled: float) -> np.ndarray:
        return self._pose(travelled)[:3, :3].T @ self._light

    def _people(self, random: np.random.Generator) -> None:
        """Put everything on the road that comes into sight during the drive."""
        rows = [row for stream in self._streams(random) for row in self._place(random, *stream)]
        labels, places, speeds, turns = zip(*rows) if rows else ([], [], [], [])
        count = len(rows)
        self._label = np.array(labels, dtype=np.int64)
        self._place_sl = np.array(places, dtype=float).reshape(count, 2)
        self._own_speed = np.array(speeds, dtype=float)
        self._turn = np.array(turns, dtype=float)
        mean = np.array([_SIZES[name] for name in CLASSES])[self._label]
        # Along the road nothing is longer than `_place` left room for.
        self._size = mean * random.uniform(0.85, 1.1, (count, 1)) * random.uniform(0.95, 1.02, (count, 3))
        self._colors = _paint(random, self._label)

    def _streams(self, random: np.random.Generator) -> Iterator[tuple[dict[str, float], float, float, float, float]]:
        """Rows of objects: classes with their shares, l, speed along the road, turn, and the mean gap in metres."""
        ahead, across = 0.0, math.pi / 2
        jam = random.uniform(0.6, 2.0)
        for lane in range(self._lanes[1]):
            speed = self._speed if lane == 0 else random.uniform(0, 12)
            yield _TRAFFIC, lane * LANE, speed, ahead, 18 * jam
        for lane in range(self._lanes[0]):
            yield _TRAFFIC, -(lane + 1) * LANE, -random.uniform(2, 12), math.pi, 18 * jam
        for side, kerb, heading in ((-1, self._road.kerbs[0], math.pi), (1, self._road.kerbs[1], ahead)):
            if self._has_strip[max(side, 0)]:
                yield _PARKED, kerb - side * STRIP / 2, 0.0, heading, random.uniform(3, 20)
            cycles = {"bicycle": 0.8, "motorcycle": 0.2}
            yield cycles, kerb + side * 0.7, side * random.uniform(2, 6), heading, 25
            yield {"pedestrian": 1}, kerb + side * 1.7, random.uniform(0.8, 1.6), ahead, random.uniform(4, 30)
            yield {"pedestrian": 1}, kerb + side * 2.7, -random.uniform(0.8, 1.6), math.pi, random.uniform(4, 30)
            yield {"pedestrian": 0.5, "bicycle": 0.5}, kerb + side * 4.1, 0.0, across, random.uniform(8, 40)
            yield {"traffic_cone": 0.5, "barrier": 0.5}, kerb + side * 5.6, 0.0, across, random.uniform(3, 15)
            machines = {"construction_vehicle": 0.8, "truck": 0.2}
            yield machines, kerb + side * 9.0, 0.0, random.uniform(-0.4, 0.4), random.uniform(15, 60)

    def _place(
        self,
        random: np.random.Generator,
        shares: dict[str, float],
        l: float,  # noqa: E741
        speed: float,
        turn: float,
        gap: float,
    ) -> Iterator[tuple[int, tuple[float, float], float, float]]:
        """Objects of a row, one behind the other: label, (s, l) at the beginning, speed, turn against the road."""
        gains = (speed - self._speed) * self._duration
        s, end = -RANGE - max(0.0, gains), RANGE - min(0.0, gains)
        names, weights = list(shares), list(shares.values())
        s += random.exponential(gap)
        while s < end:
            name = names[random.choice(len(names), p=weights)]
            length = 1.2 * (_SIZES[name][1] if abs(turn) == math.pi / 2 else math.hypot(*_SIZES[name][:2]))
            s += length / 2
            in_our_way = l == 0 and abs(s) < length / 2 + 6
            if not in_our_way:
                yield CLASSES.index(name), (s, l), speed, turn
            s += length / 2 + 0.3 + random.exponential(gap)

    def _objects(self, seconds: float, travelled: float) -> Objects:
        s = self._place_sl[:, 0] + self._own_speed * seconds - travelled
        l = self._place_sl[:, 1]  # noqa: E741
        center = np.concatenate([self._road.points(s, l), self._size[:, 2:] / 2 - LIDAR_HEIGHT], axis=1)
        road_angle = self._road.bend * s
        forward = np.stack([-np.sin(road_angle), np.cos(road_angle)], axis=1)
        velocity = (self._own_speed * (1 + self._road.bend * l))[:, None] * forward
        yaw = (math.pi / 2 + road_angle + self._turn + math.pi) % (2 * math.pi) - math.pi
        near = np.nonzero((np.linalg.norm(center[:, :2], axis=1) < RANGE) & (abs(road_angle) < 3))[0]
        found = (self._label, np.arange(len(s)), center, self._size, yaw, velocity, self._colors)
        return Objects(*(values[near] for values in found))


def synthetic_rig(width: int, height: int) -> Rig:
    """The six cameras of every drive, whose images have this size, in the lidar's frame."""
    lifted = np.eye(4)
    lifted[2, 3] = LIDAR_HEIGHT
    rig = nuscenes_like_rig().scaled_to(width, height)
    cameras = (replace(camera, world_to_camera=camera.world_to_camera @ lifted) for camera in rig.cameras)
    return Rig(tuple(cameras), frame="x right, y forward, z up; metres; origin at the lidar")


def map_lines(road: Road) -> Iterator[tuple[int, np.ndarray]]:
    """Labels and polylines (k, 2) of what lies in the window around the car."""
    s = np.arange(-RANGE, RANGE + 0.25, 0.5)
    for l, name in [*((l, "divider") for l in road.dividers), *((l, "boundary") for l in road.kerbs)]:  # noqa: E741
        points = road.points(s, np.full_like(s, l))
        inside = _inside(points)
        for run in np.split(np.arange(len(s)), np.nonzero(np.diff(inside))[0] + 1):
            if inside[run[0]] and len(run) > 4:
                yield MAP_CLASSES.index(name), points[run]
    for middle in road.crossings:
        across = np.linspace(*road.kerbs, 25)
        across = across[_inside(road.points(np.full_like(across, middle), across))]
        if abs(middle) < EXTENT[1] / 2 - CROSSING and len(across) > 4:
            near, far = (road.points(np.full_like(across, middle + d), across) for d in (-CROSSING / 2, CROSSING / 2))
            yield MAP_CLASSES.index("ped_crossing"), np.concatenate([near, far[::-1], near[:1]])


def _inside(points: np.ndarray) -> np.ndarray:
    return (np.abs(points) <= np.array(EXTENT) / 2).all(axis=-1)


def _paint(random: np.random.Generator, label: np.ndarray) -> np.ndarray:
    """(n, 2, 3) colours: any for most, but cones and machines have theirs."""
    grey = random.uniform(0.08, 0.95, (len(label), 2, 1))
    colors = np.clip(grey + random.normal(0, 0.12, (len(label), 2, 3)), 0.03, 1)
    fixed = {
        "traffic_cone": ((0.95, 0.4, 0.08), (0.9, 0.9, 0.9)),
        "barrier": ((0.85, 0.2, 0.15), (0.92, 0.92, 0.9)),
        "construction_vehicle": ((0.9, 0.68, 0.1), (0.2, 0.2, 0.2)),
    }
    for name, of_class in fixed.items():
        is_class = label == CLASSES.index(name)
        colors[is_class] = np.clip(of_class + random.normal(0, 0.04, (is_class.sum(), 2, 3)), 0, 1)
    return colors
