"""Autocast: locations stay in float32, outputs have the features' dtype, gradients have the parameters'."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from reimplementation import ops
from tests.models.cases import trainable
from tests.ops.agreement import run
from tests.reference import TOLERANCE, relative_error

OP_OF = {"DeformableFeatureAggregation": "deformable_aggregation_function", "MSDeformAttn": "ms_deform_attn"}


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def half(request) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("features_in_half", [True, False])
def test_gradients_of_an_op(op, backend_device, half, features_in_half):
    """Each gradient has its operand's dtype, whatever the op cast the operand to."""
    inputs = op.inputs(21).to("cpu", half)
    features, *rest = inputs.to(backend_device, half)
    features = features if features_in_half else features.float()
    _, _, locations, weights = rest

    def under_autocast(*operands):
        with torch.autocast(backend_device.type, half):
            return op.function(*operands)

    exact = inputs.to("cpu", torch.float64)
    grad_output = torch.randn(op.formula(*exact).shape, generator=torch.Generator().manual_seed(0)).to(half)
    output, *gradients = run(under_autocast, (features, *rest), grad_output)
    assert output.dtype == features.dtype
    _, *expected = run(op.formula, exact, grad_output)
    for operand, got, wanted in zip((features, locations, weights), gradients, expected):
        assert got.dtype == operand.dtype
        assert relative_error(got.cpu(), wanted) <= TOLERANCE[half]


def test_what_a_module_gives_its_op(case, backend_device, half, monkeypatch):
    name = OP_OF[case.name]
    original, seen = getattr(ops, name), []

    def spy(features, shapes, starts, locations, weights):
        output = original(features, shapes, starts, locations, weights)
        seen.append((locations.dtype, output.dtype == features.dtype))
        return output

    monkeypatch.setattr(ops, name, spy)
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
