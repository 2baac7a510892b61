"""What a tracer sees of grid_sample computes what grid_sample computes, run as it stands."""

from __future__ import annotations

import pytest
import torch

from reimplementation.ops.backends import gather, grid_sample
from tests.ops.inputs import ATTENTION_GEOMETRIES, GEOMETRIES, random_attention_inputs, random_inputs
from tests.reference import TOLERANCE, relative_error

OPS = pytest.mark.parametrize(
    ("name", "inputs"),
    [("deformable_aggregation", random_inputs), ("ms_deform_attn", random_attention_inputs)],
    ids=["deformable_aggregation", "ms_deform_attn"],
)
TOLERANCE_64 = TOLERANCE[torch.float64]


def with_gradients(name: str, inputs) -> tuple[list, list]:
    """Output and gradients of both forms."""
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
    leaves = [t for t in operands if t.requires_grad]
    results = []
    for form in (gather, grid_sample):
        output = getattr(form, name)(*operands)
        toward = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        results.append([output, *torch.autograd.grad(output, leaves, toward)])
    return tuple(results)


def assert_both_forms_agree(name: str, inputs) -> None:
    for actual, expected in zip(*with_gradients(name, inputs), strict=True):
        assert relative_error(actual, expected) <= TOLERANCE_64


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("deformable_aggregation", inputs) for inputs in GEOMETRIES.values()]
    + [("ms_deform_attn", inputs) for inputs in ATTENTION_GEOMETRIES.values()],
)
def test_values_and_gradients(name, inputs):
    assert_both_forms_agree(name, inputs())


@OPS
def test_levels_that_do_not_fit_add_nothing(name, inputs):
    operands = inputs(5)
    shapes, starts = list(operands)[1:3]
    shapes.view(-1, 2)[0], starts.view(-1)[1] = torch.tensor([1000, 1000]), -1
    assert_both_forms_agree(name, operands)
    shapes[:] = 0
    for result in with_gradients(name, operands)[0]:
        assert not result.any()


@OPS
@pytest.mark.parametrize("empty", ["num_queries", "batch_size", "num_points", "rows", "levels"])
def test_nothing_to_do(name, inputs, empty):
    if empty == "rows":
        features, *others = inputs()
        operands = [features[:, :0], *others]
    elif empty == "levels":
        features, shapes, starts, locations, weights = inputs()
        if name == "deformable_aggregation":
            operands = [features, shapes[:, :0], starts[:, :0], locations, weights[..., :0, :]]
        else:
            operands = [features, shapes[:0], starts[:0], locations[:, :, :, :0], weights[:, :, :, :0]]
    else:
        operands = list(inputs(**{empty: 0}))
    assert_both_forms_agree(name, operands)


@OPS
def test_narrow_integers_and_pixels_that_are_no_numbers(name, inputs):
    features, shapes, starts, locations, weights = inputs()
    expected = getattr(gather, name)(features, shapes, starts, locations, weights)
    assert torch.equal(
        getattr(gather, name)(features, shapes.to(torch.uint8), starts.int(), locations, weights), expected
    )
    features[:, 0] = float("nan")  # the first pixel of a level, and where samples outside would be gathered
    outside = torch.full_like(locations, 5.0)
    assert not getattr(gather, name)(features, shapes, starts, outside, weights).any()


@OPS
def test_second_derivatives(name, inputs):
    sizes = {"batch_size": 1, "num_queries": 2, "num_points": 1, "channels": 4}
    sizes |= {"shapes": (((3, 4),),) if name == "deformable_aggregation" else ((3, 4),)}
    features, shapes, starts, locations, weights = inputs(1, **sizes)
    locations = locations * 0.5 + 0.23  # away from the edges of pixels
    leaves = [t.requires_grad_() for t in (features, locations, weights)]
    assert torch.autograd.gradgradcheck(
        lambda features, locations, weights: getattr(gather, name)(features, shapes, starts, locations, weights), leaves
    )
