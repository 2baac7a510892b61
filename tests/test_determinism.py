"""The same bits every time: forward everywhere, gradients on the CPU, and on a GPU where PyTorch is told so."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.ops.agreement import assert_close, run
from tests.ops.table import FLOATING, SAMPLING_OPS
from tests.reference import TOLERANCE

RUNS = 100

sampling = pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)


@pytest.fixture(params=FLOATING, ids=str)
def operands(request, op) -> list:
    """Work enough for eight threads; to a sampling op, many queries to each pixel."""
    return op.on("cpu", request.param, 22, **op.many)


@pytest.fixture
def cuda_operands(operands, cuda_kernels) -> list:
    return [operand.cuda() for operand in operands]


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
    for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(got, wanted), f"gradient {i} differs" if i else "the output differs"


def test_any_number_of_threads(op, operands, threads):
    threads(1)
    expected = run(op, operands)
    for count in (1, 2, 3, 5, 8):
        threads(count)
        for _ in range(2):
            assert_same_bits(run(op, operands), expected)


def test_the_forward_on_every_backend(op, backend_device):
    """grid_sample's too, whose gradients PyTorch adds up in any order."""
    operands = op.on(backend_device, torch.float32, 6, num_queries=200)
    first = op.function(*operands)
    assert all(torch.equal(first, op.function(*operands)) for _ in range(5))


@pytest.mark.cuda
def test_forward_on_a_gpu(op, cuda_operands):
    expected = op.function(*cuda_operands)
    assert all(torch.equal(op.function(*cuda_operands), expected) for _ in range(RUNS))


@pytest.mark.cuda
def test_deterministic_gradients_on_a_gpu(op, cuda_operands, deterministic_algorithms):
    """A pointwise op's are so in any case."""
    default = run(op, cuda_operands)
    deterministic_algorithms(True)
    expected = run(op, cuda_operands)
    for _ in range(RUNS):
        assert_same_bits(run(op, cuda_operands), expected)
    assert_close(op, expected, default, 0 if op.is_pointwise else TOLERANCE[expected[0].dtype])


@sampling
@pytest.mark.cuda
@pytest.mark.parametrize("place", [0.3, 0.43, 0.5, 0.56, 0.69])
def test_every_sample_in_one_place(op, cuda_operands, deterministic_algorithms, place):
    """The kernels that share out the work on crowded pixels have all of it to share, at a tile's border or within."""
    features, shapes, starts, locations, weights = cuda_operands
    crowded = [features, shapes, starts, torch.full_like(locations, place), weights]
    expected = run(op, crowded)
    deterministic_algorithms(True)
    rounding = (locations.numel() / 2) ** 0.5 * torch.finfo(locations.dtype).eps  # of sums over all samples
    assert_close(op, run(op, crowded), expected, max(TOLERANCE[features.dtype], rounding))


@sampling
@pytest.mark.cuda
@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("num_points", [3, 24])
@pytest.mark.parametrize("spread", [0, 0.2])
def test_crowds_are_put_in_order(op, deterministic_algorithms, num_points, spread):
    """Thousands of samples of one pixel, more than a block looks at; and so many that blocks merge theirs."""
    features, shapes, starts, locations, weights = op.on(
        "cuda", torch.float32, 24, num_queries=4000, num_points=num_points, channels=8
    )
    crowded = [features, shapes, starts, 0.43 + spread * (locations - 0.5), weights]
    deterministic_algorithms(True)
    expected = run(op, crowded)
    for _ in range(20):
        assert_same_bits(run(op, crowded), expected)


@pytest.mark.cuda
def test_only_a_warning_asked_for(op, cuda_operands, deterministic_algorithms):
    """The default kernels run, and agree."""
    expected = run(op, cuda_operands)
    deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = run(op, cuda_operands)
    assert_close(op, actual, expected, TOLERANCE[expected[0].dtype])
