"""nuScenes' detection metrics: mAP, NDS and the five true-positive errors.

The rules are those of the nuScenes paper (arXiv 1903.11027, section 3.1) with the settings of its detection challenge,
as nuscenes-devkit 1.2.0 applies them; a test compares every number with that package's. NumPy alone.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CLASS_RANGE = {  # metres from the car: what is farther away does not count
    "car": 50.0,
    "truck": 50.0,
    "bus": 50.0,
    "trailer": 50.0,
    "construction_vehicle": 50.0,
    "pedestrian": 40.0,
    "motorcycle": 40.0,
    "bicycle": 40.0,
    "traffic_cone": 30.0,
    "barrier": 30.0,
}
DISTANCES = (0.5, 1.0, 2.0, 4.0)  # metres between centres, seen from above, below which a detection is right
ERROR_DISTANCE = 2.0  # metres: of the matches whose errors are measured
ERRORS = ("trans", "scale", "orient", "vel", "attr")
NOT_MEASURED = {"traffic_cone": ("orient", "vel", "attr"), "barrier": ("vel", "attr")}
HALF_TURN_CLASSES = ("barrier",)  # they look the same from both sides
MIN_RECALL, MIN_PRECISION = 0.1, 0.1
MAX_BOXES_PER_SAMPLE = 500
MAP_WEIGHT = 5.0
RECALLS = np.linspace(0, 1, 101)
FIRST_RECALL = round(100 * MIN_RECALL) + 1


@dataclass(frozen=True, eq=False)
class EvalBoxes:
    """Boxes of many samples, an entry a box; coordinates are of any frame that truth and detections share.

    sample        (n,) int, which moment a box belongs to
    label         (n,) int, its class
    center        (n, 3) metres
    size          (n, 3) metres, positive
    yaw           (n,) radians
    velocity      (n, 2) metres a second; NaN: not known
    attribute     (n,) int; -1: none, or not known
    ego_distance  (n,) metres from the car, seen from above
    score         (n,), of detections; of the truth it is not read
    """

    sample: np.ndarray
    label: np.ndarray
    center: np.ndarray
    size: np.ndarray
    yaw: np.ndarray
    velocity: np.ndarray
    attribute: np.ndarray
    ego_distance: np.ndarray
    score: np.ndarray

    def __post_init__(self) -> None:
        shapes = {"center": (3,), "size": (3,), "velocity": (2,)}
        for field in dataclasses.fields(self):
            value = np.asarray(getattr(self, field.name))
            expected = (len(self.sample), *shapes.get(field.name, ()))
            if value.shape != expected:
                raise ValueError(f"{field.name} must have the shape {expected}; got {value.shape}")
            object.__setattr__(self, field.name, value)
        for name in ("center", "size", "yaw", "score", "ego_distance"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"{name} must be finite")
        if not (self.size > 0).all():
            raise ValueError(f"size must be positive; got {self.size.min()}")

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: np.ndarray) -> EvalBoxes:
        return EvalBoxes(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[EvalBoxes]) -> EvalBoxes:
        """The boxes of all the parts, in that order."""
        if not parts:
            return cls.empty()
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))

    @classmethod
    def empty(cls) -> EvalBoxes:
        """No boxes."""
        none, one = np.zeros(0), np.zeros(0, dtype=np.int64)
        return cls(one, one, np.zeros((0, 3)), np.zeros((0, 3)), none, np.zeros((0, 2)), one, none, none)


@dataclass(frozen=True, eq=False)
class Curve:
    """Detections of a class at one distance threshold, at the recalls 0, 0.01, …, 1.

    precision   (101,); 0 beyond the recall that was reached
    confidence  (101,), the score at which a recall is reached; 0 beyond
    errors      the five errors (101,), each the mean over the matches that score at least the confidence
    """

    precision: np.ndarray
    confidence: np.ndarray
    errors: dict[str, np.ndarray]

    @property
    def average_precision(self) -> float:
        """The area under the curve above 10 % recall and 10 % precision, from 0 to 1."""
        above = np.maximum(self.precision[FIRST_RECALL:] - MIN_PRECISION, 0)
        return float(above.mean() / (1 - MIN_PRECISION))

    def mean_error(self, name: str) -> float:
        """An error's mean from 10 % recall to the recall that was reached; 1 where that is less."""
        reached = np.nonzero(self.confidence)[0]
        last = reached[-1] if len(reached) else 0
        return 1.0 if last < FIRST_RECALL else float(self.errors[name][FIRST_RECALL : last + 1].mean())


