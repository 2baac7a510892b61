"""Draws of the pointwise ops, and what a call must return: the formula's numbers, as far as its operands are known."""

from __future__ import annotations

import torch
from torch import Tensor

from reimplementation import ops
from tests.fuzz.drawing import OF_THE_EXTENSION, Draw, Drawing
from tests.ops.agreement import run
from tests.ops.table import FLOATING, OPS, Op

PERTURBATIONS = 4
FUNCTIONS = {op.name: op.function for op in OPS}  # a wrong op is judged by the right one


class PointwiseDrawing(Drawing):
    def draw(self) -> Draw:
        rng = self.rng
        result = Draw(self.op, rng.choice(self.backends), [], ())
        result.direct = self.direct = result.backend in OF_THE_EXTENSION and self.chance(0.2)
        self.dtype = rng.choice(self.op.kernel_dtypes if result.direct else FLOATING)
        sizes = {name: self.count(4, many=40) for name in self.op.sizes}
        numbers = list(self.op.random(rng.getrandbits(30), **sizes))
        if self.chance(0.15):
            self.poison(rng.choice(numbers))
        result.operands = [self.lay_out_in_some_dtype(i, operand) for i, operand in enumerate(numbers)]
        for i, about in enumerate(self.op.operands):
            if about.optional and self.chance(0.3):
                result.operands[i] = None
        result.needs = tuple(self.chance(0.75) for _ in self.op.differentiable)
        shape = self.op.formula(*as_read(self.op, result.operands)).shape
        toward = self.normal(*shape).to(self.device, self.op.output_dtype(self.dtype))
        result.grad_output = self.lay_out(toward, "grad_output")
        if not result.direct and self.chance(0.05):
            result.autocast = rng.choice([torch.bfloat16, torch.float16])
        self.refuse(result)
        result.story = f"{str(self.dtype).removeprefix('torch.')} {sizes}; {'; '.join(self.story)}"
        return result

    def lay_out_in_some_dtype(self, which: int, operand: Tensor) -> Tensor:
        """The first operand in the drawn dtype, another in any that it may have; the operators take one for all."""
        dtypes = (self.dtype,) if which == 0 or self.direct else self.op.operands[which].dtypes(self.dtype)
        dtype = self.rng.choice(dtypes)
        if not dtype.is_floating_point:
            operand = operand.nan_to_num(2, 2, 2)
        return self.lay_out(operand.to(dtype).to(self.device), self.op.names[which])


def as_read(op: Op, operands: list[Tensor | None]) -> list[Tensor | None]:
    """In float64 on the CPU, rounded as the op rounds them."""
    compute = op.output_dtype(operands[0].dtype)
    return [operand if operand is None else operand.detach().cpu().to(compute).double() for operand in operands]


def expected(op: Op, operands: list[Tensor | None], toward: Tensor) -> tuple[list[Tensor], list[float]]:
    """Output and gradients in float64, and how far rounding may take them, in the L2 norm.

    The op is as good as plain PyTorch is in its precision, with operands and an output's gradient that are off by their
    last digit: how far off that is is measured.
    """
    exact = as_read(op, operands)
    toward = toward.detach().cpu().double()
    results = run(op, exact, toward, function=op.formula)
    precision = op.output_dtype(operands[0].dtype)
    eps = torch.finfo(precision).eps
    generator = torch.Generator().manual_seed(0)
    moved = [0.0] * len(results)
    for _ in range(PERTURBATIONS):
        *others, other_toward = (
            t if t is None else (t * (1 + eps * torch.randn(t.shape, generator=generator, dtype=t.dtype))).to(precision)
            for t in (*exact, toward)
        )
        with ops.use_backend("grid_sample"):
            rounded = run(op, others, other_toward, function=FUNCTIONS[op.name])
        for i, result in enumerate(rounded):
            moved[i] = max(moved[i], (result.double() - results[i]).norm().item())
    return results, [16 * shift + 8 * eps * result.norm().item() for shift, result in zip(moved, results)]
