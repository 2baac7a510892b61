"""The assignment against brute force, and the costs against loops."""

import itertools
import math

import pytest
import torch

from reimplementation.models.sparsedrive.matching import assign, box_cost, focal_cost, line_cost

pytest.importorskip("scipy")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(("num_predictions", "counts"), [(5, [3, 0, 2]), (2, [4, 1, 3])])
def test_assign(num_predictions, counts):
    cost = torch.randn(2, 3, num_predictions, 4)
    assigned = assign(cost, counts)
    for layer, sample in itertools.product(range(2), range(3)):
        row, count = assigned[layer, sample].tolist(), counts[sample]
        pairs = [(prediction, target) for prediction, target in enumerate(row) if target >= 0]
        assert len(pairs) == len({target for _, target in pairs}) == min(num_predictions, count)
        total = sum(cost[layer, sample, prediction, target].item() for prediction, target in pairs)
        assert total == pytest.approx(least(cost[layer, sample, :, :count]), abs=1e-5)


def least(cost: torch.Tensor) -> float:
    """The least sum of any assignment, tried one by one."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    choices = itertools.permutations(range(cost.shape[0]), cost.shape[1])
    return min(sum(cost[row, column].item() for column, row in enumerate(rows)) for rows in choices)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_pair_without_a_cost_is_left_alone(bad):
    cost = torch.tensor([[[[bad, 1.0], [3.0, bad]]]])
    assert assign(cost, [2]).tolist() == [[[1, 0]]]


def test_focal_cost():
    logits, labels = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[0, 3], [2, 2]])
    cost = focal_cost(logits, labels)
    for sample, prediction, target in itertools.product(range(2), range(3), range(2)):
        p = 1 / (1 + math.exp(-logits[sample, prediction, labels[sample, target]].item()))
        wanted = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
        assert cost[sample, prediction, target].item() == pytest.approx(wanted, rel=1e-9)


def test_certain_scores_have_a_cost():
    assert focal_cost(torch.tensor([[[200.0, -200.0]]]), torch.tensor([[0, 1]])).isfinite().all()


def test_box_cost():
    predictions, targets, weights = torch.randn(2, 3, 10), torch.randn(2, 4, 10), torch.rand(2, 4, 10)
    cost = box_cost(predictions, targets, weights)
    for sample, prediction, target in itertools.product(range(2), range(3), range(4)):
        difference = (predictions[sample, prediction] - targets[sample, target]).abs() * weights[sample, target]
        assert cost[sample, prediction, target].item() == pytest.approx(difference.sum().item(), rel=1e-5)


def test_line_cost():
    predictions, targets = torch.rand(2, 3, 8), torch.rand(2, 4, 5, 8)
    targets[0, 0, 0] = predictions[0, 0] + 0.004  # within beta, where the distance is quadratic
    cost, permutation = line_cost(predictions, targets, beta=0.01)
    for sample, prediction, target in itertools.product(range(2), range(3), range(4)):
        distances = []
        for order in targets[sample, target]:
            differences = (predictions[sample, prediction] - order).abs().tolist()
            distances.append(sum(d * d / 0.02 if d < 0.01 else d - 0.005 for d in differences) / 4)
        assert cost[sample, prediction, target].item() == pytest.approx(min(distances), rel=1e-5)
        assert permutation[sample, prediction, target].item() == distances.index(min(distances))


def test_costs_keep_no_graph():
    logits = torch.randn(2, 5, 3, requires_grad=True)
    boxes, lines = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 8, requires_grad=True)
    costs = (
        focal_cost(logits, torch.zeros(2, 3, dtype=torch.int64)),
        box_cost(boxes, torch.randn(2, 3, 4), torch.ones(2, 3, 4)),
        line_cost(lines, torch.randn(2, 3, 2, 8), 1.0)[0],
    )
    assert not any(cost.requires_grad for cost in costs)
