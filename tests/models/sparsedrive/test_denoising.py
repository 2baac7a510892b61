"""Denoising queries: where they are drawn, what they are to find, that nobody sees them, how they go on."""

import itertools

import pytest
import torch

from reimplementation.models.sparsedrive.config import DenoisingConfig
from reimplementation.models.sparsedrive.denoising import KnownBoxes, draw_queries
from tests.models.sparsedrive.small import BOX_HEAD, DENOISING, NUM_BOXES, frame, targets, trained

pytest.importorskip("scipy")
SCALE = torch.tensor(DenoisingConfig().noise_scale)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def known() -> KnownBoxes:
    """Three boxes far from one another, and one; padding to four."""
    boxes = torch.zeros(2, 4, 10)
    boxes[0, :3, 0], boxes[1, 0, 0] = torch.tensor([0.0, 40, 80]), 20
    return KnownBoxes(
        labels=torch.tensor([[4, 5, 6, 0], [7, 0, 0, 0]]),
        boxes=boxes,
        weights=torch.ones(2, 4, 10),
        instance_id=torch.tensor([[10, 11, 12, -1], [20, -1, -1, -1]]),
        counts=[3, 1],
    )


def test_queries(known):
    """Around each box the nearer of two queries of a group answers for it; that is the one within the noise."""
    drawn = draw_queries(known, DenoisingConfig(num_groups=3), BOX_HEAD.cost_weights, num_classes=10)
    assert drawn.anchor.shape == (2, 3 * 8, 11)
    for sample, group in itertools.product(range(2), range(3)):
        rows = slice(8 * group, 8 * (group + 1))
        anchor, count = drawn.anchor[sample, rows, :10], known.counts[sample]
        near, far = anchor[:4] - known.boxes[sample], anchor[4:] - known.boxes[sample]
        assert (near.abs() <= SCALE).all()
        assert (far.abs() >= SCALE).all() and (far.abs() <= 2 * SCALE).all()
        assert (far > 0).any() and (far < 0).any()
        found = drawn.targets.labels[sample, rows].tolist()
        assert found[:count] == known.labels[sample, :count].tolist()
        assert found[count:4] == [10] * (4 - count) and found[4:] == [10] * 4
        assert drawn.targets.valid[sample, rows].tolist() == ([True] * count + [False] * (4 - count)) * 2
        assert torch.equal(drawn.targets.boxes[sample, rows][:count], known.boxes[sample, :count])
        ids = drawn.targets.instance_id[sample, rows].tolist()
        assert ids == known.instance_id[sample, :count].tolist() + [-1] * (8 - count)
    groups = drawn.anchor.view(2, 3, 8, 11)
    assert not torch.equal(groups[:, 0], groups[:, 1])
    assert not drawn.anchor[..., 10].any()


def test_who_sees_whom(known):
    drawn = draw_queries(known, DenoisingConfig(num_groups=3), BOX_HEAD.cost_weights, num_classes=10)
    feature, anchor, allowed = drawn.append_to(torch.ones(2, 5, 4), torch.ones(2, 5, 11))
    assert feature.shape == (2, 5 + 24, 4) and not feature[:, 5:].any()
    assert torch.equal(anchor[:, 5:], drawn.anchor)
    group = [-1] * 5 + [0] * 8 + [1] * 8 + [2] * 8
    assert allowed.tolist() == [[a == b for b in group] for a in group]


@torch.no_grad()
def test_nobody_sees_them():
    """With and without queries the detections are the same, over two frames; in evaluation nothing is drawn."""
    model = trained(DENOISING).train()
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.BatchNorm2d)):
            module.eval()
        if hasattr(module, "attn_drop"):
            module.attn_drop = 0.0
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    state = model.initial_state(2)
    with_queries = without = state
    for index in range(2):
        images, metas = frame(2, index, 0.5 * index)
        drawn, with_queries = model(images, metas, state=with_queries, targets=targets(2, index))
        plain, without = model(images, metas, state=without)
        assert "denoising" in drawn["det"] and "denoising" not in plain["det"]
        for got, wanted in zip(drawn["det"]["prediction"], plain["det"]["prediction"]):
            assert got.shape[1] == NUM_BOXES
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert "denoising" not in model.eval()(images, metas, targets=targets(2))["det"]


