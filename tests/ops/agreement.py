"""Compare an op with the float64 formula: its output and its three gradients. See which operators a call takes."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation.bench.inputs import OpInputs
from tests.reference import TOLERANCE, relative_error


def run(function, inputs: OpInputs, grad_output=None):
    """Output and the gradients of features, locations and weights; the output's gradient is random but for its seed."""
    features, shapes, starts, location, weights = inputs
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (features, location, weights)]
    output = function(leaves[0], shapes, starts, leaves[1], leaves[2])
    if grad_output is None:
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad(output, leaves, grad_output.to(output))
    return output.detach(), *gradients


def assert_agrees(function, formula, inputs: OpInputs, device, dtype):
    """The op equals the float64 formula on the same, rounded, numbers."""
    inputs = inputs.to("cpu", dtype)
    exact = inputs.to("cpu", torch.float64)
    grad_output = torch.randn(formula(*exact).shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = run(formula, exact, grad_output)
    actual = run(function, inputs.to(device, dtype), grad_output)
    assert actual[0].dtype == dtype
    # A location's gradient is one sum over all channels, which rounds once a channel.
    channels = expected[0].shape[-1]
    rounding = channels**0.5 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    tolerance = max(TOLERANCE[dtype], rounding)
    for name, got, wanted in zip(("output", "features", "locations", "weights"), actual, expected):
        error = relative_error(got.cpu(), wanted)
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e} > {tolerance:.0e}"


def assert_second_derivatives_or_refusal(function, leaves):
    """Plain PyTorch has second derivatives, or says that it does not, as some releases do."""
    try:
        assert torch.autograd.gradgradcheck(function, leaves)
    except RuntimeError as error:
        assert "not implemented" in str(error)


class KernelCalls(TorchDispatchMode):
    """Records the names of our operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "reimplementation":
            self.names.append(func.name().removeprefix("reimplementation::"))
        return func(*args, **(kwargs or {}))
