"""The Triton kernels where no GPU is: interpreted in NumPy, on few samples. On a GPU every op's tests run them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from reimplementation import ops
from reimplementation.ops.backends import triton
from tests import reference
from tests.ops import inputs
from tests.ops.agreement import KernelCalls, assert_agrees, assert_close, leaves_of, run
from tests.ops.table import (
    AGGREGATION,
    ATTENTION,
    ATTENTION_FROM_OFFSETS,
    FEATURE_AGGREGATION,
    FLOATING,
    OPS,
    SAMPLING_OPS,
    without_optional,
)
from tests.reference import TOLERANCE

pytest.importorskip("triton", minversion="3.7", reason="the interpreter of Triton 3.6 does not know NumPy 2.4")
pytestmark = pytest.mark.skipif(not triton.is_interpreted(), reason="Triton compiles its kernels here")

CPU = torch.device("cpu")
FEW = {
    AGGREGATION.name: {
        "batch_size": 1,
        "num_queries": 1,
        "num_points": 2,
        "channels": 12,
        "num_groups": 3,
        "shapes": (((5, 7), (2, 3)), ((4, 3), (1, 2))),
    },
    FEATURE_AGGREGATION.name: {
        "batch_size": 1,
        "num_queries": 1,
        "num_points": 2,
        "channels": 12,
        "num_groups": 6,
        "shapes": (((5, 7), (2, 3)), ((4, 3), (1, 2))),
    },
    ATTENTION.name: {
        "batch_size": 1,
        "num_queries": 5,
        "num_heads": 2,
        "channels": 6,
        "num_points": 2,
        "shapes": ((5, 7),),
    },
    ATTENTION_FROM_OFFSETS.name: {
        "batch_size": 1,
        "num_queries": 3,
        "num_heads": 2,
        "channels": 6,
        "num_points": 1,
        "shapes": ((5, 7), (2, 3)),
    },
}
KERNEL_OPS = tuple(op for op in OPS if op.name in triton.OPS)

sampling = pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)


@pytest.fixture(params=KERNEL_OPS, ids=str)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def forced():
    with ops.use_backend("triton"):
        yield


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_agrees_with_float64(op, dtype):
    assert_agrees(op, op.random(3, **{**FEW[op.name], "batch_size": 2}), CPU, dtype)


@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        (AGGREGATION, {"channels": 6, "num_groups": 6}),  # a channel a group
        (AGGREGATION, {"channels": 7, "num_groups": 1, "shapes": (((4, 3), (1, 2), (3, 1)),)}),
        (
            AGGREGATION,
            {"channels": 600, "num_groups": 100, "num_points": 1},
        ),  # more groups than a forward's program has
        (ATTENTION, {"channels": 1, "num_queries": 3}),
        (ATTENTION, {"channels": 300, "num_queries": 1}),  # a query a program
        (ATTENTION, {"num_queries": 70, "num_points": 1}),  # the last block is not full
        (FEATURE_AGGREGATION, {"num_points": 17}),  # more than are projected together
        (FEATURE_AGGREGATION, {"channels": 600, "num_groups": 100, "num_points": 1, "shapes": (((5, 7),),)}),
        (ATTENTION_FROM_OFFSETS, {"boxes": False, "num_points": 3}),  # samples are no power of two
        (ATTENTION_FROM_OFFSETS, {"boxes": False, "shared": True, "channels": 1, "num_queries": 70, "num_points": 1}),
        (ATTENTION_FROM_OFFSETS, {"shared": True, "scaled": False, "channels": 300, "num_queries": 1}),
    ],
    ids=str,
)
def test_any_channels_and_queries(op, sizes):
    assert_agrees(op, op.random(4, **{**FEW[op.name], **sizes}), CPU, torch.float32)


@pytest.mark.parametrize("visible_only", [False, True])
def test_cameras_in_every_form(visible_only):
    """With and without a term of each camera, image sizes and dropped pairs; of all pairs, or of those seen."""
    settings = {"attn_drop": 0.5, "visible_only": visible_only}
    op = replace(
        FEATURE_AGGREGATION,
        function=partial(ops.deformable_feature_aggregation, **settings),
        formula=partial(reference.deformable_feature_aggregation, **settings),
    )
    for seed, change in enumerate([lambda operands: operands, partial(without_optional, op)]):
        operands = op.random(seed, **{**FEW[op.name], "num_queries": 3, "shapes": (((5, 7),),) * 3})
        assert_agrees(op, change(operands), CPU, torch.float32)


def test_slices_of_what_one_layer_predicts():
    """Offsets and logits are read where they lie; a slice that lies otherwise is copied."""
    op, few = ATTENTION_FROM_OFFSETS, {"batch_size": 2, "num_queries": 2, "shapes": ((5, 7),)}
    operands = op.on(CPU, torch.float64, 3, **{**FEW[op.name], **few})
    expected = run(op, operands)
    offsets, logits = operands[4:6]
    together = torch.cat([offsets.flatten(2), logits.flatten(2)], -1)
    operands[4] = together[..., : offsets[0, 0].numel()].view(offsets.shape)
    operands[5] = together[..., offsets[0, 0].numel() :].view(logits.shape)
    assert operands[5].stride(1) == together.shape[2]
    assert_close(op, run(op, operands), expected, TOLERANCE[torch.float64])
    operands[5] = inputs.with_memory_reversed(logits)
    assert_close(op, run(op, operands), expected, TOLERANCE[torch.float64])


@sampling
def test_borders_and_special_locations(op):
    """Some of the pairs of coordinates that other backends see all of; where samples touch nothing, weights are NaN."""
    features, shapes, starts, locations, weights = op.geometries["border"]()
    kept = torch.arange(0, locations.shape[1], 213 if op is AGGREGATION else 61)
    locations, weights = locations[:, kept], weights[:, kept]
    finite = [features, shapes, starts, locations, weights]
    assert_agrees(op, finite, CPU, torch.float32)
    clean = run(op, finite)
    if op is AGGREGATION:
        unread = ~((locations > 0) & (locations < 1)).all(-1)[..., None, None].expand_as(weights)
    else:
        size = shapes.flip(-1)[:, None].double()
        pixel = locations * size - 0.5
        unread = ~((pixel > -1) & (pixel < size)).all(-1)
    assert 0.3 < unread.double().mean() < 0.95
    poisoned = run(op, [features, shapes, starts, locations, weights.masked_fill(unread, math.nan)])
    assert_close(op, poisoned, clean, TOLERANCE[torch.float64])


def test_gradients_are_derivatives(op):
    """Along a direction, as all numbers in turn would take minutes."""
    operands = op.moved(op.small(), CPU, torch.float64)
    leaves = leaves_of(op, operands)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    gradients = torch.autograd.grad(op.function(*operands).square().sum(), leaves)
    along = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions))

    def moved(step: float) -> float:
        for leaf, direction in zip(leaves, directions):
            leaf.data.add_(direction, alpha=step)
        return op.function(*operands).square().sum().item()

    step = 1e-6
    ahead, behind = moved(step), moved(-2 * step)
    assert along.item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


@sampling
def test_memory_in_any_order(op):
    operands = op.random(5, **FEW[op.name])
    strided = [inputs.with_memory_reversed(t) if i in op.differentiable else t for i, t in enumerate(operands)]
    *_, grad_locations, grad_weights = results = run(op, strided)
    assert_close(op, results, run(op, operands), TOLERANCE[torch.float64])
    assert (grad_locations.stride(), grad_weights.stride()) == (strided[3].stride(), strided[4].stride())


@pytest.mark.parametrize(
    ("op", "sizes"),
    [pytest.param(op, sizes, id=f"{op}-{name}") for op in KERNEL_OPS for name, sizes in op.empty.items()],
)
def test_nothing_to_do(op, sizes):
    operands = op.on(CPU, seed=9, **{"batch_size": 1, "num_queries": 1, "num_points": 1, **sizes})
    for result, like in zip(run(op, operands), [op.formula(*operands), *(operands[i] for i in op.differentiable)]):
        assert result.shape == like.shape and not result.any()


def test_metadata_that_do_not_fit(op):
    """They are refused where they can be read; the kernels, which may get them on a GPU, take such levels for empty."""
    features, shapes, starts, *others = op.on(CPU, torch.float32, 10, **FEW[op.name])
    launch = import_module(f"{triton.__name__}.{op.name}").forward
    for bad_shapes, bad_starts in [
        (shapes, starts + features.shape[1]),
        (shapes, starts - 1000),
        (-shapes, starts),
        (torch.full_like(shapes, 2**31 - 1), starts),
        (torch.full_like(shapes, 2**62), starts),
        (shapes, torch.full_like(starts, 2**63 - 1)),
    ]:
        with pytest.raises(ValueError, match=f"{op.names[1]} and {op.names[2]} must stay within"):
            op.function(features, bad_shapes, bad_starts, *others)
        returned = launch(features, bad_shapes, bad_starts, *others, *op.settings)
        assert not (returned[0] if op.keeps else returned).any()


@sampling
def test_operators_that_are_called_directly_check_their_operands(op):
    operands = op.on(CPU, torch.float32, **FEW[op.name])
    forward = getattr(torch.ops.reimplementation_triton, op.name)
    with pytest.raises(ValueError, match=f"{op.names[4]} must be"):
        forward(*operands[:4], operands[4][:, :0])
    with pytest.raises(TypeError, match="operands must have the dtypes"):
        forward(*operands[:3], operands[3].double(), operands[4])
    with pytest.raises(ValueError, match="grad_output must be"):
        backward = getattr(torch.ops.reimplementation_triton, f"{op.name}_backward")
        backward(forward(*operands)[..., :1], *operands, True, True, True)


def test_only_the_gradients_that_are_needed(op):
    operands = op.on(CPU, torch.float64, 5, **FEW[op.name])
    _, *expected = run(op, operands)
    for place, wanted in zip(op.differentiable, expected):
        operands[place] = operands[place].detach().requires_grad_()
        output = op.function(*operands)
        toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        with KernelCalls() as calls:
            (gradient,) = torch.autograd.grad(output, operands[place], toward)
        assert calls.needs_of(op) == [tuple(place == other for other in op.differentiable)]
        torch.testing.assert_close(gradient, wanted)
        operands[place] = operands[place].detach()


def test_a_deterministic_gradient_of_what_queries_share_is_refused(op):
    """The others are deterministic."""
    shared = (0, 7) if op is FEATURE_AGGREGATION else (0,)
    operands = op.on(CPU, torch.float32, **FEW[op.name])
    expected = run(op, operands)
    torch.use_deterministic_algorithms(True)
    try:
        for place in shared:
            needy = list(operands)
            needy[place] = needy[place].detach().requires_grad_()
            output = op.function(*needy).sum()
            with pytest.raises(RuntimeError, match=f"no deterministic gradient of {op.names[place]}.*the cuda backend"):
                output.backward()
        results = run(
            op,
            operands,
            function=lambda *given: (
                op.function(*(operand.detach() if i in shared else operand for i, operand in enumerate(given)))
                + 0 * sum(given[place].sum() for place in shared)
            ),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for place, result, wanted in zip(op.differentiable, results[1:], expected[1:]):
        assert place in shared or torch.equal(result, wanted)


def test_second_derivatives_are_refused(op):
    operands = op.on(CPU, **FEW[op.name])
    leaves = leaves_of(op, operands)
    (gradient,) = torch.autograd.grad(op.function(*operands).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} has no second derivative"):
        gradient.sum().backward()


def test_a_compiler_sees_one_operator(op):
    torch._dynamo.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend="aot_eager", dynamic=True)
    operands = op.on(CPU, **FEW[op.name])
    assert_close(op, run(op, operands, function=compiled), run(op, operands), TOLERANCE[torch.float64])


@sampling
def test_autocast(op):
    """Features keep their dtype, and half-precision locations are read as float32."""
    features, shapes, starts, locations, weights = op.on(CPU, torch.float32, **FEW[op.name])
    with torch.autocast("cpu", torch.bfloat16):
        output = op.function(features, shapes, starts, locations.bfloat16(), weights.bfloat16())
    expected = op.function(features, shapes, starts, locations.bfloat16().float(), weights.bfloat16().float())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected)


def test_ops_without_kernels_here_run_their_formula():
    points, matrices, sizes = inputs.random_projection(num_queries=1, num_points=1)
    with KernelCalls() as calls:
        location = ops.project_points(points, matrices, sizes)
    assert not calls.names
    torch.testing.assert_close(location, reference.project_points(points, matrices, sizes))


def test_what_is_too_large_is_named():
    operands = AGGREGATION.random(channels=2**19, num_groups=1, num_queries=1, num_points=1, shapes=(((1, 1),) * 5,))
    with pytest.raises(
        RuntimeError, match="hold at most 1048576 numbers of one sample.*use_backend\\('grid_sample'\\)"
    ):
        ops.deformable_aggregation_function(*operands)
