"""What an op takes and gives: from its spec follow the checks, the dtypes that kernels read, and the fake kernels.

A spec names the operands in their order, with their dimensions, and the role of each. The role says its dtypes, which
depend on the dtype of the first operand: this one sets the op's device, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import check_device, check_dtype, check_shape
from .dtypes import FLOATING, HALF, INTEGER, as_dtype

Dtype = torch.dtype
Operands = Sequence[Any]  # tensors, None for one that is left out, and before the checks anything


@dataclass(frozen=True)
class Role:
    """What an operand is for. ``first`` is the dtype of the op's first operand, ``own`` the operand's.

    accepted: from ``first``, the dtypes that a caller may pass.
    read: from ``own`` and ``first``, the dtype in which kernels and formulas get it.
    under_autocast: from ``own`` and ``first``, the dtype that it gets under autocast before it is looked at; None where
        autocast changes nothing.
    advice: ends the error for a dtype that is not accepted.
    or_cpu: it may lie on the CPU, too, wherever the first operand lies.
    """

    accepted: Callable[[Dtype], tuple[Dtype, ...]]
    read: Callable[[Dtype, Dtype], Dtype]
    under_autocast: Callable[[Dtype, Dtype], Dtype] | None = None
    advice: str = ""
    or_cpu: bool = False


def _is_wide(first: Dtype) -> bool:
    return first == torch.float64


def _weights_under_autocast(own: Dtype, first: Dtype) -> Dtype:
    return first if own in FLOATING and own not in (first, torch.float32) else own


# Operands of ops that sample features. Sums run in float32, or float64 beside float64 features.
FEATURES = Role(lambda first: FLOATING, lambda own, first: own)
LEVELS = Role(lambda first: INTEGER, lambda own, first: own, or_cpu=True)
LOCATIONS = Role(
    lambda first: (torch.float32, torch.float64),
    lambda own, first: torch.float64 if _is_wide(first) else torch.float32,
    under_autocast=lambda own, first: torch.float32 if own in HALF else own,
    advice=": half precision cannot address a pixel, compute locations in float32",
)
WEIGHTS = Role(
    lambda first: (first,) if first == torch.float32 else (first, torch.float32),
    lambda own, first: first if _is_wide(first) else own,
    under_autocast=_weights_under_autocast,
)
# As weights, but autocast rounds none to another half dtype: they say where samples lie, and how they compare.
OFFSETS = LOGITS = Role(
    WEIGHTS.accepted,
    WEIGHTS.read,
    under_autocast=lambda own, first: torch.float32 if own in FLOATING and own != first else own,
)
MASK = Role(lambda first: (torch.bool,), lambda own, first: own)
# Operands of arithmetic on points, which all have one dtype there: at least float32.
REAL = Role(lambda first: FLOATING, lambda own, first: torch.promote_types(first, torch.float32))
NUMBERS = Role(lambda first: FLOATING + INTEGER, REAL.read)


@dataclass(frozen=True)
class Operand:
    """One operand of an op.

    dims: a name or a number for each dimension; equal names are equal sizes.
    gradient: the strides of the gradient that the kernels have of it: ``torch.contiguous_format``, or
        ``torch.preserve_format`` for the operand's own where these are dense; None where they have none.
    optional: it may be None.
    """

    name: str
    dims: tuple[str | int, ...]
    role: Role
    gradient: torch.memory_format | None = None
    optional: bool = False


@dataclass(frozen=True)
class Spec:
    """An op.

    name: of its operator, ``torch.ops.reimplementation.NAME``.
    title: what errors call it.
    operands: in the operator's order; the first is never optional.
    output: the shape of the output, from the sizes of the named dimensions. Its dtype is the one in which the first
        operand is read.
    settings: the names of what the op takes behind the operands and passes on as it is, numbers and bools.
    kept: likewise the shape of what the operator returns beside its output, for its backward alone; in float32, or
        float64 beside a first operand in that. None where it returns its output alone.
    check_sizes: raises ValueError where sizes are not what the op takes, beyond what the dims say.
    check_values: likewise for values that can be read without waiting for a GPU; takes the operands and the settings.
    is_pointwise: the op is elementwise arithmetic with a formula of standard operators. A compiler fuses that with what
        surrounds it, and an export should hold nothing else: whatever traces a call sees the formula, and it has the
        second derivatives, and the gradients that the kernels have not.
    """

    name: str
    title: str
    operands: tuple[Operand, ...]
    output: Callable[[Mapping[str, int]], Sequence[int]]
    settings: tuple[str, ...] = ()
    kept: Callable[[Mapping[str, int]], Sequence[int]] | None = None
    check_sizes: Callable[[Mapping[str, int]], None] = lambda sizes: None
    check_values: Callable[..., None] = lambda *operands: None
    is_pointwise: bool = False

    differentiable: tuple[int, ...] = field(init=False)
    """The places of the operands that the kernels have gradients of."""
    constants: tuple[int, ...] = field(init=False)
    """The places of the operands that may need a gradient and get it from the formula alone."""
    changes_under_autocast: bool = field(init=False)

    def __post_init__(self) -> None:
        """Work out now what follows: a compiler that traces the first call could not enter a cached property's lock."""
        roles = [operand.role for operand in self.operands]
        differentiable = tuple(i for i, operand in enumerate(self.operands) if operand.gradient is not None)
        floating = [i for i, role in enumerate(roles) if torch.float32 in role.accepted(torch.float32)]
        follows = {
            "differentiable": differentiable,
            "constants": tuple(i for i in floating if i not in differentiable),
            "changes_under_autocast": any(role.under_autocast is not None for role in roles),
        }
        for name, value in follows.items():
            object.__setattr__(self, name, value)  # as a frozen dataclass sets its own

    def check(self, operands: Operands) -> dict[str, int]:
        """The sizes of the named dimensions; raises TypeError or ValueError where the op does not take an operand."""
        present = [(op, tensor) for op, tensor in zip(self.operands, operands) if not (op.optional and tensor is None)]
        first = operands[0]
        dtype = first.dtype if isinstance(first, Tensor) else torch.float32  # the first check says that it is no tensor
        for operand, tensor in present:
            check_dtype(operand.name, tensor, operand.role.accepted(dtype), operand.role.advice)
        for operand, tensor in present:
            check_device(operand.name, tensor, first.device, operand.role.or_cpu)
        sizes: dict[str, int] = {}
        for operand, tensor in present:
            check_shape(operand.name, tensor, operand.dims, sizes)
        self.check_sizes(sizes)
        return sizes

    def check_call(self, operands: Operands, settings: Sequence = ()) -> None:
        """`check`, and the values as well: for operands that have some."""
        self.check(operands)
        self.check_values(*operands, *settings)

    def as_read(self, operands: Operands) -> tuple:
        """Operands that passed the checks, in the dtypes that kernels and formulas know."""
        return self._cast(operands, [operand.role.read for operand in self.operands])

    def under_autocast(self, operands: Operands) -> tuple:
        """The operands in dtypes that the op takes beside its first, whatever autocast made of them."""
        return self._cast(operands, [operand.role.under_autocast for operand in self.operands])

    def is_read(self, dtypes: Sequence[Any]) -> bool:
        """Whether kernels read operands of these dtypes as they are."""
        roles = [operand.role for operand in self.operands]
        return all([own is None or own == role.read(own, dtypes[0]) for role, own in zip(roles, dtypes)])

    def check_as_read(self, operands: Operands) -> dict[str, int]:
        """`check`, and that the operands have the dtypes that kernels read: what an operator asks of them."""
        sizes = self.check(operands)
        dtypes = dtypes_of(operands)
        if not self.is_read(dtypes):
            expected = [
                f"{operand.name} {operand.role.read(own, dtypes[0])}"
                for operand, own in zip(self.operands, dtypes)
                if own is not None
            ]
            raise TypeError(f"operands must have the dtypes {', '.join(expected)}; got {dtypes}")
        return sizes

    def check_gradient(self, grad_output: Any, operands: Operands) -> None:
        """`check_as_read`, and that the gradient is one of the output that these operands have."""
        shape = tuple(self.output(self.check_as_read(operands)))
        check_dtype("grad_output", grad_output, (operands[0].dtype,))
        check_device("grad_output", grad_output, operands[0].device)
        if tuple(grad_output.shape) != shape:
            raise ValueError(f"grad_output must be {shape}; got {tuple(grad_output.shape)}")

    def fake(self, operands: Operands) -> Any:
        """Empty tensors like those that a kernel makes of these operands; raises where it would refuse them."""
        sizes = self.check_as_read(operands)
        output = operands[0].new_empty(tuple(self.output(sizes)))
        if self.kept is None:
            return output
        dtype = torch.promote_types(output.dtype, torch.float32)
        return output, output.new_empty(tuple(self.kept(sizes)), dtype=dtype)

    def output_of(self, returned: Any) -> Tensor:
        """The output in what the operator returned."""
        return returned if self.kept is None else returned[0]

    def fake_gradients(self, grad_output: Tensor, operands: Operands, needed: Sequence[bool]) -> tuple[Tensor, ...]:
        """Empty tensors like the gradients of the `differentiable` operands; of no element where none is needed."""
        self.check_gradient(grad_output, operands)
        first = operands[0]
        return tuple(
            torch.empty_like(operands[i], memory_format=self.operands[i].gradient)
            if needs and operands[i] is not None
            else first.new_empty(0, dtype=first.dtype if operands[i] is None else operands[i].dtype)
            for i, needs in zip(self.differentiable, needed)
        )

    def _cast(self, operands: Operands, rules: Sequence[Callable | None]) -> tuple:
        first = operands[0].dtype
        return tuple(
            as_dtype(tensor, rule(tensor.dtype, first)) if rule is not None and isinstance(tensor, Tensor) else tensor
            for tensor, rule in zip(operands, rules)
        )


def dtypes_of(operands: Operands) -> tuple:
    return tuple([tensor if tensor is None else tensor.dtype for tensor in operands])
