"""What docs/vit.md tells people to type, typed."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from reimplementation import cli
from reimplementation.models.backbones.vit import ViTConfig, dinov3_config

from .test_vit_dinov3 import FFN, HIDDEN, state_dict

pytest.importorskip("yaml")

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "vit.md").read_text()
COMMANDS = re.search(r"```sh\n(.*?)```", TEXT, re.DOTALL)[1].strip().splitlines()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)


def test_python():
    names: dict = {}
    for block in blocks("python"):
        exec(block, names)
    assert [tuple(level.shape) for level in names["levels"]] == [
        (6, 256, 16, 24), (6, 256, 8, 12), (6, 256, 4, 6), (6, 256, 2, 3)
    ]  # fmt: skip
    assert names["pixels"].shape == (1, 3, 64, 96) and names["in_place"].shape == (2, 24, 64)
    assert names["target"].sum(1).tolist() == [6, 6]
    small = {"depth": 2, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 2}
    names["config"] = dinov3_config("vits16").replace(**small)
    torch.save(state_dict(swiglu=False), "dinov3.pth")
    assert torch.equal(names["load"]("dinov3.pth").cls_tokens, state_dict(swiglu=False)["cls_token"])


def test_yaml():
    (text,) = blocks("yaml")
    assert list(ViTConfig.from_yaml(text).heads) == ["tokens", "pixels"]


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) if ".pt2" in c else c for c in COMMANDS],
    ids=lambda command: command.split()[4],
)
def test_commands(command):
    if "--model" in command:
        assert cli.main(shlex.split(COMMANDS[-2])[3:]) == 0  # which writes the package
    if "benchmark" in command:
        pytest.importorskip("rich")
        command += " --repeats 1 --dpi 40"
    assert cli.main(shlex.split(command)[3:]) == 0


def test_every_field_has_its_row():
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(field.name for field in fields(ViTConfig))
