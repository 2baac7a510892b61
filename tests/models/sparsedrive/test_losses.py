"""Each loss against loops over layers, instances and values in float64."""

import dataclasses
import itertools
import math
import re

import pytest
import torch

from reimplementation.models.sparsedrive.box_loss import box_losses
from reimplementation.models.sparsedrive.config import BOX_CLASSES
from reimplementation.models.sparsedrive.depth import DepthBranch, depth_loss
from reimplementation.models.sparsedrive.line_loss import line_losses, permutations
from reimplementation.models.sparsedrive.losses import focal_loss, gaussian_focal_loss, mean_over_ranks
from reimplementation.models.sparsedrive.matching import assign
from reimplementation.models.sparsedrive.targets import pad_boxes, pad_lines
from tests.models.sparsedrive.small import BOX_HEAD, MAP_HEAD, NUM_POINTS, frame, targets, trained

pytest.importorskip("scipy")
CAR, BARRIER, CONE = (BOX_CLASSES.index(name) for name in ("car", "barrier", "traffic_cone"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def focal(logits: list[float], label: int) -> float:
    """The sigmoid focal loss of one instance, class by class."""
    total = 0.0
    for index, logit in enumerate(logits):
        p = sigmoid(logit)
        total -= 0.25 * (1 - p) ** 2 * math.log(p) if index == label else 0.75 * p**2 * math.log(1 - p)
    return total


def test_focal_loss():
    logits, labels = randn(2, 3, 4), torch.tensor([[0, 3, 4], [-1, 2, -3]])  # 4, -1 and -3 are background
    loss = focal_loss(logits, labels)
    for place in itertools.product(range(2), range(3)):
        assert loss[place].item() == pytest.approx(focal(logits[place].tolist(), labels[place].item()))


def test_gaussian_focal_loss():
    for score, target in ((0.3, 1.0), (0.3, 0.0), (0.9, 0.5)):
        wanted = -((1 - score) ** 2) * math.log(score) if target == 1 else 0.0
        wanted -= score**2 * math.log(1 - score) * (1 - target) ** 4
        loss = gaussian_focal_loss(torch.tensor(score, dtype=torch.float64), torch.tensor(target))
        assert loss.item() == pytest.approx(wanted, rel=1e-6)


def test_counts_are_averaged_over_processes(monkeypatch):
    """Two processes with 3 and 7 matched: both divide by 5; with nothing matched anywhere, by 1."""
    assert mean_over_ranks(torch.tensor([3, 0])).tolist() == [3, 1]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(torch.tensor([7, 0])))
    own = torch.tensor([3.0, 0.0])
    assert mean_over_ranks(own).tolist() == [5, 1]
    assert own.tolist() == [3, 0]


def scene() -> tuple[dict, dict]:
    """Two layers of predictions near the targets of two samples, and the targets: classes with rules of their own."""
    labels = [torch.tensor([CAR, BARRIER, CONE]), torch.tensor([BARRIER])]
    boxes = [randn(3, 9), randn(1, 9)]
    for sample in boxes:
        sample[:, 3:6] = sample[:, 3:6].exp()
    boxes[0][0, 7:] = math.nan
    outputs = {"classification": [randn(2, 6, 10) - 2 for _ in range(2)], "quality": [randn(2, 6, 2) for _ in range(2)]}
    outputs["prediction"] = [randn(2, 6, 11) for _ in range(2)]
    return outputs, {"labels_3d": labels, "boxes_3d": boxes}


def expected_box_losses(outputs: dict, labels, boxes) -> dict[str, float]:
    """The terms by loops; the assignment alone is taken from the package, which is tested against brute force."""
    terms: dict[str, float] = {}
    for depth, (logits, anchors, quality) in enumerate(zip(*(outputs[key] for key in outputs))):
        cls = box = cns = yns = 0.0
        num_matched = sum(len(sample) for sample in labels)
        for sample in range(2):
            wanted = [encoded(row) for row in boxes[sample].tolist()]
            weights = [value_weights(row, label) for row, label in zip(wanted, labels[sample].tolist())]
            cost = torch.zeros(1, 1, 6, len(wanted), dtype=torch.float64)
            for i, j in itertools.product(range(6), range(len(wanted))):
                p = sigmoid(logits[sample, i, labels[sample][j]].item())
                cost[0, 0, i, j] = 2 * (-0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p))
                for k, w in enumerate((2, 2, 2, 0.5, 0.5, 0.5, 0, 0, 0, 0)):
                    if weights[j][k]:
                        cost[0, 0, i, j] += 0.25 * w * weights[j][k] * abs(anchors[sample, i, k].item() - wanted[j][k])
            for i, j in enumerate(assign(cost, [len(wanted)])[0, 0].tolist()):
                row = logits[sample, i].tolist()
                label = 10 if j < 0 else labels[sample][j].item()
                cls += 2.0 * focal(row, label)
                if j < 0 or sigmoid(max(row)) <= 0.05:
                    continue
                found, target = anchors[sample, i].tolist(), list(wanted[j])
                if label == BARRIER and found[6] * target[6] + found[7] * target[7] < 0:
                    target[6], target[7] = -target[6], -target[7]
                for k, w in enumerate((2, 2, 2, 1, 1, 1, 1, 1, 1, 1)):
                    if weights[j][k]:
                        box += 0.25 * w * weights[j][k] * abs(found[k] - target[k])
                nearness = math.exp(-math.dist(found[:3], target[:3]))
                p, q = (sigmoid(value) for value in quality[sample, i].tolist())
                cns -= nearness * math.log(p) + (1 - nearness) * math.log(1 - p)
                agrees = found[6] * target[6] + found[7] * target[7] > 0
                yns -= (1 - q) ** 2 * math.log(q) if agrees else q**2 * math.log(1 - q)
        for name, value in {"cls": cls, "box": box, "cns": cns, "yns": yns}.items():
            terms[f"loss_{name}_{depth}"] = value / num_matched
    return terms


