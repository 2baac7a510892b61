"""The sides of a comparison: a model as it came, a copy on our ops, and one on somebody else's where they know it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from torch import nn

from reimplementation.integrations import accelerate

PEER = "deformops"  # the one package (on PyPI) that puts its kernels into other people's models too


@dataclass(frozen=True)
class Runner:
    """A model, and those modules in it that attend, which are the same ones on every side."""

    model: nn.Module
    attention: list[nn.Module]


def runners(model: nn.Module, peer: bool) -> dict[str, Runner]:
    """{side: its model}: "original", "accelerated", and `PEER` if it is asked for and knows the model.

    Raises:
        ValueError: `accelerate` does not know it.
    """
    ours = copy.deepcopy(model)
    paths = [replaced.path for replaced in accelerate(ours).replaced]
    theirs = _on_peer(model) if peer else None
    models = {"original": model, "accelerated": ours} | ({} if theirs is None else {PEER: theirs})
    return {name: Runner(each, _modules(each, paths)) for name, each in models.items()}


def why_no_peer() -> str | None:
    """Why `PEER` cannot be timed; None if it can."""
    try:
        import deformops.integrations.transformers  # noqa: F401
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed; try: pip install {PEER}"
    except (ImportError, SyntaxError) as error:
        return str(error)
    return None


def peer_version() -> dict[str, str]:
    return {PEER: metadata.version(PEER)}


def _on_peer(model: nn.Module) -> nn.Module | None:
    from deformops.integrations.transformers import patch

    patched = patch(copy.deepcopy(model), strict=False)
    known = any(type(module).__module__.partition(".")[0] == PEER for module in patched.modules())
    return patched if known else None


def _modules(model: nn.Module, paths: Sequence[str]) -> list[nn.Module]:
    return [model.get_submodule(path) for path in paths]