@torch.no_grad()
def test_queries_go_on():
    """In the second frame the first groups are those of the first, and find the objects of the same ids."""
    model = trained(DENOISING).train()
    first, then = targets(2, 0), targets(2, 1)
    then["instance_id"][1] = torch.tensor([8, 99, 7])  # one is gone, one is new, two changed places
    state = model.initial_state(2)
    _, state = model(*frame(2, 0, 0.0), state=state, targets=first)
    kept = state["denoising"]
    assert kept.anchor.shape == (2, 2 * 8, 11)  # two groups of three
    outputs, _ = model(*frame(2, 1, [0.5, 0.5]), state=state, targets=then)
    before, *after = outputs["det"]["denoising"]["targets"]
    assert all(later is after[0] for later in after) and after[0] is not before
    for sample, query in itertools.product(range(2), range(16)):
        now = then["instance_id"][sample].tolist()
        was = kept.instance_id[sample, query].item()
        if was in now:
            place = now.index(was)
            assert after[0].labels[sample, query] == then["labels_3d"][sample][place]
            torch.testing.assert_close(after[0].boxes[sample, query, :3], then["boxes_3d"][sample][place, :3])
        else:
            assert after[0].labels[sample, query] == 10
    assert {9} & set(kept.instance_id[1].tolist()) and 9 not in after[0].instance_id[1, :16].tolist()
    for name, new, old in zip(after[0]._fields, after[0], before):
        assert torch.equal(new[:, 16:], old[:, 16:]), name


@torch.no_grad()
def test_after_a_gap_they_start_anew():
    model = trained(DENOISING).train()
    state = model.initial_state(2)
    _, state = model(*frame(2, 0, 0.0), state=state, targets=targets(2))
    outputs, _ = model(*frame(2, 1, [0.5, 9.0]), state=state, targets=targets(2, 1))
    before, *_, after = outputs["det"]["denoising"]["targets"]
    assert torch.equal(after.labels[1], before.labels[1]) and not torch.equal(after.valid[0], before.valid[1])


def test_losses_of_queries():
    """By loops: every query that is no padding has a class, those that answer for a box find it."""
    model, (images, metas), wanted = trained(DENOISING).train(), frame(2), targets(2)
    outputs = model(images, metas, targets=wanted)
    terms = model.loss(outputs, wanted)
    found = outputs["det"]["denoising"]
    for depth, (logits, boxes, goal) in enumerate(zip(found["classification"], found["prediction"], found["targets"])):
        classes = distance = count = 0.0
        for sample, query in itertools.product(range(2), range(logits.shape[1])):
            if not goal.valid[sample, query]:
                continue
            count += 1
            label, p = goal.labels[sample, query].item(), logits[sample, query].double().sigmoid()
            for index, score in enumerate(p):
                miss, weight = (1 - score, 0.25) if index == label else (score, 0.75)
                classes -= (weight * miss**2 * (1 - miss).log()).item()
            if label < 10:
                weights = goal.weights[sample, query] * torch.tensor(BOX_HEAD.loss_weights)
                distance += ((boxes[sample, query, :10] - goal.boxes[sample, query]).abs() * weights).sum().item()
        assert terms[f"det_loss_cls_dn_{depth}"].item() == pytest.approx(2.0 * classes / count, rel=1e-4)
        assert terms[f"det_loss_box_dn_{depth}"].item() == pytest.approx(0.25 * distance / count, rel=1e-4)
        assert count == 3 * 2 * (1 + 3)


def test_a_batch_without_boxes():
    model, (images, metas) = trained(DENOISING).train(), frame(1)
    nothing = {"labels_3d": [torch.zeros(0, dtype=torch.int64)], "boxes_3d": [torch.zeros(0, 9)]}
    outputs = model(images, metas, targets=nothing)
    terms = model.loss(outputs, nothing)
    assert terms["det_loss_cls_dn_0"].item() == terms["det_loss_box_dn_0"].item() == 0
    sum(terms.values()).backward()