def encoded(box: list[float]) -> list[float]:
    x, y, z, length, width, height, yaw, vx, vy = box
    return [x, y, z, math.log(length), math.log(width), math.log(height), math.sin(yaw), math.cos(yaw), vx, vy]


def value_weights(target: list[float], label: int) -> list[float]:
    weights = (2, 2, 2, 1, 1, 1, 0, 0, 1, 1) if label == CONE else (1,) * 10
    return [0 if math.isnan(value) else weight for value, weight in zip(target, weights)]


def test_box_losses():
    outputs, wanted = scene()
    padded = pad_boxes(wanted, BOX_HEAD, outputs["prediction"][0])
    terms = box_losses(outputs, padded, BOX_HEAD)
    expected = expected_box_losses(
        {key: outputs[key] for key in ("classification", "prediction", "quality")}, *wanted.values()
    )
    assert set(terms) == set(expected)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-6)
    assert sum(expected[f"loss_box_{depth}"] for depth in range(2)) > 0


def test_unknown_values_give_no_gradient_but_finite_ones():
    outputs, wanted = scene()
    outputs["prediction"] = [layer.requires_grad_() for layer in outputs["prediction"]]
    padded = pad_boxes(wanted, BOX_HEAD, outputs["prediction"][0])
    sum(box_losses(outputs, padded, BOX_HEAD).values()).backward()
    for layer in outputs["prediction"]:
        assert layer.grad.isfinite().all() and layer.grad.any()
        assert not layer.grad[..., 10].any()  # nobody knows how fast a box rises


def test_quality_does_not_move_boxes():
    outputs, wanted = scene()
    outputs["prediction"] = [layer.requires_grad_() for layer in outputs["prediction"]]
    padded = pad_boxes(wanted, BOX_HEAD, outputs["prediction"][0])
    config = dataclasses.replace(BOX_HEAD, loss_box=0.0)
    sum(box_losses(outputs, padded, config).values()).backward()
    assert not any(layer.grad.any() for layer in outputs["prediction"])


