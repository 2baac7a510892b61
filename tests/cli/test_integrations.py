"""`integrations` lists what is known beside what is installed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from reimplementation.cli import main
from reimplementation.integrations import clients

CONSTRAINTS = Path(__file__).parents[2] / "constraints-clients.txt"


def test_text(capsys, monkeypatch):
    monkeypatch.setattr(clients.metadata, "version", lambda package: f"1.0+{package}")
    assert main(["integrations"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^transformers +1\.0\+transformers +5\.\d+\.\d+.* Deformable DETR", said, re.MULTILINE)
    assert "SparseDrive and Sparse4D: DeformableFeatureAggregation" in said


def test_what_is_not_installed(capsys, monkeypatch):
    def missing(package):
        raise clients.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(clients.metadata, "version", missing)
    assert main(["integrations", "--json"]) == 0
    packages = json.loads(capsys.readouterr().out)["packages"]
    assert all(package["installed"] is None and package["tested"] and package["models"] for package in packages)


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    for client in clients.PACKAGES:
        assert pinned[client.package] in client.tested, client.package
