"""The hand-over from frame to frame against loops over instances in float64, and ids against a list of names."""

import math

import numpy as np
import pytest
import torch

from reimplementation.models.deformable import Sparse4DBox3DKeyPointsGenerator, SparseBox3DKeyPointsGenerator
from reimplementation.models.sparsedrive.config import BankConfig
from reimplementation.models.sparsedrive.instance_bank import InstanceBank, TemporalState
from tests.models.sparsedrive.small import pose

BS, NUM_ANCHORS, NUM_KEPT, DIMS = 2, 7, 4, 3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def bank(handler: type = SparseBox3DKeyPointsGenerator, min_score_for_id: float | None = None) -> InstanceBank:
    config = BankConfig(num_anchors=NUM_ANCHORS, num_temp_instances=NUM_KEPT, min_score_for_id=min_score_for_id)
    return InstanceBank(config, torch.randn(NUM_ANCHORS, 11), DIMS, handler(DIMS)).double()


def state(time: float = 0.0) -> TemporalState:
    return TemporalState(
        feature=torch.randn(BS, NUM_KEPT, DIMS).double(),
        anchor=torch.randn(BS, NUM_KEPT, 11).double() * 5,
        confidence=torch.rand(BS, NUM_KEPT).double(),
        instance_id=torch.arange(BS * NUM_KEPT).view(BS, NUM_KEPT),
        next_id=torch.tensor([40, 50]),
        timestamp=torch.full((BS,), time, dtype=torch.float64),
        T_global=pose(time).repeat(BS, 1, 1),
    )


def moved(anchor: np.ndarray, seconds: float, T_source: np.ndarray, T_target: np.ndarray) -> np.ndarray:
    """One box, carried on at its velocity, into the world and from there into another frame."""
    rotation = np.linalg.inv(T_target)[:3, :3] @ T_source[:3, :3]
    centre = anchor[:3] + anchor[8:11] * seconds
    centre = np.linalg.inv(T_target) @ T_source @ np.append(centre, 1.0)
    heading = rotation[:2, :2] @ anchor[[7, 6]]  # cosine along x, sine along y
    return np.concatenate([centre[:3], anchor[3:6], heading[::-1], rotation @ anchor[8:11]])


