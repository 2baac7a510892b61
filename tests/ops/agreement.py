"""Run an op with its gradients, compare it with its float64 formula, and see which operators a call takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.table import HALF, Op
from tests.reference import TOLERANCE, relative_error


def leaves_of(op: Op, operands: list[Tensor | None]) -> list[Tensor]:
    """Detaches the operands that the kernel has gradients of, in their list, and makes them need one."""
    leaves = []
    for i in op.differentiable:
        if operands[i] is not None:
            operands[i] = operands[i].detach().requires_grad_()
            leaves.append(operands[i])
    return leaves


def of_leaves(op: Op, operands: Sequence[Tensor | None]) -> Callable[..., Tensor]:
    """The op as a function of what its kernel differentiates."""
    places = [i for i in op.differentiable if operands[i] is not None]

    def function(*leaves):
        replaced = dict(zip(places, leaves))
        return op.function(*(replaced.get(i, operand) for i, operand in enumerate(operands)))

    return function


def run(op: Op, operands: Sequence[Tensor | None], toward: Tensor | None = None, *, function=None) -> list[Tensor]:
    """The output, and the gradients of what the kernel differentiates, towards a random direction or the one given.

    function: instead of the op's own, such as its formula. The operands are read where they lie.
    """
    operands = list(operands)
    leaves = leaves_of(op, operands)
    output = (function or op.function)(*operands)
    if toward is None:
        toward = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, toward.to(output))]


def assert_agrees(op: Op, operands: Sequence[Tensor | None], device, dtype: torch.dtype) -> None:
    """The op equals its float64 formula on the same, rounded, numbers: its output, and every gradient."""
    rounded = op.moved(operands, "cpu", dtype)
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in rounded]
    toward = torch.randn(op.formula(*exact).shape, generator=torch.Generator().manual_seed(9))
    toward = toward.to(op.output_dtype(dtype))
    expected = run(op, exact, toward, function=op.formula)
    actual = run(op, op.moved(rounded, device, dtype), toward)
    assert actual[0].dtype == op.output_dtype(dtype)
    assert_close(op, actual, expected, tolerance_of(op, dtype, channels=expected[0].shape[-1]))


def tolerance_of(op: Op, dtype: torch.dtype, channels: int) -> float:
    """Of the relative L2 error beside float64."""
    if op.is_pointwise and not op.has_products and dtype not in HALF:
        return 8 * torch.finfo(dtype).eps  # a few roundings; there are no long sums
    # A location's gradient is one sum over all channels, which rounds once a channel.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return max(TOLERANCE[dtype], channels**0.5 * torch.finfo(wide).eps / 2)


def assert_close(op: Op, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """What `run` returned has these shapes, and in each a relative L2 error of at most the tolerance."""
    for i, (got, wanted) in enumerate(zip(actual, expected, strict=True)):
        name = f"gradient {i}" if i else "output"
        assert got.shape == wanted.shape, f"{op.name}, {name}: {tuple(got.shape)} for {tuple(wanted.shape)}"
        got, wanted = got.cpu(), wanted.cpu()
        beyond = wanted.to(got.dtype).isinf()  # what the dtype cannot hold
        assert torch.equal(got.isinf(), beyond), f"{op.name}, {name}: infinite elsewhere than expected"
        error = relative_error(got.masked_fill(beyond, 0), wanted.masked_fill(beyond, 0))
        assert error <= tolerance, f"{op.name}, {name}: relative L2 error {error:.2e} > {tolerance:.0e}"


def assert_same(op: Op, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Two runs on the same numbers: the same bits, but for sums whose order no one asked for."""
    exact = op.is_pointwise and not op.has_products
    assert_close(op, actual, expected, 0 if exact else TOLERANCE[expected[0].dtype])


class KernelCalls(TorchDispatchMode):
    """Records the calls of our operators, of the extension or of Triton: their names, and the arguments of each."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[tuple] = []

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        if func.namespace in ("reimplementation", "reimplementation_triton"):
            self.names.append(func.name().partition("::")[2])
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))

    def needs_of(self, op: Op) -> list[tuple[bool, ...]]:
        """Which gradients each call of the op's backward was asked for."""
        first = 1 + len(op.operands) + op.keeps + len(op.settings)  # behind the output's gradient, and all else
        calls = zip(self.names, self.arguments)
        return [args[first : first + len(op.differentiable)] for name, args in calls if name == f"{op.name}_backward"]
