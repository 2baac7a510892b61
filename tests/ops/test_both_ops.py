"""What both ops promise alike: types, strides, gradients on demand, registration with PyTorch, streams."""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from reimplementation.bench.inputs import OpInputs
from tests.ops.agreement import assert_second_derivatives_or_refusal, run
from tests.ops.inputs import with_memory_reversed
from tests.reference import TOLERANCE, relative_error

HALF_DTYPES = [torch.float16, torch.bfloat16]


def on_cpu(operands):
    return [tensor.cpu() for tensor in operands]


def test_half_features_with_float32_weights(op, backend_device):
    for dtype in HALF_DTYPES:
        features, shapes, starts, locations, weights = op.inputs(3).to(backend_device, dtype)
        operands = features, shapes, starts, locations, weights.float()
        output = op.function(*operands)
        assert output.dtype == dtype
        assert relative_error(output.cpu(), op.formula(*on_cpu(operands))) <= TOLERANCE[dtype]


def test_mixed_float_precisions_are_cast(op, backend_device):
    single = list(op.inputs(3).to(backend_device, torch.float32))
    double = list(op.inputs(3).to(backend_device, torch.float64))
    wide_locations = [*single[:3], double[3], single[4]]
    narrow_operands = [*double[:3], single[3], single[4]]
    for operands in (wide_locations, narrow_operands):
        output = op.function(*operands)
        assert output.dtype == operands[0].dtype
        assert relative_error(output.cpu(), op.formula(*on_cpu(operands))) <= TOLERANCE[output.dtype]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_only_the_gradients_that_are_needed(op, backend_device, needed):
    inputs = op.inputs(5).to(backend_device, torch.float64)
    expected = run(op.function, inputs)[1:]
    features, shapes, starts, locations, weights = inputs
    leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate((features, locations, weights))]
    output = op.function(leaves[0], shapes, starts, leaves[1], leaves[2])
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    output.backward(grad_output.to(output))
    for i, leaf in enumerate(leaves):
        if i in needed:
            assert relative_error(leaf.grad, expected[i]) <= 1e-12
        else:
            assert leaf.grad is None


def test_forward_is_bitwise_reproducible(op, backend_device):
    inputs = op.inputs(6, num_queries=200).to(backend_device, torch.float32)
    first = op.function(*inputs)
    assert all(torch.equal(first, op.function(*inputs)) for _ in range(5))


def test_operands_are_read_through_their_strides(op, backend_device):
    inputs = op.inputs(6).to(backend_device, torch.float64)
    strided = type(inputs)(*(with_memory_reversed(operand) for operand in inputs))
    narrow = type(inputs)(*(t if t.is_floating_point() else t.to(torch.int16) for t in strided))
    expected = run(op.function, inputs)
    for other in (strided, narrow):
        assert all(relative_error(a, b) <= 1e-12 for a, b in zip(run(op.function, other), expected))


def test_features_at_an_odd_address(op, backend_device):
    inputs = op.inputs(8).to(backend_device, torch.float32)
    features = next(iter(inputs))
    buffer = torch.empty(features.numel() + 1, device=backend_device)
    shifted = type(inputs)(buffer[1:].view_as(features).copy_(features), *list(inputs)[1:])
    for got, wanted in zip(run(op.function, shifted), run(op.formula, inputs.to("cpu", torch.float64))):
        assert relative_error(got.cpu(), wanted) <= TOLERANCE[torch.float32]


def test_second_derivatives(op, backend_device):
    """The kernels refuse, and say so; plain PyTorch has them right."""
    features, shapes, starts, locations, weights = op.small.to(backend_device, torch.float64)
    # Half a step away from the edges of pixels, where the derivative does not exist.
    leaves = [t.detach().requires_grad_() for t in (features, locations + 2.0**-13, weights)]

    def function(features, locations, weights):
        return op.function(features, shapes, starts, locations, weights)

    if ops.backends.select_backend(backend_device) == "grid_sample":
        assert_second_derivatives_or_refusal(function, leaves)
        return
    (gradient,) = torch.autograd.grad(function(*leaves).sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.name} has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_autocast(op, backend_device, dtype):
    """Features keep their dtype, locations are read as float32, weights fit the features."""
    inputs = op.inputs(14).to(backend_device, torch.float32)
    features, shapes, starts, locations, weights = inputs
    with torch.autocast(backend_device.type, dtype):
        half = op.function(features.to(dtype), shapes, starts, locations, weights.to(dtype))
        single = op.function(features, shapes, starts, locations.half(), weights.to(dtype))
    assert half.dtype == dtype
    assert single.dtype == torch.float32
    assert relative_error(half.cpu(), op.formula(*on_cpu(inputs))) <= 2 * TOLERANCE[dtype]
    rounded = features, shapes, starts, locations.half(), weights.to(dtype)
    assert relative_error(single.cpu(), op.formula(*on_cpu(rounded))) <= TOLERANCE[torch.float32]


def test_autocast_to_the_other_half(op, backend_device):
    """The features keep their dtype, also where autocast has no common one for both."""
    inputs = op.inputs(14).to(backend_device, torch.float16)
    with torch.autocast(backend_device.type, torch.bfloat16):
        output = op.function(*inputs)
    assert output.dtype == torch.float16
    assert relative_error(output.cpu(), op.formula(*on_cpu(inputs))) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("place", range(5))