@dataclass(frozen=True, eq=False)
class DetectionMetrics:
    """How good detections are.

    average_precision  by class and by distance threshold
    errors             by class and by name; NaN where a class has no such error
    curves             by class and by distance threshold
    """

    average_precision: dict[str, dict[float, float]]
    errors: dict[str, dict[str, float]]
    curves: dict[str, dict[float, Curve]]

    @property
    def mean_average_precision(self) -> float:
        """mAP: over distances, then over classes."""
        return float(np.mean([np.mean(list(of_class.values())) for of_class in self.average_precision.values()]))

    @property
    def mean_errors(self) -> dict[str, float]:
        """The five errors, over the classes that have them: mATE, mASE, mAOE, mAVE, mAAE; NaN where none has."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing is NaN
            return {name: float(np.nanmean([of_class[name] for of_class in self.errors.values()])) for name in ERRORS}

    @property
    def nd_score(self) -> float:
        """NDS: (5 mAP + the sum of 1 - error, at least 0, over the five errors) / 10."""
        scores = [max(0.0, 1 - error) for error in self.mean_errors.values()]
        return (MAP_WEIGHT * self.mean_average_precision + sum(scores)) / (MAP_WEIGHT + len(scores))

    def to_dict(self) -> dict:
        """What a JSON file holds; an error that does not exist is None."""
        return {
            "mAP": self.mean_average_precision,
            "NDS": self.nd_score,
            "errors": _without_nan(self.mean_errors),
            "classes": {
                name: {
                    "AP": {str(distance): value for distance, value in self.average_precision[name].items()},
                    "errors": _without_nan(self.errors[name]),
                }
                for name in self.average_precision
            },
        }


def within_class_range(boxes: EvalBoxes, classes: Sequence[str]) -> EvalBoxes:
    """The boxes that are nearer to the car than their class is judged; one of nuScenes' ten classes each."""
    limits = np.array([CLASS_RANGE[name] for name in classes])
    return boxes[boxes.ego_distance < limits[boxes.label]]


def evaluate_detections(truth: EvalBoxes, detections: EvalBoxes, classes: Sequence[str]) -> DetectionMetrics:
    """Judge detections.

    Args:
        truth: what is there, within `within_class_range`.
        detections: what was found, likewise.
        classes: the names of the labels 0, 1, ….

    Raises:
        ValueError: a sample has more than 500 detections, or a label is no class.
    """
    for name, boxes in (("truth", truth), ("detections", detections)):
        if len(boxes) and not 0 <= boxes.label.min() <= boxes.label.max() < len(classes):
            raise ValueError(f"labels of {name} must be in [0, {len(classes)}); got {np.unique(boxes.label)}")
    _, counts = np.unique(detections.sample, return_counts=True)
    if counts.max(initial=0) > MAX_BOXES_PER_SAMPLE:
        raise ValueError(f"a sample may have {MAX_BOXES_PER_SAMPLE} detections; one has {counts.max()}")
    curves, average_precision, errors = {}, {}, {}
    for label, name in enumerate(classes):
        curves[name] = class_curves(truth[truth.label == label], detections[detections.label == label], name)
        average_precision[name] = {distance: curve.average_precision for distance, curve in curves[name].items()}
        judged = curves[name][ERROR_DISTANCE]
        errors[name] = {
            error: math.nan if error in NOT_MEASURED.get(name, ()) else judged.mean_error(error) for error in ERRORS
        }
    return DetectionMetrics(average_precision, errors, curves)


