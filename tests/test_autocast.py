"""Autocast: locations stay in float32, outputs have the features' dtype, gradients have the parameters'."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reimplementation import ops
from reimplementation.models.deformable import aggregation
from tests.models.table import trainable
from tests.ops.agreement import assert_close, assert_same, run
from tests.ops.table import FLOATING, SAMPLING_OPS
from tests.reference import TOLERANCE, relative_error


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def half(request) -> torch.dtype:
    return request.param


def under_autocast(op, device: torch.device, half: torch.dtype):
    """The op's forward; backwards run outside of autocast, as PyTorch wants it."""

    def function(*operands):
        with torch.autocast(device.type, half):
            return op.function(*operands)

    return function


@pytest.mark.parametrize("first", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_op(op, backend_device, half, first):
    """The output is as without autocast, and each gradient has its operand's dtype, whatever autocast made of them."""
    rounded = [t.to(half) if t.is_floating_point() else t for t in op.random(21)]
    operands = [t.to(backend_device) for t in (rounded[0].to(first), *rounded[1:])]

    exact = [t.double() if t.is_floating_point() else t for t in (rounded[0].to(first), *rounded[1:])]
    toward = torch.randn(op.formula(*exact).shape, generator=torch.Generator().manual_seed(0)).to(half)
    output, *gradients = run(op, operands, toward, function=under_autocast(op, backend_device, half))
    expected_output, *expected = run(op, exact, toward, function=op.formula)
    assert output.dtype == op.output_dtype(first)
    assert relative_error(output.cpu(), expected_output) <= TOLERANCE[output.dtype]
    assert [gradient.dtype for gradient in gradients] == [operands[i].dtype for i in op.differentiable]
    assert_close(op, gradients, expected, max(TOLERANCE[half], TOLERANCE[first]))


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_an_op_takes_without_autocast_it_takes_with_it(op, backend_device, half, dtype):
    """And gives the same."""
    operands = op.on(backend_device, dtype, 14)
    expected = run(op, operands)
    actual = run(op, operands, function=under_autocast(op, backend_device, half))
    assert_same(op, actual, expected)
    assert torch.equal(actual[0], expected[0])


@pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)
def test_levels_without_pixels(op, backend_device, half):
    """There is nothing to sample, and no common dtype is asked for of halves that have none under autocast."""
    other = {torch.float16: torch.bfloat16, torch.bfloat16: torch.float16}[half]
    operands = op.on(backend_device, other, 22)
    operands[1] = torch.zeros_like(operands[1])
    for result in run(op, operands, function=under_autocast(op, backend_device, half)):
        assert not result.any()


def test_an_operator_called_under_autocast(op, kernels, half):
    """A compiler calls it without the Python function around it."""
    operands = op.on(kernels, torch.float32 if op.is_pointwise else half)
    operands = operands if op.is_pointwise else op.moved(operands, kernels, half)
    with torch.autocast(kernels.type, half):
        output = op.forward_call(operands)
    assert torch.equal(output, op.function(*op.moved(operands, kernels, operands[0].dtype)))


def test_what_a_module_gives_its_op(case, backend_device, half, monkeypatch):
    """Where its layers are called one by one."""
    monkeypatch.setattr(aggregation, "plain_tensors", lambda *_: None)
    original, seen = getattr(ops, case.op), []

    def spy(features, shapes, starts, places, *others):
        output = original(features, shapes, starts, places, *others)
        seen.append((places.dtype, output.dtype == features.dtype))
        return output

    monkeypatch.setattr(ops, case.op, spy)
    with torch.autocast(backend_device.type, half):
        case.call(case.trained(backend_device), case.operands_on(backend_device))
    assert seen == [(torch.float32, True)]


def test_gradients_of_a_module(case, backend_device, half):
    module, operands = case.trained(backend_device), case.operands_on(backend_device)
    leaves = [*operands[: case.num_leaves], *trainable(module)]
    expected_output = case.call(module, operands)
    grad_output = torch.randn(expected_output.shape, generator=torch.Generator().manual_seed(0)).to(backend_device)
    expected = torch.autograd.grad(expected_output, leaves, grad_output)
    with torch.autocast(backend_device.type, half):
        output = case.call(module, operands)
    for leaf, got, wanted in zip(leaves, torch.autograd.grad(output, leaves, grad_output.to(output.dtype)), expected):
        assert got.dtype == leaf.dtype
        # A few linear layers, each rounding its input and its output, and locations that moved a little.
        assert relative_error(got, wanted) <= 10 * TOLERANCE[half]


@pytest.mark.parametrize(("optimizer", "learning_rate"), [(torch.optim.SGD, 0.5), (torch.optim.AdamW, 1e-2)])
def test_training(case, backend_device, half, optimizer, learning_rate):
    """Steps towards another module's output stay finite, learn, and follow float32."""
    operands = case.operands_on(backend_device)
    target = case.call(case.trained(backend_device, seed=1), operands).detach()

    def train(autocast: bool):
        module = case.trained(backend_device)
        parameters = trainable(module)
        step = optimizer(parameters, lr=learning_rate)
        scaler = torch.amp.GradScaler(backend_device.type, enabled=autocast and half == torch.float16, init_scale=256.0)
        losses = []
        for _ in range(3):
            with torch.autocast(backend_device.type, half, enabled=autocast):
                loss = F.mse_loss(case.call(module, operands).float(), target)
            losses.append(loss.detach())
            step.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(step)
            scaler.update()
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in parameters)
        return torch.stack(losses)

    expected, actual = train(autocast=False), train(autocast=True)
    assert actual.isfinite().all()
    assert actual[-1] < actual[0]
    assert relative_error(actual, expected) <= TOLERANCE[half]
