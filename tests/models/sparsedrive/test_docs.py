"""The detector's page runs as it is typed, on a small detector."""

import dataclasses

import pytest
import torch

from reimplementation.models import sparsedrive
from tests.markdown import ROOT, code_blocks
from tests.models.sparsedrive.small import CONFIG, trained

PAGE = ROOT / "docs" / "sparsedrive.md"


def run(blocks, monkeypatch, tmp_path) -> dict:
    """The names that the blocks leave behind, one after the other."""
    small = dataclasses.replace(CONFIG, num_cams=6, map=dataclasses.replace(CONFIG.map, num_points=20))
    monkeypatch.setattr(sparsedrive, "sparsedrive_small", lambda: trained(small))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec("\n".join(blocks), names)
    return names


def test_page(monkeypatch, tmp_path, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("yaml")
    *blocks, _export = code_blocks(PAGE, "python")
    names = run(blocks, monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert "'boxes_3d': (6, 9)" in printed and "parameters loaded" in printed
    assert set(names["losses"]) >= {"det_loss_cls_0", "det_loss_yns_2", "map_loss_line_1"}


@pytest.mark.slow
def test_export(monkeypatch, tmp_path):
    first, *_, export = code_blocks(PAGE, "python")
    names = run([first, export], monkeypatch, tmp_path)
    arguments = names["images"], names["metas"]["projection_mat"], names["metas"]["image_wh"]
    with torch.no_grad():
        expected = names["SingleFrame"](names["model"])(*arguments)
        for got, wanted in zip(names["program"].module()(*arguments), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
