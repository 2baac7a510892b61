"""Anchors to start from: where a data set's boxes are (Sparse4D, arXiv 2211.10581)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from reimplementation.models.sparsedrive.config import BoxHeadConfig
from reimplementation.ops.box_key_points import CENTRE

MAX_BOXES = 20_000  # clusters of more would be the same, later
ITERATIONS = 20


def clustered(anchor: Tensor, boxes: Iterable[np.ndarray], config: BoxHeadConfig, seed: int) -> Tensor:
    """Anchors whose centres are the means of k-means clusters of boxes; all else stays as it was.

    Args:
        anchor: (num_anchors, 11).
        boxes: (n, 9) each, of many frames; those beyond ``max_distance`` do not count.
        config: of the head.
        seed: of the choice where k-means begins.

    Returns:
        (num_anchors, 11). Where there are fewer places than anchors, every place gets one, and the others stay.
    """
    from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]

    places = np.concatenate([of_frame[:, :3] for of_frame in boxes])
    places = places[np.linalg.norm(places[:, :2], axis=1) < config.max_distance]
    random = np.random.default_rng(seed)
    places = np.unique(places[random.permutation(len(places))[:MAX_BOXES]], axis=0)
    clusters = places
    if len(places) > len(anchor):
        begin = places[random.choice(len(places), len(anchor), replace=False)]
        clusters, _ = kmeans2(places, begin, iter=ITERATIONS, minit="matrix")
    result = anchor.clone()
    result[len(result) - len(clusters) :, CENTRE] = torch.from_numpy(clusters).to(result)
    return result
