"""The average of parameters over the steps."""

import dataclasses

import pytest
import torch
from torch import nn

from reimplementation.training import checkpoint
from reimplementation.training.averaging import ParameterAverage
from reimplementation.training.loop import Training
from tests.training.tiny import ALONE, TINY

pytest.importorskip("scipy")


def test_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(8.0)
    average = ParameterAverage(model, decay=0.5)
    for step, (weight, expected) in enumerate([(4.0, 4.4), (0.0, 0.8)]):  # decays 1/10, 2/11
        model.weight.data.fill_(weight)
        average.update(step)
        assert average.state_dict()["weight"].item() == pytest.approx(expected, rel=0.01)
    model.weight.data.fill_(2.0)
    average.update(1000)
    assert average.state_dict()["weight"].item() == pytest.approx((0.8 + 2) / 2, rel=0.01)
    again = ParameterAverage(model, decay=0.5)
    again.load_state_dict(average.state_dict())
    assert torch.equal(again.state_dict()["weight"], average.state_dict()["weight"])


def test_a_training_goes_on_with_its_average(tmp_path):
    config = dataclasses.replace(TINY, num_steps=2, average_decay=0.9)
    Training(config, tmp_path / "whole", ALONE).run(lambda row: None, lambda: False)
    first = Training(config, tmp_path / "parts", ALONE)
    first.run(lambda row: None, lambda: True)
    Training(config, tmp_path / "parts", ALONE).run(lambda row: None, lambda: False)
    (_, whole), (_, parts) = (checkpoint.load_newest(tmp_path / name) for name in ("whole", "parts"))
    assert whole["average"].keys() == dict(first.model.named_parameters()).keys()
    for name, value in whole["average"].items():
        assert torch.equal(parts["average"][name], value), name
    assert any(not torch.equal(whole["model"][name], value) for name, value in whole["average"].items())
    judged = checkpoint.parameters_to_judge(whole)
    assert all(torch.equal(judged[name], value) for name, value in whole["average"].items())
    assert judged.keys() == whole["model"].keys()
