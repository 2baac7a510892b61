"""A few steps of training: the losses lead somewhere, over frames and in half precision."""

import dataclasses

import pytest
import torch

from reimplementation.models.sparsedrive import SparseDrive
from tests.models.sparsedrive.small import BOX_HEAD, CONFIG, MAP_HEAD, frame, targets

pytest.importorskip("scipy")
EAGER = dataclasses.replace(  # boxes and lines count from the first step on, not only once their classes score
    CONFIG,
    det=dataclasses.replace(BOX_HEAD, min_score_for_boxes=0.0),
    map=dataclasses.replace(MAP_HEAD, min_score_for_lines=0.0),
    dropout=0.0,
    attn_drop=0.0,
)


def test_loss_falls():
    torch.manual_seed(0)
    model = SparseDrive(EAGER).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    totals = []
    for _ in range(12):
        model.reset()
        loss = sum(model.loss(model(*frame(2)), targets(2)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 25.0)
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.7 * totals[0], totals


def test_frames_in_bfloat16():
    """Two frames in a row under autocast: gradients are finite, and do not reach back into the first frame."""
    torch.manual_seed(0)
    model = SparseDrive(EAGER).train()
    for index in range(2):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(*frame(2, index, 0.5 * index))
        sum(model.loss(outputs, targets(2, index)).values()).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        assert model.img_backbone.conv1.weight.grad.any()