def line_scene() -> tuple[dict, dict]:
    outputs = {"classification": [randn(2, 5, 3) for _ in range(2)], "quality": [None, None]}
    outputs["prediction"] = [randn(2, 5, 2 * NUM_POINTS) * 10 for _ in range(2)]
    lines = [randn(2, NUM_POINTS, 2) * 10, randn(1, NUM_POINTS, 2) * 10]
    lines[0][1, -1] = lines[0][1, 0]  # closed
    return outputs, {"map_labels": [torch.tensor([1, 0]), torch.tensor([2])], "map_lines": lines}


def orders(line: list) -> list[list]:
    """The same line, point by point from any start if it is closed."""
    if line[0] != line[-1]:
        return [line, line[::-1]]
    ring = line[:-1]
    forwards = [ring[start:] + ring[:start] for start in range(len(ring))]
    closed = [points + points[:1] for points in forwards]
    return closed + [points[::-1] for points in closed]


def test_permutations():
    _, wanted = line_scene()
    for line in wanted["map_lines"][0]:
        found = {tuple(map(tuple, order)) for order in permutations(line).tolist()}
        assert found == {tuple(map(tuple, order)) for order in orders(line.tolist())}


def test_line_losses():
    outputs, wanted = line_scene()
    padded = pad_lines(wanted, MAP_HEAD, outputs["prediction"][0])
    terms = line_losses(outputs, padded, MAP_HEAD)
    expected: dict[str, float] = {}
    for depth, (logits, anchors) in enumerate(zip(outputs["classification"], outputs["prediction"])):
        cls = points = 0.0
        for sample in range(2):
            labels, lines = wanted["map_labels"][sample].tolist(), wanted["map_lines"][sample].tolist()
            distances = [[line_distance(anchor, line) for line in lines] for anchor in anchors[sample].tolist()]
            cost = torch.zeros(1, 1, 5, len(lines), dtype=torch.float64)
            for i, j in itertools.product(range(5), range(len(lines))):
                p = sigmoid(logits[sample, i, labels[j]].item())
                focal_part = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
                cost[0, 0, i, j] = focal_part + 10 * distances[i][j]
            for i, j in enumerate(assign(cost, [len(lines)])[0, 0].tolist()):
                cls += focal(logits[sample, i].tolist(), 3 if j < 0 else labels[j])
                if j >= 0 and sigmoid(logits[sample, i].max().item()) > 0.05:
                    points += 10 * distances[i][j]
        expected[f"loss_cls_{depth}"], expected[f"loss_line_{depth}"] = cls / 3, points / 3
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-6)


def line_distance(anchor: list[float], line: list) -> float:
    """Smooth L1 (beta 0.01) a point in fractions of the 30 x 60 m window, to the nearest order."""
    best = math.inf
    for order in orders(line):
        total = 0.0
        for (x, y), (tx, ty) in zip(zip(anchor[::2], anchor[1::2]), order):
            for difference in (abs(x - tx) / 30, abs(y - ty) / 60):
                total += difference**2 / 0.02 if difference < 0.01 else difference - 0.005
        best = min(best, total / NUM_POINTS)
    return best


def test_depth():
    branch = DepthBranch(8, num_levels=2).double()
    levels = [randn(4, 8, 3, 5), randn(4, 8, 2, 3)]
    focal_lengths = torch.tensor([[50.0, 200.0], [100.0, 100.0]])
    depths = branch(levels, focal_lengths)
    total = 0.0
    for layer, level, depth in zip(branch.depth_layers, levels, depths):
        logits = torch.einsum("nchw,c->nhw", level, layer.weight[0, :, 0, 0]) + layer.bias
        wanted = logits.exp().unflatten(0, (2, 2)) * focal_lengths[:, :, None, None] / 100
        torch.testing.assert_close(depth, wanted)
    measured = [torch.rand_like(depth) * 80 - 20 for depth in depths]
    for depth, lidar in zip(depths, measured):
        errors = [abs(min(d, 60) - t) for d, t in zip(depth.flatten().tolist(), lidar.flatten().tolist()) if t > 0]
        total += sum(errors) / len(errors) / 2
    assert depth_loss(depths, measured, 60.0).item() == pytest.approx(total, rel=1e-6)
    assert depth_loss(depths, [torch.zeros_like(depth) for depth in depths], 60.0).item() == 0


