"""Draws of deformable feature aggregation, and what a call must return: the formula's numbers.

Key points and cameras are such that every position is exact in float32: beside float64 nothing moves across the edge of
a pixel. What rounding may do to the rest is measured, as the formula of operands that are off by their last digit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from reimplementation import ops
from tests import reference
from tests.fuzz.drawing import OF_THE_EXTENSION, Draw
from tests.fuzz.sampling import MOST_PRODUCTS, SamplingDrawing
from tests.ops.agreement import run
from tests.ops.feature_aggregation_inputs import feature_aggregation_inputs
from tests.ops.table import FLOATING, Op

PERTURBATIONS = 2
CAMERAS = slice(3, 6)  # key points, projection, image sizes
STEEPEST = 32.0  # sides of levels are up to 16 pixels, depths from 1/2


class FeatureAggregationDrawing(SamplingDrawing):
    def draw(self) -> Draw:
        rng = self.rng
        self.dtype = rng.choice(FLOATING)
        result = Draw(self.with_settings(), rng.choice(self.backends), [], ())
        result.direct = result.backend in OF_THE_EXTENSION and self.chance(0.2)
        numbers, levels_fit = self.numbers(result.op.settings[0])
        result.operands = [
            operand if operand is None else self.in_some_dtype(i, operand, result.direct)
            for i, operand in enumerate(numbers)
        ]
        result.needs = tuple(self.chance(0.75) for _ in self.op.differentiable)
        features, logits = numbers[0], numbers[6]
        toward = self.normal(*logits.shape[:2], features.shape[2]).to(self.device, self.dtype)
        result.grad_output = self.lay_out(toward, "grad_output")
        if all(t.device.type == "cpu" for t in result.operands[1:3]) and not levels_fit:
            result.error = ValueError
        if not result.direct and self.chance(0.05):
            result.autocast = rng.choice([torch.bfloat16, torch.float16])
        self.refuse(result)
        result.deterministic = result.backend == "cuda" and self.chance(0.4)
        shapes = [tuple(t.shape) for t in numbers if t is not None]
        result.story = f"{str(self.dtype).removeprefix('torch.')} {shapes} {self.op.settings}; {'; '.join(self.story)}"
        return result

    def with_settings(self) -> Op:
        """The op with settings of the draw's own."""
        attn_drop, visible_only = self.rng.choice([0.0, 0.25, 0.5]), self.chance(0.3)
        settings = {"attn_drop": attn_drop, "visible_only": visible_only}
        self.op = replace(
            self.op,
            function=partial(ops.deformable_feature_aggregation, **settings),
            formula=partial(reference.deformable_feature_aggregation, **settings),
            settings=(attn_drop, visible_only),
        )
        return self.op

    def numbers(self, attn_drop: float) -> tuple[list[Tensor | None], bool]:
        """Operands in float64 on the CPU, with levels anywhere; and whether these fit the features."""
        shapes, starts, num_rows, levels_fit = self.levels()
        num_groups = self.rng.randint(1, 6)
        channels = num_groups * self.rng.choice([1, 2, 3, 4, 7, 8, 16, 30, 32])
        batch, points = self.count(3), self.count(4, many=40)
        most = MOST_PRODUCTS // max(1, 4 * batch * channels * points * self.num_cams * self.num_levels)
        made = feature_aggregation_inputs(
            self.rng.getrandbits(30),
            batch_size=batch,
            num_queries=min(self.count(6, many=100), max(1, most)),
            num_points=points,
            channels=channels,
            num_groups=num_groups,
            shapes=torch.ones(self.num_cams, self.num_levels, 2, dtype=torch.int64),
            by_camera=self.chance(0.6),
            attn_drop=attn_drop if self.chance(0.5) else None,
        )
        features = self.normal(batch, num_rows, channels)
        _, _, _, points, projection, sizes, *others, _, _ = made
        if self.chance(0.3):
            projection = projection / torch.tensor([16.0, 8, 1, 1], dtype=torch.float64)[:, None]
            sizes = None
        return [features, shapes, starts, points, projection, sizes, *others], levels_fit

    def in_some_dtype(self, which: int, operand: Tensor, direct: bool) -> Tensor:
        """Laid out somewhere, and where the op takes several dtypes, in one of them that holds its numbers."""
        if which in (1, 2):
            (narrowed, _) = self.narrow(operand, operand)
            return self.place([self.lay_out(narrowed, "metadata")])[0]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        if which in (3, 4, 5):
            operand = operand.to(wide if direct else self.rng.choice([torch.float32, torch.float64]))
        elif operand.is_floating_point():
            # The operators want both kinds of logits in one dtype, and in float64 beside such features.
            operand = operand.to(self.dtype if direct or which == 0 else self.rng.choice([self.dtype, wide]))
        return self.lay_out(operand.to(self.device), self.op.names[which])


def expected(op: Op, operands: Sequence, toward: Tensor) -> tuple[list[Tensor], list[float]]:
    """Output and gradients in float64, and how far rounding may take them, in the L2 norm."""
    exact = [t.detach().cpu() if isinstance(t, Tensor) else t for t in operands]
    exact = [t.double() if t is not None and t.is_floating_point() else t for t in exact]
    toward = toward.detach().cpu().double()
    results = run(op, exact, toward, function=op.formula)
    eps = torch.finfo(torch.float64 if operands[0].dtype == torch.float64 else torch.float32).eps
    generator, moved = torch.Generator().manual_seed(0), [0.0] * len(results)

    def off(place: int, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not tensor.is_floating_point() or place in range(CAMERAS.start, CAMERAS.stop):
            return tensor
        return tensor * (1 + eps * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))

    for _ in range(PERTURBATIONS):
        others = run(op, [off(i, t) for i, t in enumerate(exact)], toward, function=op.formula)
        moved = [max(most, (other - result).norm().item()) for most, other, result in zip(moved, others, results)]
    # Terms may cancel: those of a softmax's gradient do so where one weight is all there is, those of a key point's
    # where a camera has two equal rows. The latter are steeper by a level's side over a depth.
    terms = max(1, operands[0].shape[2]) ** 0.5
    largest = exact[0].abs().amax().item() if exact[0].numel() else 0.0
    cancelled = 16 * eps * terms * toward.norm().item() * largest
    magnitudes = [0.0, 0.0, STEEPEST * cancelled, cancelled, cancelled]
    tolerances = [64 * shift + 16 * terms * eps * result.norm().item() for shift, result in zip(moved, results)]
    return results, [tolerance + magnitude for tolerance, magnitude in zip(tolerances, magnitudes)]
