"""Average precision of map lines by Chamfer distance (HDMapNet, arXiv 2107.06307, section 4.2; MapTR, 2208.14437)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DISTANCES = (0.5, 1.0, 1.5)  # metres
NUM_POINTS = 100  # of a line while it is compared


@dataclass(frozen=True, eq=False)
class EvalLines:
    """Lines of many samples, an entry a line.

    sample  (n,) int, which moment a line belongs to
    label   (n,) int, its class
    points  (n, num_points, 2) metres
    score   (n,), of predictions; of the truth it is not read
    """

    sample: np.ndarray
    label: np.ndarray
    points: np.ndarray
    score: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.sample)
        if self.label.shape != (count,) or self.score.shape != (count,):
            raise ValueError(f"label and score must be ({count},); got {self.label.shape} and {self.score.shape}")
        if self.points.ndim != 3 or self.points.shape[0] != count or self.points.shape[2] != 2:
            raise ValueError(f"points must be ({count}, num_points, 2); got {self.points.shape}")
        if not np.isfinite(self.points).all() or not np.isfinite(self.score).all():
            raise ValueError("points and score must be finite")

    def __len__(self) -> int:
        return len(self.sample)

    def __getitem__(self, rows: np.ndarray) -> EvalLines:
        return EvalLines(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[EvalLines]) -> EvalLines:
        """The lines of all the parts, in that order; they have equally many points."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(cls)))


@dataclass(frozen=True, eq=False)
class MapMetrics:
    """average_precision: by class and by distance threshold."""

    average_precision: dict[str, dict[float, float]]

    @property
    def mean_average_precision(self) -> float:
        """mAP: over distances, then over classes."""
        return float(np.mean([np.mean(list(of_class.values())) for of_class in self.average_precision.values()]))

    def to_dict(self) -> dict:
        """What a JSON file holds."""
        classes = {
            name: {str(distance): value for distance, value in of_class.items()}
            for name, of_class in self.average_precision.items()
        }
        return {"mAP": self.mean_average_precision, "classes": classes}


def evaluate_lines(truth: EvalLines, predictions: EvalLines, classes: Sequence[str]) -> MapMetrics:
    """Judge predicted lines.

    By falling score each prediction takes the nearest true line of its sample and class: it is right if that is nearer
    than the threshold and no better prediction has taken it. A class without true lines has the average precision 0.

    Args:
        truth: what is there.
        predictions: what was found.
        classes: the names of the labels 0, 1, ….
    """
    result = {}
    for label, name in enumerate(classes):
        of_class = truth[truth.label == label]
        found = predictions[predictions.label == label]
        found = found[np.argsort(-found.score, kind="stable")]
        nearest, distance = _nearest(of_class, found)
        result[name] = {
            threshold: average_precision(_first_matches(nearest, distance <= threshold), len(of_class))
            for threshold in DISTANCES
        }
    return MapMetrics(result)


def chamfer_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Half the sum of the mean distances from each line's points to the other line, metres.

    Args:
        a: (n, p, 2).
        b: (m, q, 2).

    Returns:
        (n, m).
    """
    distances = np.empty((len(a), len(b)))
    for column, line in enumerate(b):  # one after another: all together would take p times q times as much memory
        apart = np.linalg.norm(a[:, :, None] - line, axis=-1)
        distances[:, column] = (apart.min(axis=2).mean(axis=1) + apart.min(axis=1).mean(axis=1)) / 2
    return distances


def resample(lines: np.ndarray, num_points: int) -> np.ndarray:
    """Lines (n, p, 2) with as many points (n, num_points, 2), equally far from one another along each line."""
    resampled = np.empty((len(lines), num_points, 2))
    for row, line in enumerate(lines):
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
        places = np.linspace(0, along[-1], num_points)
        resampled[row] = np.stack([np.interp(places, along, line[:, axis]) for axis in range(2)], axis=1)
    return resampled


def average_precision(is_right: np.ndarray, num_truth: int) -> float:
    """The area under the curve of precision over recall, whose precision never rises with the recall.

    Args:
        is_right: (n,) bool, of predictions by falling score.
        num_truth: how many there were to find; with none the result is 0.
    """
    if num_truth == 0 or not is_right.any():
        return 0.0
    found = np.cumsum(is_right)
    precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[::-1]
    return float(precision[is_right].sum() / num_truth)


def _nearest(truth: EvalLines, found: EvalLines) -> tuple[np.ndarray, np.ndarray]:
    """The true line (n,) of its sample that is nearest to each prediction, or -1, and how far it is."""
    nearest, distance = np.full(len(found), -1), np.full(len(found), np.inf)
    truth_points, found_points = resample(truth.points, NUM_POINTS), resample(found.points, NUM_POINTS)
    for sample in np.unique(truth.sample):
        there, here = np.nonzero(truth.sample == sample)[0], np.nonzero(found.sample == sample)[0]
        apart = chamfer_distance(found_points[here], truth_points[there])
        nearest[here] = there[apart.argmin(axis=1)]
        distance[here] = apart.min(axis=1)
    return nearest, distance


def _first_matches(nearest: np.ndarray, is_near: np.ndarray) -> np.ndarray:
    """Which predictions, best first, are near a line that none before them was near."""
    is_right = np.zeros(len(nearest), dtype=bool)
    candidates = np.nonzero(is_near)[0]
    _, first = np.unique(nearest[candidates], return_index=True)
    is_right[candidates[first]] = True
    return is_right
