"""Whole models of transformers on our ops, in a compiler and in an exporter. Slow: each takes up to a minute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from reimplementation.integrations import accelerate
from tests.integrations.stand_ins import import_or_skip
from tests.reference import relative_error

import_or_skip("transformers", "5")

from tests.integrations.tiny import MODELS, model_of, outputs_of  # noqa: E402

pytestmark = pytest.mark.slow
ROUNDINGS = 1000


def compiled(model: nn.Module, inputs: dict) -> Callable:
    """In one graph, for the kernels' backends as for others."""
    torch.compiler.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def exported(model: nn.Module, inputs: dict) -> Callable:
    return torch.export.export(model, (), inputs).module()


@pytest.mark.parametrize("tiny", MODELS, ids=str)
@pytest.mark.parametrize("traced", [compiled, exported])
def test_traced(traced, tiny):
    """What can be done with the original can be done with ours."""
    model, inputs = model_of(tiny), tiny.inputs(torch.float32)
    ours = copy.deepcopy(model)
    accelerate(ours)
    with torch.no_grad():
        expected = outputs_of(copy.deepcopy(ours), inputs)
        try:
            got = outputs_of(traced(ours, inputs), inputs)
        except Exception as error:
            with pytest.raises(type(error)):
                outputs_of(traced(model, inputs), inputs)
            pytest.xfail(f"neither is the original: {error}")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(got[name], value) <= ROUNDINGS * torch.finfo(value.dtype).eps, name
