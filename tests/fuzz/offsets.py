"""Draws of attention from offsets and logits, and what a call must return: attention's rules, and the chain rule."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import reference
from tests.fuzz import rules
from tests.fuzz.drawing import OF_THE_EXTENSION, Draw
from tests.fuzz.rules import Expected, reshaped
from tests.fuzz.sampling import SamplingDrawing
from tests.ops.inputs import STEP, AttentionInputs, from_offsets, quantized
from tests.ops.table import FLOATING

RESULTS = (
    "output",
    "value's gradient",
    "reference points' gradient",
    "offsets' gradient",
    "logits' gradient",
)


class OffsetsDrawing(SamplingDrawing):
    """Operands are finite: what others do is tested one by one."""

    def draw(self) -> Draw:
        rng = self.rng
        self.dtype = rng.choice(FLOATING)
        result = Draw(self.op, rng.choice(self.backends), [], ())
        shapes, starts, num_rows, levels_fit = self.levels()
        sizes = self.sizes(shapes, num_rows)
        locations, _ = self.location(sizes["location"])
        locations = quantized(locations.nan_to_num(0, 2, -2).clamp(-3, 4))  # offsets hold no finer ones
        boxes, given = self.chance(0.5), self.chance(0.6)
        scale = tuple(2.0 ** -rng.randrange(4) for _ in range(self.num_levels)) if given else None
        numbers = from_offsets(
            AttentionInputs(self.normal(*sizes["features"]), shapes, starts, locations, self.normal(*sizes["weights"])),
            boxes=boxes,
            shared=self.num_levels == 0 or self.chance(0.3),
            scale=scale,
        )
        numbers[4] = numbers[4].nan_to_num(0, 1e3, -1e3).clamp(-1e5, 1e5)  # of sides that are no sides
        result.direct = result.backend in OF_THE_EXTENSION and self.chance(0.2)
        predicted = rng.choice([self.dtype, torch.float32]) if self.dtype != torch.float64 else torch.float64
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        metadata = self.place([self.lay_out(t, "metadata") for t in self.narrow(shapes, starts)])
        dtypes = (self.dtype, None, None, wide, predicted, predicted, wide)
        result.operands = [
            tensor if dtype is None or tensor is None else self.lay_out(tensor.to(dtype).to(self.device), name)
            for name, tensor, dtype in zip(self.op.names, [numbers[0], *metadata, *numbers[3:]], dtypes)
        ]
        result.exact_locations = are_exact(result.operands)
        result.needs = tuple(self.chance(0.75) for _ in self.op.differentiable)
        grad_output = self.normal(*sizes["output"]).to(self.dtype).to(self.device)
        result.grad_output = self.lay_out(grad_output, "grad_output")
        if not levels_fit and all(t.device.type == "cpu" for t in result.operands[1:3]):
            result.error = ValueError
        if self.chance(0.2):
            result.error = self.spoil(result.operands, result)
        if result.direct:
            self.story.append("called directly")
            result.error = result.error and (RuntimeError, TypeError)
        if result.backend == "cuda" and self.chance(0.4):
            result.deterministic = True
            self.story.append("deterministic")
        result.story = f"{str(self.dtype).removeprefix('torch.')} {sizes['features']} {'; '.join(self.story)}"
        return result


def are_exact(operands: list[Tensor | None]) -> bool:
    """Whether locations are exact in float32, whatever was rounded or expanded: multiples of a quarter of a step."""
    value, shapes, starts, references, offsets, _, scale = (t if t is None else t.cpu() for t in operands)
    num_points = offsets.shape[4]
    if references.shape[-1] == 4 and scale is None and num_points & (num_points - 1):
        return False  # the scale, 1 / P, is none of a power of two
    levels = reference.fitting_levels(shapes, starts, value.shape[1])[:, :2]
    quarters = reference.locations_from_offsets(levels, references, offsets, scale) * (4 / STEP)
    return torch.equal(quarters, quarters.round())


def expected(operands: list[Tensor | None], grad_output: Tensor) -> list[Expected]:
    """What the op must return for operands on the CPU: output, then four gradients."""
    value, shapes, starts, references, offsets, logits, scale = operands
    levels = reference.fitting_levels(shapes, starts, value.shape[1])[:, :2]
    locations = reference.locations_from_offsets(levels, references, offsets, scale)
    weights = torch.softmax(logits.double().flatten(3), -1).view(logits.shape)
    output, of_value, of_locations, of_weights = rules.ms_deform_attn(
        value, shapes, starts, locations, weights, grad_output
    )
    return [
        output,
        of_value,
        _of_references(of_locations, references, offsets, scale),
        _of_offsets(of_locations, levels, references, offsets, scale),
        _of_logits(of_weights, weights),
    ]


def _halved(offsets: Tensor, scale: Tensor | None) -> Tensor:
    """(L, 1, 1): half of each level's scale."""
    num_levels, num_points = offsets.shape[3:5]
    default = torch.full((num_levels,), 1 / max(num_points, 1), dtype=torch.float64)
    return (default if scale is None else scale.double())[:, None, None] / 2


def _of_offsets(of_locations: Expected, levels: Tensor, references: Tensor, offsets: Tensor, scale) -> Expected:
    if references.shape[-1] == 2:
        unit = 1 / levels.flip(-1).clamp(min=1).double()[:, None]
    else:
        unit = references.double()[:, :, None, :, None, 2:] * _halved(offsets, scale)
    return Expected(of_locations.value * unit, of_locations.magnitude * unit.abs(), of_locations.not_finite, 4 * 32)


def _of_references(of_locations: Expected, references: Tensor, offsets: Tensor, scale) -> Expected:
    moves = offsets.double() * _halved(offsets, scale)

    def summed(of_places: Tensor, moves: Tensor) -> Tensor:
        of_points = [of_places] if references.shape[-1] == 2 else [of_places, of_places * moves]
        total = torch.cat(of_points, -1).sum((2, 4))  # over heads and points
        return total if references.shape[2] == offsets.shape[3] else total.sum(2, keepdim=True)

    num_terms = of_locations.num_terms * max(offsets.shape[2:5].numel(), 1)
    return Expected(
        summed(of_locations.value, moves),
        summed(of_locations.magnitude, moves.abs()),
        summed(of_locations.not_finite.double(), torch.ones_like(moves)) > 0,
        num_terms,
    )


def _of_logits(of_weights: Expected, weights: Tensor) -> Expected:
    """More terms allow for what a softmax's weights are off by, some units in the last place of the logits."""

    def through(gradient: Tensor, sign: int) -> Tensor:
        return weights * (gradient + sign * (weights * gradient).sum((3, 4), keepdim=True))

    value, magnitude = through(of_weights.value, -1), through(of_weights.magnitude, 1)
    return reshaped(Expected(value, magnitude, of_weights.not_finite, of_weights.num_terms), torch.clone, num_terms=4)
