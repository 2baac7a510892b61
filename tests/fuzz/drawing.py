"""Draws: calls of the ops at random, each of them derived from a seed and its number alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tests.ops.table import FLOATING, INTEGER, Op

OF_THE_EXTENSION = ("cuda", "cpu")  # the backends whose operators are called directly
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


@dataclass
class Draw:
    """One call: operands in the op's order, on their devices, and what is expected of it."""

    op: Op
    backend: str
    operands: list
    needs: tuple[bool, ...]  # which gradients are asked for, of those that the kernel has
    grad_output: Tensor | None = None
    autocast: torch.dtype | None = None
    direct: bool = False  # the registered operators are called, without the Python function's checks
    deterministic: bool = False  # the backward that gives the same bits every time
    exact_locations: bool = True  # pixel positions have no rounding error
    error: type[Exception] | tuple[type[Exception], ...] | None = None
    story: str = ""  # what was drawn, in words


class Drawing:
    """What draws of every op share: random numbers, where they lie in memory, and what must be refused."""

    def __init__(self, op: Op, rng: random.Random, device: torch.device, backends: Sequence[str]):
        self.op = op
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))
        self.device = device
        self.backends = backends
        self.story: list[str] = []

    def draw(self) -> Draw:
        raise NotImplementedError

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    # Sizes and numbers.

    def count(self, usual: int, many: int | None = None) -> int:
        """A size: mostly small, now and then zero or ``many``."""
        if self.chance(0.02):
            return 0
        if many is not None and self.chance(0.1):
            return self.rng.randint(usual, many)
        return self.rng.randint(1, usual)

    def sprinkle(self, tensor: Tensor, values: tuple[float, ...], density: float) -> None:
        """Replace elements, each with the given probability, by some of the values."""
        chosen = torch.rand(tensor.shape, generator=self.generator) < density
        index = torch.randint(len(values), tensor.shape, generator=self.generator)
        tensor[chosen] = torch.tensor(values, dtype=torch.float64)[index][chosen]

    def poison(self, tensor: Tensor) -> None:
        values = self.rng.choice([NOT_FINITE[:1], NOT_FINITE[1:], NOT_FINITE])
        self.story.append(f"{'/'.join(map(str, values))} among {tuple(tensor.shape)}")
        self.sprinkle(tensor, values, self.rng.choice([0.005, 0.1]))

    # Layouts: the same numbers elsewhere in memory, amid NaNs that whoever reads out of bounds brings in.

    def lay_out(self, tensor: Tensor, name: str) -> Tensor:
        kinds = ["contiguous", "offset", "permuted", "sliced"]
        if name != "metadata":
            kinds += ["expanded"]
        if name != "metadata" and tensor.dtype in (torch.float32, torch.float64):
            kinds += ["negated"]
        kind = self.rng.choice(["contiguous"] * 3 + kinds)
        if kind == "contiguous" or tensor.dim() == 0:
            return tensor
        self.story.append(f"{name} {kind}")
        junk = float("nan") if tensor.is_floating_point() else 77
        if kind == "offset":
            offset = self.rng.randint(1, 7)
            buffer = tensor.new_full((tensor.numel() + 2 * offset,), junk)
            return buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
        if kind == "permuted":
            order = self.rng.sample(range(tensor.dim()), tensor.dim())
            inverse = [order.index(i) for i in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(inverse)
        dim = self.rng.randrange(tensor.dim())
        size = tensor.shape[dim]
        if kind == "sliced":
            buffer = tensor.new_full([*tensor.shape[:dim], 2 * size + 1, *tensor.shape[dim + 1 :]], junk)
            view = buffer.narrow(dim, 1, 2 * size)[(slice(None),) * dim + (slice(None, None, 2),)]
            return view.copy_(tensor)
        if kind == "expanded":
            return tensor.narrow(dim, 0, 1).expand(tensor.shape) if size else tensor
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag  # the negative is taken when it is read

    # What must be refused.

    def refuse(self, result: Draw) -> None:
        """Now and then make something wrong of a draw that is complete but for that, and say what must come of it."""
        if self.chance(0.2):
            result.error = self.spoil(result.operands, result)
        elif result.direct and self.chance(0.1):
            wrong = getattr(self, self.rng.choice(["wrong_rank", "wrong_grad_size"]))
            result.grad_output, _ = wrong(0, result.grad_output)
            result.error = RuntimeError
        if result.direct:
            self.story.append("called directly")
            result.error = result.error and (RuntimeError, TypeError)

    def spoil(self, operands: list, result: Draw) -> type[Exception]:
        """Make one operand wrong; returns the error that the ops document for it."""
        which = self.rng.choice([i for i, operand in enumerate(operands) if operand is not None])
        kinds = ["not a tensor", "dtype", "rank", "layout"]
        if None not in operands:  # by what is left out, sizes of others may be free
            kinds.append("size")
        # Of the operators, a meta tensor asks for a shape alone, and that is what they return.
        kind = self.rng.choice(kinds if result.direct else [*kinds, "device"])
        if kind == "not a tensor":
            about = self.op.operands[which]
            others = [1.5, "tensor", np.zeros(3), *([] if about.optional else [None]), [1, 2]]
            operands[which] = got = self.rng.choice([other for other in others if type(other) not in about.also])
            error = TypeError
        else:
            result.autocast = None  # which casts some of what follows
            first = operands[0].dtype
            for i, (about, operand) in enumerate(zip(self.op.operands, operands)):
                if operand is not None and operand.dtype not in about.dtypes(first):
                    operands[i] = operand.to(first if first in about.dtypes(first) else torch.float32)
            spoilt, error = getattr(self, f"wrong_{kind}")(which, operands[which])
            operands[which] = spoilt
            got = f"{spoilt.dtype} {tuple(spoilt.shape)} on {spoilt.device}"
        self.story.append(f"{self.op.names[which]} of wrong {kind}: {got}")
        return error

    def wrong_dtype(self, which: int, operand: Tensor) -> tuple[Tensor, type[Exception]]:
        taken = {*self.op.operands[which].dtypes(self.dtype), *self.op.operands[which].also}
        wrong = [dtype for dtype in (*FLOATING, *INTEGER, torch.bool, torch.complex64) if dtype not in taken]
        return torch.zeros_like(operand, dtype=self.rng.choice(wrong)), TypeError

    def wrong_rank(self, which: int, operand: Tensor) -> tuple[Tensor, type[Exception]]:
        changes = [operand[None], operand[..., None], operand.sum().to(operand.dtype)]
        if operand.dim() > 1:
            changes.append(operand.flatten(0, 1))
        return self.rng.choice(changes), ValueError

    def wrong_size(self, which: int, operand: Tensor) -> tuple[Tensor, type[Exception]]:
        """One dimension is not what another operand says; those that no other operand knows are left alone."""
        about = self.op.operands[which]
        dim = self.rng.choice(about.tied)
        size = self.rng.choice([n for n in (0, 1, operand.shape[dim] + 1) if n != operand.shape[dim]])
        shape = [*operand.shape[:dim], size, *operand.shape[dim + 1 :]]
        return operand.new_zeros(shape), ValueError

    def wrong_grad_size(self, which: int, operand: Tensor) -> tuple[Tensor, type[Exception]]:
        dim = self.rng.randrange(operand.dim())
        return operand.new_zeros([size + (i == dim) for i, size in enumerate(operand.shape)]), ValueError

    def wrong_device(self, which: int, operand: Tensor) -> tuple[Tensor, type[Exception]]:
        may_be_on_cpu = self.device.type == "cpu" or which == 0 or self.op.operands[which].any_device
        elsewhere = ["meta"] if may_be_on_cpu else ["meta", "cpu"]
        return operand.to(self.rng.choice(elsewhere)), ValueError

    def wrong_layout(self, which: int, operand: Tensor) -> tuple[Tensor, type[Exception]]:
        return operand.to_sparse(), TypeError
