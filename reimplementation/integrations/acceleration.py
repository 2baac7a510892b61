"""One call that puts our ops into a model of somebody else's, and says what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from reimplementation.models import DeformableFeatureAggregation, MSDeformAttn

from .clients import KINDS, tested_versions
from .replacement import SAME, Accelerated, difference, replace_forward, restore_forward

OURS = (MSDeformAttn, DeformableFeatureAggregation)


@dataclass(frozen=True)
class Replaced:
    """A module that runs on our ops.

    path: its name in the model. module: itself. kind: whose forward it has now. unchecked: why its results were not
    compared with those of its own forward; None if they were, and are the same.
    """

    path: str
    module: nn.Module
    kind: type[Accelerated]
    unchecked: str | None = None


@dataclass(frozen=True)
class Left:
    """A module that is called like one that we know, and was left as it is; and why."""

    path: str
    module: nn.Module
    reason: str


@dataclass
class Report:
    """What `accelerate` did to a model; as text, a line for each kind of module.

    replaced: the modules that run on our ops now. left: those that look as if they could, and why they do not.
    already: the paths of those that did before, and of modules of this package.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    already: list[str] = field(default_factory=list)

    def undo(self) -> None:
        """Give the modules their own forward back. Copies of the model that were made since keep ours."""
        for replaced in self.replaced:
            restore_forward(replaced.module)

    def __str__(self) -> str:
        lines = []
        for (name, unchecked), count in Counter((_class(r.module), r.unchecked) for r in self.replaced).items():
            said = "same results as before" if unchecked is None else f"not compared: {unchecked}"
            lines.append(f"replaced {count} x {name}: {said}")
        for (name, reason), count in Counter((_class(left.module), left.reason) for left in self.left).items():
            lines.append(f"left {count} x {name}: {reason}")
        if self.already:
            lines.append(f"{len(self.already)} modules run on our ops already")
        return "\n".join(lines) or "nothing was replaced"


def accelerate(model: nn.Module, *, strict: bool = True) -> Report:
    """Let the attention modules of a model run on our ops, in place.

    A module that is known gets our forward. It stays the same object, of a subclass of its class, so that state dicts,
    pickles, `copy.deepcopy`, hooks, `torch.compile` and `torch.export` work as before; other instances of its class are
    left alone. A module is known by the name of its class, the parameters of its forward and the attributes that ours
    reads; and the two forwards are compared on small random inputs before one takes the other's place.

    Args:
        model: with any modules in it. `clients` says which are known.
        strict: whether it is an error that a module with a known name is left as it is, and that none is replaced.

    Returns:
        What was replaced where. `Report.undo` puts everything back.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: with ``strict``, nothing is known, or something only by its name; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    report = Report()
    for path, module in list(model.named_modules()):
        if isinstance(module, (Accelerated, *OURS)):
            report.already.append(path)
        elif not _lies_within(path, [replaced.path for replaced in report.replaced]):
            _consider(path, module, report)
    if strict and (report.left or not (report.replaced or report.already)):
        raise ValueError(_refusal(model, report))
    for replaced in report.replaced:
        replace_forward(replaced.kind, replaced.module)
    return report


@contextmanager
def accelerated(model: nn.Module, *, strict: bool = True) -> Iterator[Report]:
    """`accelerate` within a ``with`` block, and undo it behind it."""
    report = accelerate(model, strict=strict)
    try:
        yield report
    finally:
        report.undo()


def _consider(path: str, module: nn.Module, report: Report) -> None:
    """Add a module to the report, unless its name is not known."""
    reasons = []
    for kind in KINDS:
        if not kind.has_name_of(module):
            continue
        reason = kind.why_not(module)
        if reason is None:
            try:
                found = difference(kind, module)
            except Exception as error:
                reason = f"our forward does not fit it: {type(error).__name__}: {error}"
            else:
                if isinstance(found, str) or found <= SAME:
                    report.replaced.append(Replaced(path, module, kind, found if isinstance(found, str) else None))
                    return
                reason = f"it computes something else than what is known: relative difference {found:.1e} in float64"
        reasons.append(reason)
    if reasons:
        report.left.append(Left(path, module, "; or ".join(dict.fromkeys(reasons))))


def _lies_within(path: str, paths: Sequence[str]) -> bool:
    return any(outer == "" or path.startswith(f"{outer}.") for outer in paths)


def _refusal(model: nn.Module, report: Report) -> str:
    """Why `accelerate` changed nothing, and what it would have known."""
    known = ", ".join(f"{name} {version}" for name, version in tested_versions().items())
    what = f"{type(model).__name__} is left as it was"
    if not report.left:
        return f"{what}: none of its modules is known. Known are those of {known}; docs/integrations.md lists them"
    return (
        f"{what}: some of its modules have a known name, but another form:\n{Report(left=report.left)}\n"
        f"Known are those of {known}. To replace what is known all the same, pass strict=False"
    )


def _class(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
