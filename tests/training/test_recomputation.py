"""A model that computes things again computes the same."""

import dataclasses

import pytest
import torch

from reimplementation.models.sparsedrive import SparseDrive
from reimplementation.training.recomputation import recompute
from reimplementation.training.synthetic_frames import Place, SyntheticFrames
from tests.training.tiny import MODEL, TINY

pytest.importorskip("scipy")


def test_gradients_are_equal():
    """With dropout, whose draws are drawn again, and with norms, which see every batch once."""
    config = dataclasses.replace(MODEL, dropout=0.1, attn_drop=0.1)
    batch = SyntheticFrames(TINY.data, config, "cpu", lambda step: [Place(0, 0), Place(1, 1)]).at(0)
    found, kept = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = SparseDrive(config).train()
        if again:
            recompute(model)
        size = 0

        def count(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            outputs = model(batch.images, batch.metas, targets=batch.targets)
        terms = model.loss(outputs, batch.targets)
        sum(terms.values()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        buffers = {name: b for name, b in model.named_buffers() if "running" in name}
        found.append({**terms, **gradients, **buffers})
        kept.append(size)
    assert found[0].keys() == found[1].keys() and len(found[0]) > 100
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=1e-5, atol=1e-6), name
    assert kept[1] < kept[0] / 2
