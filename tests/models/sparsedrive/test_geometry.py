"""Boxes in their two forms, rigid motion, and the anchors that an untrained model starts from."""

import math

import pytest
import torch

from reimplementation.models.sparsedrive.geometry import (
    between_frames,
    decode_boxes,
    encode_boxes,
    spread_boxes,
    spread_lines,
)
from tests.models.sparsedrive.small import pose


def test_a_box_by_hand():
    box = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 1.5, math.pi / 6, 0.5, -0.5], dtype=torch.float64)
    wanted = [1, 2, 3, math.log(4), math.log(2), math.log(1.5), 0.5, math.sqrt(3) / 2, 0.5, -0.5]
    assert encode_boxes(box).tolist() == pytest.approx(wanted)
    assert decode_boxes(torch.tensor(wanted, dtype=torch.float64)).tolist() == pytest.approx(box.tolist())


def test_encoding_and_back():
    torch.manual_seed(0)
    boxes = torch.randn(2, 7, 9, dtype=torch.float64)
    boxes[..., 3:6] = boxes[..., 3:6].exp()
    boxes[..., 6] = boxes[..., 6].clamp(-3, 3)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes)), boxes)


def test_length_of_sine_and_cosine_does_not_matter():
    anchor = torch.tensor([0.0, 0, 0, 0, 0, 0, 3 * math.sin(2.5), 3 * math.cos(2.5), 0, 0, 0])
    assert decode_boxes(anchor)[6].item() == pytest.approx(2.5)


def test_between_frames():
    source, target = torch.stack([pose(0.0), pose(1.0)]), torch.stack([pose(0.5), pose(3.0)])
    torch.testing.assert_close(between_frames(source, target), torch.linalg.inv(target) @ source)
    torch.testing.assert_close(between_frames(source, source), torch.eye(4, dtype=torch.float64).repeat(2, 1, 1))


def test_spread_boxes():
    anchors = spread_boxes(900, radius=55.0)
    distance = anchors[:, :2].norm(dim=-1)
    assert anchors.shape == (900, 11) and distance.max() < 55
    for ring in range(5):  # an even spread has as many anchors as a ring has area
        share = ((distance >= 11 * ring) & (distance < 11 * (ring + 1))).float().mean()
        assert share.item() == pytest.approx((2 * ring + 1) / 25, abs=0.01)
    assert torch.cdist(anchors[:, :2], anchors[:, :2]).fill_diagonal_(9).min() > 1.5
    torch.testing.assert_close(decode_boxes(anchors)[:, 3:7], torch.tensor([1, 1, 1, math.pi / 2]).repeat(900, 1))


@pytest.mark.parametrize("count", [1, 5, 100])
def test_spread_lines(count):
    lines = spread_lines(count, 20, (30.0, 60.0)).unflatten(1, (20, 2))
    assert len({tuple(line.flatten().tolist()) for line in lines}) == count
    assert lines[..., 0].abs().max() <= 15 and lines[..., 1].abs().max() <= 30.0001
    steps = lines.diff(dim=1)
    assert (steps[..., 0] == 0).all() and (steps[..., 1] > 0).all()
