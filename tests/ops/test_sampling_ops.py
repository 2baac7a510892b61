"""What the ops that sample levels promise beyond every op: levels anywhere, and that nothing else is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.agreement import assert_agrees, assert_close, run
from tests.ops.table import AGGREGATION, ATTENTION, SAMPLING_OPS
from tests.reference import TOLERANCE

FLOAT64 = TOLERANCE[torch.float64]


@pytest.fixture(params=SAMPLING_OPS, ids=str)
def op(request):
    return request.param


@pytest.mark.parametrize(
    ("op", "shapes", "starts"),
    [
        pytest.param(AGGREGATION, (((6, 5), (6, 5)), ((6, 5), (2, 3))), [[60, 3], [0, 0]], id=str(AGGREGATION)),
        pytest.param(ATTENTION, ((6, 5), (6, 5), (2, 3)), [36, 3, 0], id=str(ATTENTION)),
    ],
)
def test_overlapping_and_permuted_levels(op, shapes, starts, backend_device):
    features, shapes, _, *others = op.random(11, shapes=shapes)
    assert_agrees(op, [features, shapes, torch.tensor(starts), *others], backend_device, torch.float64)


def test_levels_beyond_the_features(op, backend_device):
    """On the CPU they are an error; on a GPU, where nobody looks at them before, they add nothing."""
    features, shapes, starts, *others = op.on(backend_device, seed=10)
    for bad_shapes, bad_starts in [
        (shapes, starts + 1),
        (shapes, starts - 1),
        (shapes * torch.tensor([1, 2], device=backend_device), starts),
        (-shapes, starts),
        (torch.full_like(shapes, 2**31 - 1), starts),
    ]:
        message = rf"{op.names[1]} and {op.names[2]} must stay within (num_feat|S)=\d+ rows; got a level of .*"
        with pytest.raises(ValueError, match=message):
            op.function(features, bad_shapes.cpu(), bad_starts.cpu(), *others)
        if backend_device.type == "cuda":
            fits = (bad_shapes > 0).all(-1) & (bad_starts >= 0)
            fits &= bad_starts + bad_shapes.prod(-1).clamp(max=2**40) <= features.shape[1]
            kept = torch.where(fits[..., None], bad_shapes, 0), torch.where(fits, bad_starts, 0)
            expected = op.function(features, *kept, *others)
            assert torch.equal(op.function(features, bad_shapes, bad_starts, *others), expected)


def unread(op, shapes: Tensor, locations: Tensor) -> Tensor:
    """The samples that count for nothing, in the locations' shape without (x, y)."""
    if op is AGGREGATION:
        return ~((locations > 0) & (locations < 1)).all(-1)
    size = shapes.flip(-1)[:, None].to(locations)
    pixel = locations * size - 0.5
    return ~((pixel > -1) & (pixel < size)).all(-1)


def test_samples_that_touch_nothing_leave_no_trace(op, backend_device):
    """Not even where their weights are NaN."""
    operands = op.moved(op.geometries["border"](), backend_device, torch.float64)
    features, shapes, starts, locations, weights = operands
    apart = unread(op, shapes, locations)
    assert 0.3 < apart.double().mean() < 0.9
    of_weights = apart[..., None, None].expand_as(weights) if op is AGGREGATION else apart
    clean = run(op, operands)
    poisoned = run(op, [features, shapes, starts, locations, weights.masked_fill(of_weights, float("nan"))])
    assert_close(op, poisoned, clean, FLOAT64)
    _, _, grad_locations, grad_weights = clean
    assert not grad_locations[apart].any()
    assert not grad_weights[of_weights].any()


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        pytest.param(AGGREGATION, {"shapes": [[(4, 4)]]}, id=str(AGGREGATION)),
        pytest.param(ATTENTION, {"shapes": [(4, 4)], "num_heads": 1}, id=str(ATTENTION)),
    ],
)
def test_rows_outside_the_level_are_not_read(op, sizes, backend_device):
    low, high = (0.01, 0.99) if op is AGGREGATION else (-0.1, 1.1)
    corners = torch.tensor([[low, low], [high, low], [low, high], [high, high], [0.01, 0.99]], dtype=torch.float64)
    sizes = {"batch_size": 1, "num_queries": len(corners), "num_points": 1, "spare_rows": 2, **sizes}
    features, shapes, starts, locations, weights = op.random(**sizes)
    features[:, [0, 17]] = float("nan")  # the rows around the level
    operands = [features, shapes, starts + 1, corners.view(locations.shape), weights]
    assert all(result.isfinite().all() for result in run(op, op.moved(operands, backend_device, torch.float64)))
