"""Functions that launch Triton kernels, made operators of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch._subclasses.fake_tensor import is_fake

from . import NAMESPACE, is_interpreted


def define(name: str, launch: Callable, check: Callable[..., None]) -> None:
    """Define ``torch.ops.reimplementation_triton.NAME``.

    `torch.library.triton_op` lets compilers and AOTInductor look into it and compile the kernels with what surrounds
    them. Kernels that are interpreted have nothing to compile: to a compiler their operator is opaque.

    Args:
        name: of the operator.
        launch: allocates the results and launches the kernels; its annotations, types and no text, are the schema.
        check: raises where the arguments are not what ``launch`` takes. ``values=False`` tells it that a compiler is at
            work, and that there are no values to look at.
    """

    @wraps(launch)
    def checked(*arguments, **keywords):
        check(*arguments, values=not any(isinstance(t, torch.Tensor) and is_fake(t) for t in arguments))
        return launch(*arguments, **keywords)

    qualified = f"{NAMESPACE}::{name}"
    if is_interpreted():
        torch.library.custom_op(qualified, checked, mutates_args=())
    else:
        torch.library.triton_op(qualified, checked, mutates_args=())
