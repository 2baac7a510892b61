"""Checkpoint files: the round trip, what does not fit, and what is no checkpoint."""

import pickle
import re

import pytest
import torch
from torch import nn

from reimplementation.models.sparsedrive import load_checkpoint
from tests.models.sparsedrive.small import DENOISING, frame, trained


@pytest.fixture(scope="module")
def source():
    return trained(seed=1)


@pytest.fixture
def path(source, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"meta": {"epoch": 100, "time": "today"}, "state_dict": source.state_dict()}, path)
    return path


def test_round_trip(source, path):
    model = trained(seed=0)
    report = load_checkpoint(model, path)
    assert report == f"{len(source.state_dict())} parameters loaded"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name
    with torch.no_grad():
        expected = source(*frame(1))["det"]["prediction"][-1]
        assert torch.equal(model(*frame(1))["det"]["prediction"][-1], expected)
    source.reset()


def test_a_bare_dict(source, tmp_path):
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    assert "parameters loaded" in load_checkpoint(trained(), tmp_path / "bare.pth")


def test_of_another_model(source, tmp_path):
    """What is missing, unknown or of another shape is listed; nothing is loaded."""
    parameters = source.state_dict()
    parameters["head.motion_plan_head.motion_anchor"] = torch.zeros(2)
    del parameters["depth_branch.depth_layers.0.bias"]
    parameters["img_backbone.conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save({"state_dict": parameters}, tmp_path / "other.pth")
    model = trained(seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as raised:
        load_checkpoint(model, tmp_path / "other.pth")
    for part in (
        "1 missing: depth_branch.depth_layers.0.bias",
        "1 unknown: head.motion_plan_head.motion_anchor",
        "1 of another shape: img_backbone.conv1.weight (64, 3, 3, 3), not (64, 3, 7, 7)",
    ):
        assert part in str(raised.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])

    report = load_checkpoint(model, tmp_path / "other.pth", strict=False)
    assert report.startswith(f"{len(before) - 2} parameters loaded; 1 missing")
    assert torch.equal(model.state_dict()["img_backbone.conv1.weight"], before["img_backbone.conv1.weight"])
    assert torch.equal(
        model.state_dict()["img_neck.fpn_convs.0.conv.bias"], parameters["img_neck.fpn_convs.0.conv.bias"]
    )


def test_of_the_other_family(path):
    with pytest.raises(ValueError, match=r"missing: head\.instance_bank\.anchor, .* and \d+ more"):
        load_checkpoint(trained(DENOISING), path)


def test_foreign(tmp_path):
    torch.save(nn.Linear(2, 3).state_dict(), tmp_path / "foreign.pth")
    for strict in (True, False):
        with pytest.raises(ValueError, match="does not fit SparseDrive: 0 parameters loaded"):
            load_checkpoint(trained(), tmp_path / "foreign.pth", strict=strict)


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("the file's code ran",))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_hostile(tmp_path, save):
    save({"state_dict": {"img_backbone.conv1.weight": Hostile()}}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'hostile.pth'} holds more than tensors")):
        load_checkpoint(trained(), tmp_path / "hostile.pth")


@pytest.mark.parametrize("kept", [0, 1, 100, 10_000, -100])
def test_truncated(path, kept):
    contents = path.read_bytes()
    path.write_bytes(contents[:kept])
    with pytest.raises(ValueError, match=re.escape(str(path))):
        load_checkpoint(trained(), path)


@pytest.mark.parametrize("value", [[1, 2], {"state_dict": 3}, {"epoch": 1, "weights": {}}, torch.zeros(3)])
def test_not_a_dict_of_tensors(tmp_path, value):
    torch.save(value, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="must hold a dict of tensors"):
        load_checkpoint(trained(), tmp_path / "odd.pth")


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_checkpoint(trained(), tmp_path / "nothing.pth")
