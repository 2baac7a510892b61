"""What lies in the wheel and in the sdist, and what `pip` leaves in an environment that the source folder hides."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from reimplementation._installation import hidden_installation
from tests.install.artifacts import check_sdist, check_wheel
from tests.install.surroundings import copy_tree, environment


def test_the_files_of_wheel_and_sdist(tmp_path):
    copy_tree(tmp_path / "tree")
    build = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=tmp_path / "tree",
        env=environment(REIMPLEMENTATION_NO_EXT="1"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    check_wheel(next(tmp_path.glob("tree/dist/*.whl")), built=False)
    check_sdist(next(tmp_path.glob("tree/dist/*.tar.gz")))


def install(site: Path, *, built: bool) -> Path:
    """A site-packages with the package in it, as far as the search for it goes; returns the package's folder."""
    package = site / "reimplementation"
    package.mkdir(parents=True)
    metadata = site / "reimplementation-0.1.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: reimplementation\n")
    if built:
        (package / "_C.abi3.so").touch()
    return package


def clone(folder: Path) -> Path:
    """A source folder, as far as the search for what it hides goes; returns the package in it."""
    package = folder / "clone" / "reimplementation"
    (package / "ops" / "csrc").mkdir(parents=True)
    return package


def test_a_source_folder_that_hides_an_installed_package_says_so(tmp_path, monkeypatch):
    source = clone(tmp_path)
    package = install(tmp_path / "site", built=True)
    monkeypatch.setattr(sys, "path", [str(source.parent), str(tmp_path / "site")])
    said = hidden_installation(source)
    assert f"the source folder {source.parent}, which hides the package installed in {package.parent}" in said
    assert "run from another folder, or build the kernels in this one" in said


def test_nothing_is_hidden(tmp_path, monkeypatch):
    source = clone(tmp_path)
    (source.parent / "reimplementation.egg-info").mkdir()
    (source.parent / "reimplementation.egg-info" / "PKG-INFO").write_text("Name: reimplementation\n")
    monkeypatch.setattr(sys, "path", [str(source.parent)])
    assert hidden_installation(source) is None, "the sources hide nothing but themselves"
    unbuilt = install(tmp_path / "unbuilt", built=False)
    monkeypatch.setattr(sys, "path", [str(source.parent), str(unbuilt.parent)])
    assert hidden_installation(source) is None, "what they hide has no kernels either"
    built = install(tmp_path / "built", built=True)
    monkeypatch.setattr(sys, "path", [str(built.parent)])
    assert hidden_installation(built) is None, "the installed package is the one that runs"
    monkeypatch.setattr(sys, "path", [str(unbuilt.parent), str(built.parent)])
    assert hidden_installation(unbuilt) is None, "an installed package is no source folder, whatever comes behind it"
