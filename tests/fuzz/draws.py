"""Draw ``number`` of a seed: one call of one op of the table."""

from __future__ import annotations

import random

import torch

from tests.fuzz.drawing import Draw
from tests.fuzz.pointwise import PointwiseDrawing
from tests.fuzz.sampling import SamplingDrawing
from tests.ops.table import OPS

KINDS = [op for op in OPS for _ in range(1 if op.is_pointwise else 2)]  # what has more to go wrong is drawn more often


def draw(seed: int, number: int, device: torch.device) -> Draw:
    """The same for every run on the same kind of device."""
    rng = random.Random(f"{seed}/{number}")
    op = rng.choice(KINDS)
    return (PointwiseDrawing if op.is_pointwise else SamplingDrawing)(op, rng, device).draw()
