"""What a tracer sees of grid_sample computes what grid_sample computes, run as it stands."""

from __future__ import annotations

import pytest
import torch

from reimplementation.ops.backends import gather, grid_sample
from tests.ops.table import AGGREGATION, SAMPLING_OPS
from tests.reference import TOLERANCE, relative_error

GEOMETRIES = [pytest.param(op, make, id=f"{op}-{name}") for op in SAMPLING_OPS for name, make in op.geometries.items()]
EMPTY = [pytest.param(op, sizes, id=f"{op}-{name}") for op in SAMPLING_OPS for name, sizes in op.empty.items()]


@pytest.fixture(params=SAMPLING_OPS, ids=str)
def op(request):
    return request.param


def with_gradients(op, operands) -> tuple[list, list]:
    """Output and gradients of both forms."""
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in operands]
    leaves = [t for t in operands if t.requires_grad]
    results = []
    for form in (gather, grid_sample):
        output = getattr(form, op.name)(*operands)
        toward = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append([output, *torch.autograd.grad(output, leaves, toward)])
    return tuple(results)


def assert_both_forms_agree(op, operands) -> None:
    for actual, expected in zip(*with_gradients(op, operands), strict=True):
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(("op", "geometry"), GEOMETRIES)
def test_values_and_gradients(op, geometry):
    assert_both_forms_agree(op, geometry())


def test_levels_that_do_not_fit_add_nothing(op):
    operands = op.on("cpu", seed=5)
    shapes, starts = operands[1:3]
    shapes.view(-1, 2)[0], starts.view(-1)[1] = torch.tensor([1000, 1000]), -1
    assert_both_forms_agree(op, operands)
    shapes[:] = 0
    for result in with_gradients(op, operands)[0]:
        assert not result.any()


@pytest.mark.parametrize(("op", "sizes"), EMPTY)
def test_nothing_to_do(op, sizes):
    assert_both_forms_agree(op, op.random(**sizes))


def test_no_rows_where_levels_want_some(op):
    features, *others = op.random()
    assert_both_forms_agree(op, [features[:, :0], *others])


def test_narrow_integers_and_pixels_that_are_no_numbers(op):
    features, shapes, starts, locations, weights = op.random()
    form = getattr(gather, op.name)
    expected = form(features, shapes, starts, locations, weights)
    assert torch.equal(form(features, shapes.to(torch.uint8), starts.int(), locations, weights), expected)
    features[:, 0] = float("nan")  # the first pixel of a level, and where samples outside would be gathered
    assert not form(features, shapes, starts, torch.full_like(locations, 5.0), weights).any()


def test_second_derivatives(op):
    sizes = {"shapes": [[(3, 4)]], "num_groups": 2} if op is AGGREGATION else {"shapes": [(3, 4)]}
    operands = op.random(1, batch_size=1, num_queries=2, num_points=1, channels=4, **sizes)
    features, shapes, starts, locations, weights = operands
    locations = locations * 0.5 + 0.23  # away from the edges of pixels
    leaves = [t.requires_grad_() for t in (features, locations, weights)]
    assert torch.autograd.gradgradcheck(
        lambda features, locations, weights: getattr(gather, op.name)(features, shapes, starts, locations, weights),
        leaves,
    )
