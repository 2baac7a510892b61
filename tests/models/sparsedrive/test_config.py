"""The configuration: its defaults, its YAML form, and what it refuses."""

import dataclasses
import re

import pytest

from reimplementation.models.sparsedrive import SparseDriveConfig
from reimplementation.models.sparsedrive.config import BankConfig, DenoisingConfig
from tests.models.sparsedrive.small import CONFIG, DENOISING

pytest.importorskip("yaml")


@pytest.mark.parametrize("config", [SparseDriveConfig(), CONFIG, DENOISING], ids=["default", "small", "denoising"])
def test_round_trip(config, tmp_path):
    config.to_yaml(tmp_path / "config.yaml")
    assert SparseDriveConfig.from_yaml(tmp_path / "config.yaml") == config


def test_what_a_file_leaves_out_is_the_default(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("depth: 18\nmap: null\ndet: {num_decoders: 2, max_distance: 40}\n")
    config = SparseDriveConfig.from_yaml(path)
    assert (config.depth, config.map, config.embed_dims) == (18, None, 256)
    assert config.det == dataclasses.replace(SparseDriveConfig().det, num_decoders=2, max_distance=40.0)
    path.write_text("")
    assert SparseDriveConfig.from_yaml(path) == SparseDriveConfig()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("detph: 18", ValueError, "unknown keys: detph; known are family, depth"),
        ("det: {bank: {num_anchors: 9, num_temp: 1}}", ValueError, "unknown keys of det.bank: num_temp"),
        ("det: {bank: {num_anchors: 9}}", ValueError, "det.bank must hold num_temp_instances; got num_anchors"),
        ("depth: fifty", TypeError, "depth must be of type int; got 'fifty'"),
        ("depth: true", TypeError, "depth must be of type int; got True"),
        ("map: 3", TypeError, "map must be a mapping; got int"),
        ("det: {classes: car}", TypeError, "det.classes must be a list; got 'car'"),
        ("det: {cost_weights: [1, 2]}", ValueError, "cost_weights must hold 10 values; got 2"),
        ("det: {small_classes: [cone]}", ValueError, "small_classes must be some of classes, car, truck"),
        ("- depth", TypeError, "the configuration must be a mapping; got list"),
        ("depth: [", ValueError, "config.yaml"),
        ("family: bevformer", ValueError, "family must be one of sparsedrive, sparse4d; got 'bevformer'"),
        ("family: sparse4d", ValueError, "set map to None"),
        ("embed_dims: 100", ValueError, "embed_dims must be a multiple of 8"),
        ("num_cams: 0", ValueError, "num_cams must be at least 1; got 0"),
        ("num_levels: 5", ValueError, "num_levels must be 1 to 4"),
        ("num_depth_levels: 5", ValueError, "num_depth_levels must be in [0, num_levels=4]"),
    ],
)
def test_refused(text, error, message, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(error, match=re.escape(message)):
        SparseDriveConfig.from_yaml(tmp_path / "config.yaml")


def test_out_of_range():
    with pytest.raises(ValueError, match=r"num_temp_instances must be in \[0, num_anchors=5\); got 5"):
        BankConfig(num_anchors=5, num_temp_instances=5)
    with pytest.raises(ValueError, match=r"num_temp_groups must be in \[0, num_groups=1\]; got 2"):
        DenoisingConfig(num_groups=1, num_temp_groups=2)
    with pytest.raises(ValueError, match="num_single_frame_decoders must be in"):
        dataclasses.replace(SparseDriveConfig().det, num_decoders=2, num_single_frame_decoders=3)
