"""The gradient of the features where levels are cut into tiles: borders, thin and shared levels, crowds, gaps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reimplementation import ops
from tests.fuzz.checking import deterministic
from tests.ops.agreement import assert_agrees
from tests.ops.inputs import quantized
from tests.ops.table import AGGREGATION, SAMPLING_OPS

# (height, width) of levels, their first rows, and rows that there are; None: one after the other, and no more.
LEVELS = {
    "around a tile": ([(3, 3), (3, 4), (4, 4), (4, 5), (5, 8), (8, 5), (7, 9), (9, 7)], None, None),
    "one row": ([(1, 200), (1, 5)], None, None),
    "one column": ([(200, 1), (5, 1)], None, None),
    "one pixel": ([(1, 1)] * 4, None, None),
    "more levels than lanes": ([(1 + i % 6, 1 + i % 5) for i in range(35)], None, None),
    "the same rows twice": ([(6, 7), (5, 5), (6, 7)], [0, 42, 0], None),
    "some rows twice": ([(6, 7), (5, 5), (4, 9)], [0, 30, 40], None),
    "other shapes on the same rows": ([(6, 7), (7, 6), (42, 1)], [0, 0, 0], None),
    "rows left over": ([(6, 7), (5, 5)], [10, 70], 120),
    "an empty level": ([(6, 7), (0, 5), (5, 5)], [0, 42, 42], 67),
}


def with_levels(op, name: str, crowd: float) -> list[Tensor]:
    """Random operands; that part of the queries samples the neighbourhood of one place."""
    shapes, starts, rows = LEVELS[name]
    readable = [(max(height, 1), max(width, 1)) for height, width in shapes]
    sizes = {"channels": 24, "num_groups": 3, "shapes": [readable]} if op is AGGREGATION else {"shapes": readable}
    features, own_shapes, own_starts, locations, weights = op.random(31, num_queries=30, **sizes)
    if starts is not None:
        rows = rows or max(start + height * width for start, (height, width) in zip(starts, shapes))
        features = features.repeat(1, 1 + rows // features.shape[1], *[1] * (features.dim() - 2))[:, :rows]
        own_starts = torch.tensor(starts).view(own_starts.shape)
    crowded = int(crowd * locations.shape[1])
    locations[:, :crowded] = quantized(0.45 + 0.02 * locations[:, :crowded])
    return [features, torch.tensor(shapes).view(own_shapes.shape), own_starts, locations, weights]


@pytest.fixture(params=SAMPLING_OPS, ids=str)
def op(request):
    return request.param


@pytest.fixture(
    params=[
        ("cpu", False),
        pytest.param(("cuda", False), marks=pytest.mark.cuda),
        pytest.param(("cuda", True), marks=pytest.mark.cuda),
    ],
    ids=["cpu", "cuda", "cuda-deterministic"],
)
def device(request):
    """Where the kernels run; on CUDA with sums in any order, and always in the same."""
    name, wanted = request.param
    if name not in ops.available_backends(name):
        pytest.skip(f"the {name} kernels are not built")
    with ops.use_backend(name), deterministic(wanted):
        yield torch.device(name)


@pytest.mark.parametrize("crowd", [0, 0.9])
@pytest.mark.parametrize("levels", LEVELS)
def test_levels(op, device, levels, crowd):
    assert_agrees(op, with_levels(op, levels, crowd), device, torch.float64)


@pytest.mark.parametrize("channels", [1, 5, 8, 16, 36, 64, 100, 132, 260])
def test_channels(op, device, channels):
    """Teams of lanes of every size, whole and in part, with one and with several slices of channels."""
    sizes = {"num_groups": 1} if op is AGGREGATION else {}
    operands = op.random(32, batch_size=1, num_queries=40, channels=channels, **sizes)
    for dtype in (torch.float32, torch.float16):
        assert_agrees(op, operands, device, dtype)
