"""Draw ``number`` of a seed: one call of one op of the table."""

from __future__ import annotations

import random

import torch

from reimplementation import ops
from tests.fuzz.drawing import Draw, Drawing
from tests.fuzz.feature_aggregation import FeatureAggregationDrawing
from tests.fuzz.offsets import OffsetsDrawing
from tests.fuzz.pointwise import PointwiseDrawing
from tests.fuzz.sampling import SamplingDrawing
from tests.ops.table import ATTENTION_FROM_OFFSETS, FEATURE_AGGREGATION, OPS, Op

KINDS = [op for op in OPS for _ in range(1 if op.is_pointwise else 2)]  # what has more to go wrong is drawn more often


def draw(seed: int, number: int, device: torch.device, backend: str | None = None) -> Draw:
    """The same for every run on the same kind of device; of one backend, or of any that serves there."""
    backends = [backend] if backend else ops.available_backends(device)
    rng = random.Random(f"{seed}/{number}")
    op = rng.choice(KINDS)
    return drawing_of(op)(op, rng, device, backends).draw()


def drawing_of(op: Op) -> type[Drawing]:
    if op is FEATURE_AGGREGATION:
        return FeatureAggregationDrawing
    if op is ATTENTION_FROM_OFFSETS:
        return OffsetsDrawing
    return PointwiseDrawing if op.is_pointwise else SamplingDrawing