def class_curves(truth: EvalBoxes, detections: EvalBoxes, name: str) -> dict[float, Curve]:
    """The curves of one class, by distance threshold; all boxes are of that class."""
    order = np.argsort(detections.score, kind="stable")[::-1]  # of equal scores the later one comes first
    detections = detections[order]
    matches = match(truth, detections)
    return {distance: curve(truth, detections, matches[distance], name) for distance in DISTANCES}


def match(truth: EvalBoxes, detections: EvalBoxes) -> dict[float, np.ndarray]:
    """By distance threshold, the true box (n,) that each detection finds, or -1.

    One detection after the other takes the nearest box of its sample that is still free, if it is near enough.
    """
    rows_of_sample = {sample: np.nonzero(truth.sample == sample)[0] for sample in np.unique(truth.sample)}
    matches = {distance: np.full(len(detections), -1) for distance in DISTANCES}
    free = {distance: np.ones(len(truth), dtype=bool) for distance in DISTANCES}
    for index, sample in enumerate(detections.sample):
        rows = rows_of_sample.get(sample)
        if rows is None:
            continue
        away = np.linalg.norm(truth.center[rows, :2] - detections.center[index, :2], axis=1)
        for distance in DISTANCES:
            away_if_free = np.where(free[distance][rows], away, np.inf)
            nearest = away_if_free.argmin()
            if away_if_free[nearest] < distance:
                matches[distance][index] = rows[nearest]
                free[distance][rows[nearest]] = False
    return matches


def curve(truth: EvalBoxes, detections: EvalBoxes, matched: np.ndarray, name: str) -> Curve:
    """The curve of a class's detections, best first, that found the true boxes ``matched`` (n,), or -1."""
    is_right = matched >= 0
    if not is_right.any():
        nothing = np.zeros_like(RECALLS)
        return Curve(nothing, nothing, {error: np.ones_like(RECALLS) for error in ERRORS})
    found = np.cumsum(is_right)
    recall = found / len(truth)
    precision = np.interp(RECALLS, recall, found / np.arange(1, len(detections) + 1), right=0)
    confidence = np.interp(RECALLS, recall, detections.score, right=0)
    right = detections[is_right]
    errors = {}
    for error, values in true_positive_errors(truth[matched[is_right]], right, name).items():
        # np.interp wants increasing scores, and they fall: all that is here is turned round, and back.
        errors[error] = np.interp(confidence[::-1], right.score[::-1], _running_mean(values)[::-1])[::-1]
    return Curve(precision, confidence, errors)


def true_positive_errors(truth: EvalBoxes, detections: EvalBoxes, name: str) -> dict[str, np.ndarray]:
    """The five errors (n,) of detections against the boxes that they found; NaN where the truth is not known."""
    period = math.pi if name in HALF_TURN_CLASSES else 2 * math.pi
    turned = (truth.yaw - detections.yaw + period / 2) % period - period / 2
    common = np.minimum(truth.size, detections.size).prod(axis=1)
    union = truth.size.prod(axis=1) + detections.size.prod(axis=1) - common
    is_wrong = (truth.attribute != detections.attribute).astype(float)
    return {
        "trans": np.linalg.norm((truth.center - detections.center)[:, :2], axis=1),
        "scale": 1 - common / union,
        "orient": np.abs(turned),
        "vel": np.linalg.norm(truth.velocity - detections.velocity, axis=1),
        "attr": np.where(truth.attribute < 0, math.nan, is_wrong),
    }


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of the first 1, 2, … values that are known; 0 before the first of these, and 1 where there is none."""
    known = ~np.isnan(values)
    if not known.any():
        return np.ones_like(values)
    return np.nancumsum(values) / np.maximum(np.cumsum(known), 1)


def _without_nan(values: dict[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in values.items()}
