"""Decoding against loops: which instances, in which order, and what they are in metres."""

import math

import pytest
import torch

from reimplementation.models.sparsedrive.decoding import decode_detections, decode_lines
from tests.models.sparsedrive.small import NUM_LINES, NUM_POINTS, frame, trained


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("with_quality", [True, False])
def test_detections(with_ids, with_quality):
    logits, anchors = torch.randn(2, 7, 3, dtype=torch.float64), torch.randn(2, 7, 11, dtype=torch.float64)
    quality, ids = torch.randn(2, 7, 2, dtype=torch.float64), torch.arange(14).view(2, 7) + 30
    outputs = {"classification": [None, logits], "prediction": [None, anchors], "quality": [None, None]}
    if with_ids:
        outputs["instance_id"] = ids
    if with_quality:
        outputs["quality"][1] = quality
    for sample, found in enumerate(decode_detections(outputs, num_outputs=5)):
        pairs = []
        for instance, row in enumerate(logits[sample].tolist()):
            classes = [max(range(3), key=row.__getitem__)] if with_ids else range(3)
            pairs += [(sigmoid(row[label]), instance, label) for label in classes]
        pairs = sorted(pairs, reverse=True)[:5]
        if with_quality:
            pairs = sorted(
                ((score * sigmoid(quality[sample, i, 0].item()), i, label) for score, i, label in pairs), reverse=True
            )
        assert found["scores_3d"].tolist() == pytest.approx([score for score, _, _ in pairs], rel=1e-6)
        assert found["labels_3d"].tolist() == [label for _, _, label in pairs]
        if with_ids:
            assert found["instance_ids"].tolist() == [ids[sample, instance].item() for _, instance, _ in pairs]
        for box, (_, instance, _) in zip(found["boxes_3d"].tolist(), pairs):
            a = anchors[sample, instance].tolist()
            wanted = [*a[:3], *map(math.exp, a[3:6]), math.atan2(a[6], a[7]), *a[8:10]]
            assert box == pytest.approx(wanted, rel=1e-6)


def test_lines():
    logits, lines = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    outputs = {"classification": [logits], "prediction": [lines]}
    for sample, found in enumerate(decode_lines(outputs)):
        pairs = [(sigmoid(logits[sample, i, label].item()), i, label) for i in range(5) for label in range(3)]
        pairs = sorted(pairs, reverse=True)[:5]
        assert found["map_scores"].tolist() == pytest.approx([score for score, _, _ in pairs], rel=1e-6)
        assert found["map_labels"].tolist() == [label for _, _, label in pairs]
        for line, (_, instance, _) in zip(found["map_lines"], pairs):
            assert torch.equal(line, lines[sample, instance].view(4, 2))


def test_what_a_model_decodes():
    model = trained()
    found = model.decode(model(*frame(2)))
    assert len(found) == 2
    shapes = {name: tuple(tensor.shape) for name, tensor in found[1].items()}
    assert shapes == {
        "boxes_3d": (6, 9),
        "scores_3d": (6,),
        "labels_3d": (6,),
        "instance_ids": (6,),
        "map_lines": (NUM_LINES, NUM_POINTS, 2),
        "map_scores": (NUM_LINES,),
        "map_labels": (NUM_LINES,),
    }
