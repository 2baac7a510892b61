"""The same bits every time: forward everywhere, gradients on the CPU, and on a GPU where PyTorch is told so."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.ops.agreement import run
from tests.reference import TOLERANCE, relative_error

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NAMES = ("output", "features", "locations", "weights")
RUNS = 100


@pytest.fixture(params=DTYPES, ids=str)
def inputs(request, op):
    """Work enough for eight threads, and many queries to each pixel."""
    return op.inputs(22, num_queries=400, channels=128).to("cpu", request.param)


@pytest.fixture
def cuda_inputs(inputs, cuda_kernels):
    return type(inputs)(*(operand.cuda() for operand in inputs))


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic_algorithms():
    """`torch.use_deterministic_algorithms`, undone after the test."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def assert_same_bits(actual, expected):
    for name, got, wanted in zip(NAMES, actual, expected):
        assert torch.equal(got, wanted), f"{name} differs"


def test_any_number_of_threads(op, inputs, threads):
    threads(1)
    expected = run(op.function, inputs)
    for count in range(1, 9):
        threads(count)
        for _ in range(2):
            assert_same_bits(run(op.function, inputs), expected)


@pytest.mark.cuda
def test_forward_on_a_gpu(op, cuda_inputs):
    expected = op.function(*cuda_inputs)
    assert all(torch.equal(op.function(*cuda_inputs), expected) for _ in range(RUNS))


@pytest.mark.cuda
def test_deterministic_gradients_on_a_gpu(op, cuda_inputs, deterministic_algorithms):
    atomic = run(op.function, cuda_inputs)
    deterministic_algorithms(True)
    expected = run(op.function, cuda_inputs)
    for _ in range(RUNS):
        assert_same_bits(run(op.function, cuda_inputs), expected)
    for got, wanted in zip(expected, atomic):
        assert relative_error(got, wanted) <= TOLERANCE[got.dtype]


@pytest.mark.cuda
@pytest.mark.parametrize("place", [0.3, 0.43, 0.5, 0.56, 0.69])
def test_every_sample_in_one_place(op, cuda_inputs, deterministic_algorithms, place):
    """The kernels that share out the work on crowded pixels have all of it to share, at a tile's border or within."""
    features, shapes, starts, locations, weights = cuda_inputs
    crowded = type(cuda_inputs)(features, shapes, starts, torch.full_like(locations, place), weights)
    expected = run(op.function, crowded)
    deterministic_algorithms(True)
    actual = run(op.function, crowded)
    rounding = (locations.numel() / 2) ** 0.5 * torch.finfo(locations.dtype).eps  # of sums over all samples
    for got, wanted in zip(actual, expected):
        assert relative_error(got, wanted) <= max(TOLERANCE[got.dtype], rounding)


@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("num_points", [3, 24])
@pytest.mark.parametrize("spread", [0, 0.2])
def test_crowds_are_put_in_order(op, deterministic_algorithms, num_points, spread):
    """Thousands of samples of one pixel, more than a block looks at; and so many that blocks merge theirs."""
    inputs = op.inputs(24, num_queries=4000, num_points=num_points, channels=8).to("cuda", torch.float32)
    features, shapes, starts, locations, weights = inputs
    crowded = type(inputs)(features, shapes, starts, 0.43 + spread * (locations - 0.5), weights)
    deterministic_algorithms(True)
    expected = run(op.function, crowded)
    for _ in range(20):
        assert_same_bits(run(op.function, crowded), expected)


@pytest.mark.cuda
def test_only_a_warning_asked_for(op, cuda_inputs, deterministic_algorithms):
    """The default kernels run, and agree."""
    expected = run(op.function, cuda_inputs)
    deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = run(op.function, cuda_inputs)
    for got, wanted in zip(actual, expected):
        assert relative_error(got, wanted) <= TOLERANCE[got.dtype]