def test_autocast_refuses_what_is_refused_without_it(op, place):
    operands = list(op.inputs(14).to("cpu", torch.float32))
    operands[place] = None
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"must be a torch.Tensor; got NoneType"):
        op.function(*operands)
    *others, weights = op.inputs(14).to("cpu", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="weights must be float32; got int64"):
        op.function(*others, weights.long())


def test_features_on_meta_alone(op):
    features, *others = op.inputs(14).to("cpu", torch.float32)
    with pytest.raises(ValueError, match="must be on meta"):
        op.function(features.to("meta"), *others)


def test_lazily_negated_operands(op, backend_device):
    """The imaginary part of a conjugate is a view whose sign is turned when it is read."""
    features, shapes, starts, locations, weights = op.inputs(6).to(backend_device, torch.float64)
    lazy = [torch.complex(torch.zeros_like(t), -t).conj().imag for t in (features, locations, weights)]
    assert all(t.is_neg() for t in lazy)
    expected = op.function(features, shapes, starts, locations, weights)
    assert torch.equal(op.function(lazy[0], shapes, starts, *lazy[1:]), expected)


@pytest.fixture
def kernels_device(device) -> torch.device:
    """A device that the extension has kernels for."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    return device


class TestOperator:
    """What torch.library promises of a registered operator."""

    @pytest.fixture
    def inputs(self, op, kernels_device) -> OpInputs:
        return op.inputs(15, num_queries=3).to(kernels_device, torch.float32)

    @pytest.mark.parametrize("needs", [False, True])
    def test_forward(self, op, inputs, needs):
        operands = (t.clone().requires_grad_(needs) if t.is_floating_point() else t for t in inputs)
        torch.library.opcheck(op.forward, tuple(operands))

    @pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)])
    def test_backward(self, op, inputs, needs):
        *operands, weights = inputs
        grad_output = torch.randn_like(op.forward(*inputs))
        weights = with_memory_reversed(weights)  # whose gradient has its strides
        torch.library.opcheck(op.backward, (grad_output, *operands, weights, *needs))

    def test_autocast_kernel(self, op, inputs):
        features, shapes, starts, locations, weights = inputs
        with torch.autocast(features.device.type, torch.bfloat16):
            output = op.forward(features.bfloat16(), shapes, starts, locations.half(), weights.half())
        assert output.dtype == torch.bfloat16


class TestOutOfMemory:
    """Queries that take no memory themselves, as all of them are one, and more output than there can be."""

    @pytest.fixture
    def inputs(self, op, kernels_device) -> OpInputs:
        one = op.inputs(3, batch_size=1, num_queries=1, channels=512).to(kernels_device, torch.float32)
        features, shapes, starts, locations, weights = one
        queries = 2**30 if kernels_device.type == "cuda" else 2**45
        many = (t.expand(1, queries, *t.shape[2:]) for t in (locations, weights))
        return type(one)(features, shapes, starts, *many)

    @pytest.mark.parametrize("records", [False, True])
    def test_error(self, op, kernels_device, inputs, records):
        few = op.inputs(3).to(kernels_device, torch.float32)
        before = op.function(*few)
        features, *others = inputs
        error = torch.OutOfMemoryError if kernels_device.type == "cuda" else RuntimeError
        with pytest.raises(error, match=f"^{kernels_device.type.upper()} out of memory. Tried to allocate .* GiB"):
            op.function(features.requires_grad_(records), *others)
        assert torch.equal(op.function(*few), before)

    def test_error_of_the_operators(self, op, inputs):
        features, _, _, locations, _ = inputs
        grad_output = features.new_ones(1).expand(1, locations.shape[1], features[0, 0].numel())
        for call in (lambda: op.forward(*inputs), lambda: op.backward(grad_output, *inputs, True, True, True, False)):
            with pytest.raises(RuntimeError, match="out of memory. Tried to allocate"):
                call()


@pytest.mark.cuda
def test_another_stream_and_metadata_on_the_cpu(op):
    features, shapes, starts, locations, weights = op.inputs(16).to("cuda", torch.float64)
    expected = op.function(features, shapes, starts, locations, weights)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = op.function(features, shapes.cpu(), starts.cpu(), locations, weights)
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.cuda
@pytest.mark.two_gpus
def test_tensors_on_another_gpu_than_the_current_one(op):
    inputs = op.inputs(18).to("cuda:1", torch.float64)
    with torch.cuda.device(0):
        actual = run(op.function, inputs)
    for got, wanted in zip(actual, run(op.formula, inputs.to("cpu", torch.float64))):
        assert got.device == torch.device("cuda:1")
        assert relative_error(got.cpu(), wanted) <= TOLERANCE[torch.float64]


@pytest.mark.cuda
def test_no_host_synchronization(op):
    features, shapes, starts, locations, weights = op.inputs(17).to("cuda", torch.float32)
    leaves = [t.requires_grad_() for t in (features, locations, weights)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op.function(leaves[0], shapes, starts, leaves[1], leaves[2]).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
