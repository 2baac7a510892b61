"""Run one draw and hold what comes back against the rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from reimplementation import ops
from tests.fuzz.draws import ATTENTION, Draw
from tests.fuzz.rules import RESULTS, Expected, rounding

ACCEPTED, REFUSED = "accepted", "refused as documented"


class Mismatch(AssertionError):
    """The op did not do what its rules say."""


def check(draw: Draw) -> str:
    """Run the draw; returns ACCEPTED or REFUSED, raises `Mismatch`."""
    before = [operand.clone() if isinstance(operand, Tensor) else None for operand in draw.operands]
    try:
        output, gradients = run(draw)
    except Exception as error:
        if draw.error is None or not isinstance(error, draw.error):
            wanted = f"{draw.error} expected, but it" if draw.error else "it"
            raise Mismatch(f"{wanted} raised {type(error).__name__}: {error}") from error
        if not draw.direct and not any(name in str(error) for name in draw.op.operands):
            raise Mismatch(f"the error names no argument: {error}") from error
        return REFUSED
    if draw.error is not None:
        raise Mismatch(f"{draw.error} expected, but it was accepted")
    for name, operand, copy in zip(draw.op.operands, draw.operands, before):
        if not torch.equal(operand.nan_to_num(), copy.nan_to_num()):
            raise Mismatch(f"{name} was written to")
    compare(draw, output, gradients)
    return ACCEPTED


def run(draw: Draw) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients that the draw asks for."""
    if draw.direct:
        return run_directly(draw)
    leaves = [draw.operands[i] for i in (0, 3, 4)]
    if any(draw.needs) and draw.error is None:
        leaves = [leaf.detach().requires_grad_(needed) for leaf, needed in zip(leaves, draw.needs)]
    operands = (leaves[0], *draw.operands[1:3], *leaves[1:])
    device = draw.grad_output.device
    autocast = torch.autocast(device.type, draw.autocast) if draw.autocast else nullcontext()
    with ops.use_backend(draw.backend), autocast:
        output = draw.op.function(*operands)
    if output.device.type != device.type or output.shape != draw.grad_output.shape:
        raise Mismatch(f"the output is {tuple(output.shape)} on {output.device}")
    gradients: list[Tensor | None] = [None] * 3
    if any(draw.needs):
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        with deterministic(draw.deterministic):
            found = iter(torch.autograd.grad(output, needed, draw.grad_output))
        gradients = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return output.detach(), gradients


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run_directly(draw: Draw) -> tuple[Tensor, list[Tensor | None]]:
    """The same from the registered operators."""
    output = getattr(torch.ops.reimplementation, draw.op.name)(*draw.operands)
    backward = getattr(torch.ops.reimplementation, f"{draw.op.name}_backward")
    gradients = backward(draw.grad_output, *draw.operands, *draw.needs, draw.deterministic)
    return output, [gradient if needed else None for gradient, needed in zip(gradients, draw.needs)]


def compare(draw: Draw, output: Tensor, gradients: list[Tensor | None]) -> None:
    features, shapes, starts, locations, weights = (operand.detach().cpu() for operand in draw.operands)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    read_weights = weights
    if draw.autocast and weights.dtype not in (features.dtype, torch.float32):
        read_weights = weights.to(features.dtype)
    grad_output = draw.grad_output.detach().cpu()
    expected = draw.op.rules(features, shapes, starts, locations.to(compute), read_weights, grad_output)

    operands = (features, locations, weights)
    for i, (name, actual, wanted) in enumerate(zip(RESULTS, [output, *gradients], expected)):
        if actual is None:
            continue
        operand = features if i == 0 else operands[i - 1]
        if actual.dtype != operand.dtype or tuple(actual.shape) != tuple(wanted.value.shape):
            raise Mismatch(f"{name}: {actual.dtype} {tuple(actual.shape)} for {tuple(wanted.value.shape)}")
        if i > 0 and not draw.exact_locations:
            continue  # a position that rounds across an edge of a pixel has another gradient
        rounded_sums = sums_in(draw, wanted, starts.numel()) if name == RESULTS[1] else 0
        stored = {actual.dtype, read_weights.dtype} if name == RESULTS[3] else {actual.dtype}
        tolerance = rounding(wanted, compute, stored, rounded_sums)
        if not draw.exact_locations:
            tolerance = tolerance + displacement(draw, features, shapes, locations, read_weights, compute)
        assert_close(name, actual.cpu().double(), wanted, tolerance)


def sums_in(draw: Draw, expected: Expected, num_levels: int) -> int:
    """How many partial sums of the features' gradient are rounded to its own dtype."""
    if draw.backend == "grid_sample":
        return num_levels + 1  # autograd adds the gradients of slices
    most_samples = {torch.float16: 32, torch.bfloat16: 8}.get(draw.operands[0].dtype)
    if draw.backend == "cuda" and draw.op is ATTENTION and most_samples:
        footprints = 2 + 2 * num_levels  # that a row is in, of so many samples each: 4 unless levels overlap
        return min(expected.num_terms, footprints * most_samples)
    return 0


def displacement(
    draw: Draw, features: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor, compute: torch.dtype
) -> float:
    """How far the output may be off because positions are rounded: bilinear interpolation is continuous."""
    if min(features.numel(), weights.numel(), shapes.numel()) == 0:
        return 0.0
    pixels = min(max(shapes.max().item(), 0), features.shape[1]) * (locations.abs().max().item() + 2)
    shift = 8 * torch.finfo(compute).eps * pixels
    weight_dims = (2, 3, 4) if draw.op is not ATTENTION else (3, 4)
    return 4 * shift * features.double().abs().max().item() * weights.double().abs().sum(weight_dims).max().item()


def assert_close(name: str, actual: Tensor, expected: Expected, tolerance: Tensor) -> None:
    """Within the tolerance where the rules promise a number; not finite where they promise that."""
    wrong = expected.magnitude.isfinite() & ~((actual - expected.value).abs() <= tolerance)
    wrong |= expected.not_finite & actual.isfinite()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise Mismatch(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; "
            f"at {place} {actual[place]:.9g} for {expected.value[place]:.9g}, allowed {tolerance[place]:.1e}"
        )
