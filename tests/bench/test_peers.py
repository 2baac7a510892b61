"""Peers: what is held against ours before it is timed, and how deformops is called."""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from reimplementation import ops
from reimplementation.bench import peers
from reimplementation.bench.cases import CASES
from reimplementation.bench.inputs import attention_inputs
from reimplementation.bench.peers import PEER_PASSES, PEERS, installed, peer_steps, require_agreement


def grid_sample(*operands):
    with ops.use_backend("grid_sample"):
        return ops.ms_deform_attn(*operands)


def align_corners(value, shapes, starts, locations, weights):
    """Another convention: the corners of a level are the centres of its corner pixels."""
    sizes = shapes.flip(-1)[:, None]
    return grid_sample(value, shapes, starts, (locations * (sizes - 1) + 0.5) / sizes, weights)


class NoLocationGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, locations):
        return locations.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


def without_location_gradient(value, shapes, starts, locations, weights):
    return grid_sample(value, shapes, starts, NoLocationGradient.apply(locations), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_peer_that_computes_the_same_agrees(dtype):
    require_agreement(grid_sample, attention_inputs("small-encoder", dtype=dtype), gradients=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_convention_is_refused(dtype):
    with pytest.raises(RuntimeError, match="its output is .* of its length away from ours, more than"):
        require_agreement(align_corners, attention_inputs("small-encoder", dtype=dtype), gradients=False)


def test_a_gradient_that_is_missing_is_refused():
    inputs = attention_inputs("small-encoder")
    require_agreement(without_location_gradient, inputs, gradients=False)
    with pytest.raises(RuntimeError, match="its gradient of the locations is 1.0e"):
        require_agreement(without_location_gradient, inputs, gradients=True)


def test_nan_and_another_shape_are_refused():
    inputs = attention_inputs("small-encoder")
    with pytest.raises(RuntimeError, match="its output is nan"):
        require_agreement(lambda *operands: grid_sample(*operands) * torch.nan, inputs, gradients=False)
    with pytest.raises(RuntimeError, match="its output has the shape"):
        require_agreement(lambda *operands: grid_sample(*operands)[:1, 1:], inputs, gradients=False)


def test_peers_have_passes_in_the_cases_of_their_op_alone():
    for name in PEERS:
        assert CASES["msda-encoder"].passes(name) == PEER_PASSES
        for other in ("rig-bs1", "module-bs1", "overhead-msda"):
            assert CASES[other].passes(name) == ()


class Backend(enum.Enum):
    CUDA, TRITON = "cuda", "triton"


@pytest.fixture
def deformops(monkeypatch) -> list:
    """A package with the interface of deformops 3 and our numbers, as where its CUDA kernels have not been compiled."""
    calls = []

    def msda(*operands, backend, **options):
        calls.append((backend, options))
        return grid_sample(*operands)

    def load(backend):
        if backend is Backend.CUDA:
            raise RuntimeError("the kernels are not compiled")

    msda.load = load
    registry = ModuleType("deformops.registry")
    registry.Backend, registry.msda = Backend, msda
    monkeypatch.setitem(sys.modules, "deformops", ModuleType("deformops"))
    monkeypatch.setitem(sys.modules, "deformops.registry", registry)
    return calls


@pytest.mark.parametrize(("capability", "sums"), [((8, 9), True), ((9, 0), False)])
def test_deformops_is_called_as_it_would_choose(deformops, monkeypatch, capability, sums):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found, missing = installed(torch.device("cuda"))
    assert found == ["deformops-triton"] and missing == {"deformops-cuda": "the kernels are not compiled"}
    function = PEERS["deformops-triton"].load(torch.device("cuda"))
    require_agreement(function, attention_inputs("small-encoder"), gradients=True)
    assert set(map(str, deformops)) == {str((Backend.TRITON, {"fp32acc": sums}))}


def test_a_package_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "deformops", None)
    found, missing = installed(torch.device("cuda"))
    assert found == [] and set(missing) == set(PEERS)
    assert all("deformops" in reason and "pip install deformops" in reason for reason in missing.values())


def test_versions_of_the_packages(monkeypatch):
    monkeypatch.setattr(peers, "metadata", SimpleNamespace(version=lambda package: f"{package} 3"))
    assert peers.versions(PEERS) == {"deformops": "deformops 3"}


@pytest.mark.cuda
@pytest.mark.parametrize("passed", PEER_PASSES)
def test_installed_peers_run(passed):
    found, missing = installed(torch.device("cuda"))
    if not found:
        pytest.skip(str(missing))
    inputs = [attention_inputs("decoder", 1, device="cuda", seed=seed) for seed in range(2)]
    for name in found:
        for step in peer_steps(name, inputs, passed):
            step()