@pytest.mark.parametrize("handler", [SparseBox3DKeyPointsGenerator, Sparse4DBox3DKeyPointsGenerator])
def test_recall(handler):
    last, times = state(0.0), [0.5, 1.75]
    T_global = torch.stack([pose(time) for time in times])
    recalled = bank(handler).recall(last, torch.tensor(times).double(), T_global)
    for sample, time in enumerate(times):
        for index in range(NUM_KEPT):
            wanted = moved(last.anchor[sample, index].numpy(), time, pose(0.0).numpy(), pose(time).numpy())
            if handler is Sparse4DBox3DKeyPointsGenerator:  # which was trained on swapped ones
                wanted[[6, 7]] = wanted[[7, 6]]
            np.testing.assert_allclose(recalled.anchor[sample, index].numpy(), wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(recalled.feature, last.feature) and torch.equal(recalled.instance_id, last.instance_id)
    assert recalled.goes_on.tolist() == [True, True] and recalled.time_interval.tolist() == times


def test_float32_boxes_far_from_the_origin():
    """Global positions of kilometres must not cost a box its centimetres."""
    far = torch.eye(4, dtype=torch.float64).repeat(BS, 1, 1)
    far[:, :3, 3] = torch.tensor([40_000.0, 50_000.0, 100.0])
    last = state()._replace(anchor=torch.ones(BS, NUM_KEPT, 11), T_global=far)
    recalled = bank().float().recall(last, last.timestamp, far)
    torch.testing.assert_close(recalled.anchor, last.anchor)


@pytest.mark.parametrize(
    ("passed", "goes_on", "interval"),
    [(0.5, True, 0.5), (2.0, True, 2.0), (2.001, False, 0.5), (0.0, True, 0.5), (-1.0, True, -1.0), (-3.0, False, 0.5)],
)
def test_gaps_in_time(passed, goes_on, interval):
    last = state(10.0)
    timestamp = last.timestamp + torch.tensor([passed, 1.0]).double()
    recalled = bank().recall(last, timestamp, last.T_global)
    assert recalled.goes_on.tolist() == [goes_on, True]
    assert recalled.time_interval.tolist() == pytest.approx([interval, 1.0])
    assert (recalled.instance_id[0] == -1).all().item() is not goes_on
    assert (recalled.confidence[0] == 0).all().item() is not goes_on


def test_clocks_of_today_tell_frames_apart():
    last = state(1.7e9)
    recalled = bank().recall(last, last.timestamp + 0.05, last.T_global)
    assert recalled.time_interval.tolist() == pytest.approx([0.05] * BS, abs=1e-6)


def test_merge():
    last = state()
    timestamp = last.timestamp + torch.tensor([0.5, 5.0]).double()
    module = bank()
    recalled = module.recall(last, timestamp, last.T_global)
    feature, anchor, logits = (torch.randn(BS, NUM_ANCHORS, dims).double() for dims in (DIMS, 11, 4))
    merged_feature, merged_anchor = module.merge(recalled, feature, anchor, logits)

    ranked = sorted(range(NUM_ANCHORS), key=lambda index: -max(logits[0, index].tolist()))
    best = ranked[: NUM_ANCHORS - NUM_KEPT]
    torch.testing.assert_close(merged_feature[0], torch.stack([*recalled.feature[0], *feature[0, best]]))
    torch.testing.assert_close(merged_anchor[0], torch.stack([*recalled.anchor[0], *anchor[0, best]]))
    assert torch.equal(merged_feature[1], feature[1]) and torch.equal(merged_anchor[1], anchor[1])  # starts anew


def test_keep():
    module = bank()
    feature, anchor, logits = (torch.randn(BS, NUM_ANCHORS, dims).double() for dims in (DIMS, 11, 4))
    recalled = module.recall(state(), torch.tensor([0.5, 5.0]).double(), pose(0.5).repeat(BS, 1, 1))
    timestamp, T_global = torch.tensor([0.5, 5.0]).double(), pose(0.5).repeat(BS, 1, 1)
    _, kept = module.keep(recalled, feature.requires_grad_(), anchor.requires_grad_(), logits, timestamp, T_global)
    assert not kept.feature.requires_grad and not kept.anchor.requires_grad
    assert torch.equal(kept.timestamp, timestamp) and torch.equal(kept.T_global, T_global)
    for sample in range(BS):
        confidence = [1 / (1 + math.exp(-max(row.tolist()))) for row in logits[sample]]
        if sample == 0:  # the other one starts anew
            for index, old in enumerate(recalled.confidence[sample].tolist()):
                confidence[index] = max(confidence[index], 0.6 * old)
        best = sorted(range(NUM_ANCHORS), key=lambda index: -confidence[index])[:NUM_KEPT]
        assert kept.confidence[sample].tolist() == pytest.approx([confidence[index] for index in best])
        assert torch.equal(kept.feature[sample], feature[sample, best])
        assert torch.equal(kept.anchor[sample], anchor[sample, best])


@pytest.mark.parametrize("min_score", [None, 0.6])
def test_ids_over_five_frames(min_score):
    """Against lists of names and confidences, sorted in Python; the second sample starts anew at frame 3."""
    module, last, following = bank(min_score_for_id=min_score), None, [0, 0]
    names, confidences = [[-1] * NUM_KEPT for _ in range(BS)], [[0.0] * NUM_KEPT for _ in range(BS)]
    for frame in range(5):
        times = torch.tensor([0.5 * frame, 0.5 * frame + (10 if frame >= 3 else 0)]).double()
        T_global = pose(0.0).repeat(BS, 1, 1)
        logits = torch.randn(BS, NUM_ANCHORS, 4).double()
        feature, anchor = torch.zeros(BS, NUM_ANCHORS, DIMS).double(), torch.zeros(BS, NUM_ANCHORS, 11).double()
        recalled = None if last is None else module.recall(last, times, T_global)
        ids, last = module.keep(recalled, feature, anchor, logits, times, T_global)
        for sample in range(BS):
            if frame == 3 and sample == 1:
                names[sample], confidences[sample] = [-1] * NUM_KEPT, [0.0] * NUM_KEPT
            named = names[sample] + [-1] * (NUM_ANCHORS - NUM_KEPT)
            scores = [1 / (1 + math.exp(-max(row.tolist()))) for row in logits[sample]]
            for index in range(NUM_ANCHORS):
                if named[index] < 0 and (min_score is None or scores[index] >= min_score):
                    named[index], following[sample] = following[sample], following[sample] + 1
            assert ids[sample].tolist() == named, (frame, sample)
            worth = [
                max(score, 0.6 * old)
                for score, old in zip(scores, confidences[sample] + [0.0] * (NUM_ANCHORS - NUM_KEPT))
            ]
            best = sorted(range(NUM_ANCHORS), key=lambda index: -worth[index])[:NUM_KEPT]
            names[sample], confidences[sample] = [named[i] for i in best], [worth[i] for i in best]
            assert last.instance_id[sample].tolist() == names[sample]
        assert last.next_id.tolist() == following


def test_initial_state_is_no_state():
    module = bank()
    recalled = module.recall(module.initial_state(BS), torch.full((BS,), 1.7e9).double(), pose(0.0).repeat(BS, 1, 1))
    assert not recalled.goes_on.any() and recalled.time_interval.tolist() == [0.5] * BS
    feature, anchor, logits = (torch.randn(BS, NUM_ANCHORS, dims).double() for dims in (DIMS, 11, 4))
    assert torch.equal(module.merge(recalled, feature, anchor, logits)[1], anchor)
    frame = (feature, anchor, logits, torch.zeros(BS).double(), pose(0.0).repeat(BS, 1, 1))
    for got, wanted in zip(module.keep(recalled, *frame)[1], module.keep(None, *frame)[1]):
        assert torch.equal(got, wanted)
