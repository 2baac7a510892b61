"""How a module of somebody else's class gets our forward: it becomes an instance of a subclass of its class.

The module stays the same object, with its parameters, buffers, hooks and settings, and still is an instance of its
class. Nothing else changes: neither the class, nor other instances, nor the names in a state dict.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .probe import Probe

Needed = Any
"""What a forward needs, although its signature, which is that of the original, lets it be left out."""
SAME = 1e-5
"""The relative difference in float64 below which two forwards compute the same; some round to float32 on their way."""


class Accelerated(nn.Module):
    """What the classes of this package that stand in for somebody else's have in common.

    A subclass holds the forward, with the parameters of the one that it stands in for, and says by what a module is
    recognised. It is never made by itself: see `accelerated_class`.
    """

    names: ClassVar[tuple[str, ...]]
    """What the class is called, with wildcards."""
    attributes: ClassVar[tuple[str, ...]]
    """What the forward reads of the module."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Parameters of the other forward that change nothing."""
    incomparable: ClassVar[str | None] = None
    """Why the two forwards cannot be compared on a CPU; None where they can."""

    if TYPE_CHECKING:  # what a module of somebody else's holds, nobody has declared

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def probes(cls, module: Any, probe: Probe) -> Iterator[dict[str, Any]]:
        """Arguments with which both forwards are called, to see that they compute the same."""
        raise NotImplementedError

    @classmethod
    def has_name_of(cls, module: nn.Module) -> bool:
        return any(fnmatchcase(parent.__name__, name) for parent in type(module).__mro__ for name in cls.names)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module that has the name does not have the form; None if it has."""
        if "forward" in vars(module):
            return "its forward has been replaced on the instance"
        theirs, ours = _parameters(type(module).forward), _parameters(cls.forward)
        if [name for name in theirs if name not in cls.ignored] != [name for name in ours if name not in cls.ignored]:
            return f"its forward takes ({', '.join(theirs)}), and not ({', '.join(ours)})"
        missing = [name for name in cls.attributes if not hasattr(module, name)]
        return f"it has no {', '.join(missing)}" if missing else None

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles name the two classes, and make the subclass again."""
        kind, original = type(self).__bases__
        own_state = getattr(self, "__getstate__", None)  # every object has it from Python 3.11 on
        return _empty, (kind, original), vars(self) if own_state is None else own_state()


@cache
def accelerated_class(kind: type[Accelerated], original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of both, under the name of the original, by which others look for it."""
    named = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": kind.__doc__}
    return types.new_class(original.__name__, (kind, original), exec_body=lambda namespace: namespace.update(named))


def replace_forward(kind: type[Accelerated], module: nn.Module) -> None:
    module.__class__ = accelerated_class(kind, type(module))  # type: ignore[arg-type]  # classes are hashable


def restore_forward(module: nn.Module) -> None:
    """Undo `replace_forward`; a module that is of another class by now is left alone."""
    if isinstance(module, Accelerated):
        module.__class__ = type(module).__bases__[1]


def difference(kind: type[Accelerated], module: nn.Module) -> float | str:
    """How far the two forwards are apart on small random inputs, in float64 on the CPU, on a copy of the module.

    Returns the largest relative difference, or why the original does not run there. What our forward raises is passed
    on, since the module does not have the form that was expected.
    """
    if kind.incomparable is not None:
        return kind.incomparable
    probe = Probe()
    try:
        original = copy.deepcopy(module).to("cpu", torch.float64).eval()
        ours = copy.deepcopy(original)
        replace_forward(kind, ours)
        ours.register_forward_hook(lambda *_: None)  # without any, nobody would look at attention weights
        for theirs, mine in zip(original.parameters(), ours.parameters()):
            theirs.data = mine.data = probe.normal(*theirs.shape)
    except Exception as error:
        return f"no copy can be made of it: {_first_line(error)}"
    largest = 0.0
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for arguments in kind.probes(module, probe):
            try:
                expected = _tensors(type(original).forward(original, **arguments))
            except Exception as error:
                return f"its forward does not run on this CPU: {_first_line(error)}"
            got = _tensors(ours.forward(**arguments))
            largest = max([largest, *(_relative(a, b) for a, b in zip(got, expected, strict=True))])
    return largest


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    apart, size = (actual - expected).norm().item(), expected.norm().item()
    return apart / size if size else apart


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _parameters(forward: Any) -> list[str]:
    kept = [p.name for p in inspect.signature(forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return kept[1:]  # less self


def _empty(kind: type[Accelerated], original: type[nn.Module]) -> nn.Module:
    made = accelerated_class(kind, original)  # type: ignore[arg-type]
    return made.__new__(made)