def test_loss_of_the_model():
    """SparseDrive's names; all that is trained gets a gradient."""
    model, (images, metas), wanted = trained().train(), frame(2), targets(2)
    outputs = model(images, metas)
    wanted["depth"] = [torch.rand_like(depth) * 50 for depth in outputs["depth"]]
    terms = model.loss(outputs, wanted)
    assert set(terms) == {
        *(f"det_loss_{name}_{depth}" for name in ("cls", "box", "cns", "yns") for depth in range(3)),
        *(f"map_loss_{name}_{depth}" for name in ("cls", "line") for depth in range(2)),
        "loss_dense_depth",
    }
    sum(terms.values()).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.fixture(scope="module")
def predicted():
    """A model, and its outputs of one frame."""
    model = trained()
    return model, model(*frame(1))


def test_a_head_without_targets_gets_no_loss(predicted):
    model, outputs = predicted
    wanted = targets(1)
    boxes = {name: wanted[name] for name in ("labels_3d", "boxes_3d")}
    assert {name.split("_")[0] for name in model.loss(outputs, boxes)} == {"det"}
    lines = {name: wanted[name] for name in ("map_labels", "map_lines")}
    assert {name.split("_")[0] for name in model.loss(outputs, lines)} == {"map"}


def test_samples_without_objects():
    model, (images, metas) = trained(), frame(2)
    outputs = model(images, metas)
    nothing = {
        "labels_3d": [torch.zeros(0, dtype=torch.int64)] * 2,
        "boxes_3d": [torch.zeros(0, 9)] * 2,
        "map_labels": [torch.zeros(0, dtype=torch.int64)] * 2,
        "map_lines": [torch.zeros(0, NUM_POINTS, 2)] * 2,
    }
    terms = model.loss(outputs, nothing)
    background = sum(focal(row.tolist(), 10) for row in outputs["det"]["classification"][0].flatten(0, 1))
    assert terms["det_loss_cls_0"].item() == pytest.approx(2 * background, rel=1e-4)
    assert {terms[f"det_loss_{name}_0"].item() for name in ("box", "cns", "yns")} == {0.0}
    assert terms["map_loss_line_0"].item() == 0


def test_layers_that_predicted_no_class_have_no_loss():
    model, (images, metas), wanted = trained(), frame(1), targets(1)
    outputs = model(images, metas, every_layer=False)
    terms = model.loss(outputs, wanted)
    assert "det_loss_cls_2" in terms and "det_loss_cls_1" not in terms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels_3d": [torch.tensor([10])]}, "labels_3d[0] must be in [0, 10); got 10 to 10"),
        ({"labels_3d": [torch.tensor([-1])]}, "labels_3d[0] must be in [0, 10); got -1 to -1"),
        ({"boxes_3d": [torch.zeros(1, 7)]}, "boxes_3d[0] (n, 9); got (1,) and (1, 7)"),
        ({"boxes_3d": [torch.zeros(2, 9)]}, "got (1,) and (2, 9)"),
        ({"boxes_3d": [torch.zeros(1, 9)]}, "boxes_3d[0] must have positive sizes; got 0.0"),
        ({"labels_3d": [], "boxes_3d": []}, "must hold an entry for each of 1 samples; got 0 and 0"),
        ({"map_lines": [torch.zeros(1, 3, 2)]}, f"map_lines[0] (n, {NUM_POINTS}, 2); got (1,) and (1, 3, 2)"),
    ],
)
def test_targets_that_do_not_fit(predicted, change, message):
    model, outputs = predicted
    with pytest.raises(ValueError, match=re.escape(message)):
        model.loss(outputs, {**targets(1), **change})
