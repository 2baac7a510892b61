"""Boxes for the metrics: true ones, and detections that are near them, far off, or of another class."""

from __future__ import annotations

import numpy as np

from reimplementation.training.evaluate import EvalBoxes


def boxes(sample, label, center, **others) -> EvalBoxes:
    """Boxes of which only some values matter; the others are those of a metre cube at rest."""
    count = len(sample)
    values = {
        "size": np.ones((count, 3)),
        "yaw": np.zeros(count),
        "velocity": np.zeros((count, 2)),
        "attribute": np.zeros(count, dtype=int),
        "ego_distance": np.zeros(count),
        "score": np.ones(count),
    }
    center = np.asarray(center, dtype=float).reshape(count, -1)
    center = np.concatenate([center, np.zeros((count, 3 - center.shape[1]))], axis=1)
    given = {name: np.asarray(value) for name, value in others.items()}
    return EvalBoxes(np.asarray(sample), np.asarray(label), center, **(values | given))


def random_boxes(seed: int, num_samples: int = 6, num_classes: int = 10) -> tuple[EvalBoxes, EvalBoxes]:
    """Truth and detections of as many samples, with unknown velocities, missing attributes, and equal scores."""
    rng = np.random.default_rng(seed)
    count = num_samples * 25
    truth = EvalBoxes(
        sample=rng.integers(num_samples, size=count),
        label=rng.integers(num_classes, size=count),
        center=rng.uniform(-30, 30, (count, 3)),
        size=rng.uniform(0.3, 6, (count, 3)),
        yaw=rng.uniform(-7, 7, count),
        velocity=np.where(rng.random((count, 1)) < 0.1, np.nan, rng.normal(0, 4, (count, 2))),
        attribute=rng.integers(-1, 3, size=count),
        ego_distance=rng.uniform(0, 60, count),
        score=np.ones(count),
    )
    near = truth[rng.random(count) < 0.8]
    spread = rng.choice([0.2, 0.8, 3.0], len(near))[:, None]
    found = EvalBoxes(
        sample=near.sample,
        label=np.where(rng.random(len(near)) < 0.1, rng.integers(num_classes, size=len(near)), near.label),
        center=near.center + rng.normal(0, 1, (len(near), 3)) * spread,
        size=near.size * np.exp(rng.normal(0, 0.2, (len(near), 3))),
        yaw=near.yaw + rng.normal(0, 0.5, len(near)) + np.pi * (rng.random(len(near)) < 0.1),
        velocity=np.nan_to_num(near.velocity) + rng.normal(0, 1, (len(near), 2)),
        attribute=rng.integers(-1, 3, size=len(near)),
        ego_distance=near.ego_distance,
        score=rng.random(len(near)).round(2),
    )
    return truth, EvalBoxes.concatenate([found, found[rng.random(len(found)) < 0.3]])
