"""Whole models of transformers on our ops, in a compiler and in an exporter. Slow: each takes up to a minute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reimplementation.integrations import accelerate
from tests.integrations.stand_ins import import_or_skip
from tests.reference import relative_error

import_or_skip("transformers", "5")

from tests.integrations.tiny import EVERY_MODEL, MODELS, Tiny, model_of, outputs_of  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
ROUNDINGS = 1000

every_model = pytest.mark.parametrize("tiny", MODELS, ids=str)


def require_same_outputs(traced: Callable, model: torch.nn.Module, inputs: dict) -> None:
    expected, got = outputs_of(copy.deepcopy(model), inputs), outputs_of(traced, inputs)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(got[name], value) <= ROUNDINGS * torch.finfo(value.dtype).eps, name


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_compiled(tiny):
    """In one graph, where that can be done with the original."""
    model, inputs = model_of(tiny), tiny.inputs(torch.float32)
    accelerate(model)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=tiny.traceable)
    require_same_outputs(compiled, model, inputs)


@pytest.mark.slow
@every_model
@torch.no_grad()
def test_exported(tiny):
    model, inputs = model_of(tiny), tiny.inputs(torch.float32)
    if not tiny.traceable:
        with pytest.raises(Exception, match="data-dependent"):  # the original, too
            torch.export.export(copy.deepcopy(model), (), inputs)
    accelerate(model)
    if tiny.traceable:
        require_same_outputs(torch.export.export(copy.deepcopy(model), (), inputs).module(), model, inputs)


def row(tiny: Tiny) -> str:
    compiled, exported = ("one graph", "yes") if tiny.traceable else ("several graphs", "no")
    return f"| {tiny.name} | {compiled} | {exported} |"


def test_the_page_says_so():
    """Of each model, less the variants of one."""
    assert all(row(tiny) in PAGE.read_text() for tiny in EVERY_MODEL if "-" not in tiny.name)
