"""Run one draw and hold what comes back against the rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from reimplementation import ops
from tests.fuzz import feature_aggregation, offsets, pointwise, rules
from tests.fuzz.drawing import Draw
from tests.fuzz.rules import RESULTS, Expected, rounding
from tests.ops.table import AGGREGATION, ATTENTION, ATTENTION_FROM_OFFSETS, FEATURE_AGGREGATION

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
        if not draw.direct and not any(name in str(error) for name in draw.op.names):
            raise Mismatch(f"the error names no argument: {error}") from error
        return REFUSED
    if draw.error is not None:
        raise Mismatch(f"{draw.error} expected, but it was accepted")
    for name, operand, copy in zip(draw.op.names, draw.operands, before):
        if operand is not None and not torch.equal(operand.nan_to_num(), copy.nan_to_num()):
            raise Mismatch(f"{name} was written to")
    comparison = {
        AGGREGATION.name: compare,
        ATTENTION.name: compare,
        ATTENTION_FROM_OFFSETS.name: compare_offsets,
        FEATURE_AGGREGATION.name: compare_formula,
    }
    comparison.get(draw.op.name, compare_pointwise)(draw, output, gradients)
    return ACCEPTED


def run(draw: Draw) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients that the draw asks for."""
    if draw.direct:
        return run_directly(draw)
    operands, leaves = list(draw.operands), []
    for i, needed in zip(draw.op.differentiable, draw.needs):
        if needed and draw.error is None and operands[i] is not None:
            operands[i] = operands[i].detach().requires_grad_()
            leaves.append(operands[i])
    device = draw.grad_output.device
    autocast = torch.autocast(device.type, draw.autocast) if draw.autocast else nullcontext()
    with ops.use_backend(draw.backend), autocast:
        output = draw.op.function(*operands)
    if output.device.type != device.type or output.shape != draw.grad_output.shape:
        raise Mismatch(f"the output is {tuple(output.shape)} on {output.device}")
    found = iter(())
    if leaves:
        with deterministic(draw.deterministic):
            found = iter(torch.autograd.grad(output, leaves, draw.grad_output))
    by_operand = [operands[i] for i in draw.op.differentiable]
    return output.detach(), [next(found) if any(leaf is each for each in leaves) else None for leaf in by_operand]


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
    output = draw.op.forward_call(draw.operands)
    flags = () if draw.op.is_pointwise else (*draw.needs, draw.deterministic)
    gradients = draw.op.backward_call(draw.grad_output, draw.operands, flags)
    gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
    there = [operand is not None for operand in (draw.operands[i] for i in draw.op.differentiable)]
    return output, [grad if need and is_there else None for grad, need, is_there in zip(gradients, draw.needs, there)]


def compare_pointwise(draw: Draw, output: Tensor, gradients: list[Tensor | None]) -> None:
    """With the formula in float64; where operands are not finite, results are not where the formula's are not."""
    operands = [draw.operands[i] for i in draw.op.differentiable]
    kept = [gradient for gradient, operand in zip(gradients, operands) if operand is not None]
    dtypes = [draw.op.output_dtype(draw.operands[0].dtype), *(t.dtype for t in operands if t is not None)]
    results, tolerances = pointwise.expected(draw.op, draw.operands, draw.grad_output)
    names = ("output", *(f"gradient of {draw.op.names[i]}" for i in draw.op.differentiable))
    all_finite = all(operand.isfinite().all() for operand in draw.operands if operand is not None)
    for name, actual, wanted, dtype, tolerance in zip(names, [output, *kept], results, dtypes, tolerances):
        if actual is None:
            continue
        if actual.dtype != dtype or actual.shape != wanted.shape:
            raise Mismatch(f"{name}: {actual.dtype} {tuple(actual.shape)} for {dtype} {tuple(wanted.shape)}")
        actual, finite = actual.cpu(), wanted.to(dtype).isfinite()
        if (actual.isfinite() & ~finite).any() or (all_finite and not torch.equal(actual.isfinite(), finite)):
            raise Mismatch(f"{name}: not finite elsewhere than the formula")
        if not all_finite:  # 0 * inf, which a formula may have and another way to write it not, is NaN
            continue
        assert_norm_close(name, actual[finite].double(), wanted[finite], dtype, tolerance)


