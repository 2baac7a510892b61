"""Captured as CUDA graphs, a network computes what it computes; and what it takes and returns survives being flat."""

import dataclasses

import pytest
import torch

from reimplementation.models.sparsedrive import SparseDrive
from reimplementation.training.graphs import GraphedNetwork, Slot, flat, unflat
from reimplementation.training.loop import Training
from reimplementation.training.processes import Process
from reimplementation.training.synthetic_frames import training_drives
from tests.models.sparsedrive.small import DENOISING
from tests.training.tiny import ALONE, MODEL, TINY, numbers

pytest.importorskip("scipy")


def test_flat_and_back():
    state = SparseDrive(MODEL).initial_state(2)
    value = ({"a": torch.ones(1), "b": [None, torch.zeros(2), "text"]}, state)
    tensors, form = flat(value)
    assert len(tensors) == 2 + sum(len(remembered) for remembered in state.values())
    assert form[0] == {"a": Slot(0), "b": [None, Slot(1), "text"]}
    again = unflat(form, tensors)
    assert type(again[1]["det"]) is type(state["det"]) and again[1]["det"].anchor is state["det"].anchor
    assert again[0]["b"][1] is tensors[1] and again[0]["b"][2] == "text"


def test_what_cannot_be_captured(tmp_path):
    with pytest.raises(ValueError, match="with denoising queries cannot be captured; set graph to false"):
        GraphedNetwork(SparseDrive(DENOISING), None, {}, "float32")
    with pytest.raises(ValueError, match="graph is for a GPU; got cpu"):
        Training(dataclasses.replace(TINY, graph=True), tmp_path, ALONE)


@pytest.mark.cuda
def test_losses_are_those_of_an_eager_network(tmp_path, cuda_kernels):
    """Without dropout; in the first step they are equal to rounding, later close."""
    model = dataclasses.replace(MODEL, dropout=0.0, attn_drop=0.0)
    alone = Process(0, 1, torch.device("cuda", 0))
    rows = {}
    for graph in (False, True):
        config = dataclasses.replace(TINY, num_steps=5, graph=graph, model=model)
        Training(config, tmp_path / str(graph), alone).run(lambda row: None, lambda: False)
        rows[graph] = numbers(tmp_path / str(graph))
    assert rows[True][0]["det_loss_cls_0"] == pytest.approx(rows[False][0]["det_loss_cls_0"], rel=1e-4)
    for ours, theirs in zip(rows[True], rows[False]):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.2)


@pytest.mark.cuda
def test_capturing_leaves_norms_as_they_were(cuda_kernels):
    torch.manual_seed(0)
    network = SparseDrive(MODEL).train().cuda()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    batch = training_drives(TINY.data, MODEL, "cuda", range(2), 2).at(0)
    graphed = GraphedNetwork(network, batch, network.initial_state(2), "float32")
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    graphed(batch.images, batch.metas, network.initial_state(2))
    assert any(not torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
