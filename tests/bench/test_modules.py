"""The timed module: its reference, and the figures taken of it."""

from __future__ import annotations

import pytest
import torch

from reimplementation.bench import modules
from reimplementation.bench.graphed import OfLeaves
from reimplementation.bench.inputs import aggregation_problem, attention_problem
from reimplementation.bench.modules import Case, cases, measure, reference
from reimplementation.data.rig import nuscenes_like_rig


@pytest.fixture(scope="module")
def small():
    """The module on small images: the sizes of the pyramid do not matter here."""
    return aggregation_problem(nuscenes_like_rig().scaled_to(176, 64), num_queries=12)


@pytest.fixture(autouse=True)
def one_repeat(monkeypatch):
    monkeypatch.setattr(modules, "SECONDS_PER_FIGURE", 0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-1)])
def test_measure(small, dtype, bound):
    expected = reference(small)
    assert expected.dtype == torch.float64 and expected.shape == (1, 12, 256)
    for _ in range(2):  # one case leaves nothing behind for the next
        timing = measure(small, expected, Case("cpu", "grid_sample", dtype))
        assert 0 < timing.max_error < bound
        assert timing.forward_ms > 0 and timing.training_ms > 0
        assert timing.extra_bytes is None or timing.extra_bytes >= 0
    assert not small.instance_feature.requires_grad and not small.feature_maps[0].requires_grad
    assert all(parameter.grad is None for parameter in small.module.parameters())


@pytest.mark.cuda
def test_measure_on_cuda(small):
    expected = reference(small)
    for case in cases():
        timing = measure(small, expected, case)
        assert 0 < timing.max_error < 1e-1, case
        assert timing.extra_bytes is None or timing.extra_bytes > 0 or case.device == "cpu"


def test_a_worse_result_shows(small):
    expected = reference(small)
    timing = measure(small, expected * 1.1, Case("cpu", "grid_sample", torch.float32))
    assert timing.max_error > 0.05


@pytest.mark.parametrize(
    "make", [lambda: aggregation_problem(num_queries=5), lambda: attention_problem("small-encoder")]
)
def test_graphs_are_given_the_inputs_that_have_gradients(make):
    problem = make()
    others = [torch.randn_like(leaf) for leaf in problem.leaves]
    with torch.no_grad():
        output = OfLeaves(problem)(*others)
        assert torch.equal(output, problem.at(*others).forward())
        assert not torch.equal(output, problem.forward())
        assert torch.equal(OfLeaves(problem)(*problem.leaves), problem.forward())