def assert_norm_close(name: str, actual: Tensor, wanted: Tensor, dtype: torch.dtype, tolerance: float) -> None:
    """Within the tolerance and a rounding of the result, in the L2 norm."""
    error, size = (actual - wanted).norm().item(), wanted.norm().item()
    allowed = tolerance + torch.finfo(dtype).eps * size + torch.finfo(dtype).tiny * actual.numel()
    if not error <= allowed:
        raise Mismatch(f"{name}: L2 error {error:.1e} of {size:.1e}, allowed {allowed:.1e}")


def compare_formula(draw: Draw, output: Tensor, gradients: list[Tensor | None]) -> None:
    """With the formula in float64, of operands that are all finite."""
    places = [i for i in draw.op.differentiable if draw.operands[i] is not None]
    kept = [gradient for i, gradient in zip(draw.op.differentiable, gradients) if draw.operands[i] is not None]
    dtypes = [draw.operands[i].dtype for i in (0, *places)]
    results, tolerances = feature_aggregation.expected(draw.op, draw.operands, draw.grad_output)
    names = ["output", *(f"gradient of {draw.op.names[i]}" for i in places)]
    for name, actual, wanted, dtype, tolerance in zip(names, [output, *kept], results, dtypes, tolerances):
        if actual is None:
            continue
        if actual.dtype != dtype or actual.shape != wanted.shape:
            raise Mismatch(f"{name}: {actual.dtype} {tuple(actual.shape)} for {dtype} {tuple(wanted.shape)}")
        # What autograd adds in plain PyTorch, level by level, it rounds each time to the features' dtype.
        rounded = draw.operands[1].shape[1] if draw.backend == "grid_sample" else 0
        rounding = 4 * rounded * torch.finfo(draw.operands[0].dtype).eps * wanted.norm().item()
        assert_norm_close(name, actual.cpu().double(), wanted, dtype, tolerance + rounding)


def compare(draw: Draw, output: Tensor, gradients: list[Tensor | None]) -> None:
    features, shapes, starts, locations, weights = (operand.detach().cpu() for operand in draw.operands)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    read_weights = weights
    if draw.autocast and weights.dtype not in (features.dtype, torch.float32):
        read_weights = weights.to(features.dtype)
    grad_output = draw.grad_output.detach().cpu()
    rules_of = {AGGREGATION.name: rules.deformable_aggregation, ATTENTION.name: rules.ms_deform_attn}
    expected = rules_of[draw.op.name](features, shapes, starts, locations.to(compute), read_weights, grad_output)

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


def compare_offsets(draw: Draw, output: Tensor, gradients: list[Tensor | None]) -> None:
    operands = [operand if operand is None else operand.detach().cpu() for operand in draw.operands]
    compute = torch.float64 if operands[0].dtype == torch.float64 else torch.float32
    of_results = [operands[i] for i in (0, *draw.op.differentiable)]
    results = offsets.expected(operands, draw.grad_output.detach().cpu())
    for i, (actual, wanted, operand) in enumerate(zip([output, *gradients], results, of_results)):
        name = offsets.RESULTS[i]
        if actual is None:
            continue
        if actual.dtype != operand.dtype or tuple(actual.shape) != tuple(wanted.value.shape):
            raise Mismatch(f"{name}: {actual.dtype} {tuple(actual.shape)} for {tuple(wanted.value.shape)}")
        if not draw.exact_locations:
            continue  # a position that rounds across an edge of a pixel has another gradient
        rounded_sums = sums_in(draw, wanted, operands[1].shape[0]) if i == 1 else 0
        assert_close(name, actual.cpu().double(), wanted, rounding(wanted, compute, {actual.dtype}, rounded_sums))


def sums_in(draw: Draw, expected: Expected, num_levels: int) -> int:
    """How many partial sums of the features' gradient are rounded to its own dtype."""
    if draw.backend == "grid_sample":
        return num_levels + 1  # autograd adds the gradients of slices
    most_samples = {torch.float16: 32, torch.bfloat16: 8}.get(draw.operands[0].dtype)
    if draw.backend == "cuda" and draw.op.name in (ATTENTION.name, ATTENTION_FROM_OFFSETS.name) and most_samples:
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
    weight_dims = (2, 3, 4) if draw.op.name != ATTENTION.name else (3, 4)
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
