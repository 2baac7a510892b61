"""Names and shapes of the parameters: those of the public checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import nn

from reimplementation.models.sparsedrive import sparse4d_v3, sparsedrive_small

REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "data" / "reference" / "sparsedrive_stage1_state_dict.txt"
PARAMETERS = {
    "img_backbone": 23_508_032,
    "img_neck": 3_344_384,
    "depth_branch": 771,
    "head.det_head": 21_303_045,
    "head.map_head": 27_519_650,
}


@pytest.fixture(scope="module")
def small() -> nn.Module:
    with torch.device("meta"):
        return sparsedrive_small()


@pytest.fixture(scope="module")
def sparse4d() -> nn.Module:
    with torch.device("meta"):
        return sparse4d_v3()


def shapes(model: nn.Module) -> dict[str, str]:
    return {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def test_sizes(small):
    assert len(small.state_dict()) == 1179
    for part, count in PARAMETERS.items():
        assert sum(parameter.numel() for parameter in small.get_submodule(part).parameters()) == count, part


def test_some_names(small):
    expected = {
        "img_neck.lateral_convs.3.conv.weight": "(256, 2048, 1, 1)",
        "head.det_head.instance_bank.anchor_handler.fix_scale": "(1, 3)",
        "head.det_head.anchor_encoder.vel_fc.11.weight": "(64,)",
        "head.det_head.layers.0.weights_fc.weight": "(416, 256)",
        "head.det_head.layers.4.attn.in_proj_weight": "(1536, 512)",
        "head.det_head.layers.38.layers.11.scale": "(11,)",
        "head.det_head.fc_before.weight": "(512, 256)",
        "head.map_head.layers.2.weights_fc.weight": "(9600, 256)",
        "head.map_head.layers.40.cls_layers.6.weight": "(3, 256)",
        "depth_branch.depth_layers.2.bias": "(1,)",
    }
    found = shapes(small)
    assert {name: found.get(name) for name in expected} == expected


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the list of the public model's parameters is not here")
def test_every_name(small, sparse4d):
    expected = dict(line.split(" ", 1) for line in REFERENCE.read_text().splitlines() if line)
    assert shapes(small) == expected
    boxes_alone = {
        name.replace("head.det_head.", "head."): shape for name, shape in expected.items() if "map_head" not in name
    }
    assert shapes(sparse4d) == boxes_alone


def test_sparse4d_has_the_same_parameters(small, sparse4d):
    of_boxes = {name.replace("head.det_head.", "head."): shape for name, shape in shapes(small).items()}
    assert shapes(sparse4d) == {name: shape for name, shape in of_boxes.items() if "map_head" not in name}


def test_anchors_of_boxes_are_trained_and_their_features_are_not(small):
    bank = small.head.det_head.instance_bank
    assert bank.anchor.requires_grad and not bank.instance_feature.requires_grad
    assert small.head.map_head.instance_bank.instance_feature.requires_grad


def test_stage_2_is_an_error():
    with pytest.raises(ValueError, match="stage must be 1"):
        sparsedrive_small(stage=2)
