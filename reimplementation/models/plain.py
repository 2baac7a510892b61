"""Whether layers may be computed by other means than calling their modules: then nobody could tell the difference."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


def calls_are_unseen() -> bool:
    """Whether no compiler, exporter or tracer looks on as modules are called, and no hook is set on all of them."""
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or _has_any_global_hook())


def is_plain(layer: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of that very class, with its own forward and no hooks.

    What quantises, adapts, shards or parametrises a layer puts another class in its place, or a forward or hook on it;
    what does so with a weight makes that a tensor of another class, see `are_plain`.
    """
    if type(layer) is not kind:
        return False
    own = layer.__dict__
    hooks = own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]
    return not hooks and "forward" not in own


def are_plain(tensors: Iterable[Any], dtype: torch.dtype) -> bool:
    """Whether these are dense tensors of that dtype and of PyTorch's own classes. None stands for what is left out."""
    return all([tensor is None or _is_plain_tensor(tensor, dtype) for tensor in tensors])


def _is_plain_tensor(tensor: Any, dtype: torch.dtype) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == dtype and tensor.layout == torch.strided


def weight_and_bias(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """Of a plain layer. As a module's attributes they take ten times as long to find."""
    own = layer._parameters
    return own.get("weight"), own.get("bias")
