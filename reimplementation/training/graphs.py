"""A network's forward and backward as CUDA graphs: the host launches two of them, in place of thousands of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reimplementation.models.sparsedrive import SparseDrive
from reimplementation.models.sparsedrive.detector import State

from .batches import Batch


class GraphedNetwork:
    """A detector that is called as `SparseDrive` is with a state, always with batches of one form.

    What a call returns is overwritten by the next one.

    Args:
        model: in training, on a GPU.
        batch, state: of the form of those that will come.
        precision: "float32", or "bfloat16" for autocast.

    Raises:
        ValueError: the model's queries depend on the targets, so that they have no one form.
    """

    def __init__(self, model: SparseDrive, batch: Batch, state: State, precision: str):
        if model.config.det.denoising.num_groups:
            raise ValueError("a network with denoising queries cannot be captured; set graph to false")
        inputs, self._form = flat((batch.images, batch.metas, state))
        self._network = _Flat(model, self._form)
        # Autocast must not hand a captured copy of a parameter to whoever comes later, and norms have seen nothing yet.
        is_half = precision == "bfloat16"
        with _as_they_are(model), torch.autocast("cuda", torch.bfloat16, enabled=is_half, cache_enabled=False):
            torch.cuda.make_graphed_callables(self._network, tuple(inputs), allow_unused_input=True)

    def __call__(
        self, images: Tensor, metas: Mapping[str, Tensor], state: State, targets: Any = None
    ) -> tuple[dict, State]:
        """As `SparseDrive.forward`; the targets are not looked at, since no queries come from them."""
        inputs, form = flat((images, dict(metas), state))
        if form != self._form:
            raise ValueError("a batch must have the form of the one that the network was captured with")
        outputs, new_state = unflat(self._network.form, self._network(*inputs))
        # Times and poses go through to the new state: without a copy the next call would overwrite what it reads.
        tensors, form = flat(new_state)
        return outputs, unflat(form, [tensor.detach().clone() for tensor in tensors])


class _Flat(nn.Module):
    """A model as a function of tensors alone, which is what can be captured. form: of what it returned last."""

    def __init__(self, model: SparseDrive, form: Any):
        super().__init__()
        self.model, self._inputs, self.form = model, form, None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the model returns, flat."""
        outputs, self.form = flat(self.model(*unflat(self._inputs, tensors)))
        return tuple(outputs)


@dataclass(frozen=True)
class Slot:
    """Where in a list of tensors one is."""

    index: int


def flat(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors in nested dicts, lists and tuples, and the same with a `Slot` in place of each of them."""
    tensors: list[Tensor] = []

    def form_of(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors.append(part)
            return Slot(len(tensors) - 1)
        return _mapped(form_of, part)

    return tensors, form_of(value)


def unflat(form: Any, tensors: Any) -> Any:
    """What `flat` was given, with these tensors in it."""
    return tensors[form.index] if isinstance(form, Slot) else _mapped(lambda part: unflat(part, tensors), form)


def _mapped(function: Any, value: Any) -> Any:
    """A dict, list or tuple with a function's values for its own; anything else stays."""
    if isinstance(value, dict):
        return {key: function(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    return type(value)(map(function, value)) if isinstance(value, (list, tuple)) else value


@contextmanager
def _as_they_are(model: nn.Module) -> Iterator[None]:
    """Whatever happens in the meantime, the model's buffers are afterwards what they were."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    for name, buffer in model.named_buffers():
        buffer.copy_(before[name])
