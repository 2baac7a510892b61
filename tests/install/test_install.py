"""Installing as a person does, by pip from a copy of the tree into an empty folder.

Without a compiler the package installs all the same, says on the terminal what was left out, and runs.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.install.surroundings import copy_tree, environment

NO_COMPILER = "no C++ compiler: neither c++ nor g++ is on the PATH"


def pip_install(tree: Path, target: Path, **settings: str) -> subprocess.CompletedProcess:
    """Installs a copy of the tree into the folder `target`, at a terminal of its own; stdout is what that shows."""
    terminal = shutil.which("script")
    if terminal is None:
        pytest.skip("there is no script, which makes a terminal")
    copy_tree(tree)
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run(
        [terminal, "-qec", shlex.join([*command, "--target", str(target), str(tree)]), os.devnull],
        env=environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    """Variables under which nothing is on the PATH."""
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty")}


def test_without_a_compiler_it_installs_and_runs_on_grid_sample(tmp_path, no_compiler):
    site = tmp_path / "site"
    done = pip_install(tmp_path / "tree", site, **no_compiler)
    assert done.returncode == 0, done.stdout
    said = (
        f"reimplementation: CPU and CUDA kernels left out, and ops on such devices run on plain PyTorch: {NO_COMPILER}"
    )
    assert said in done.stdout

    record = json.loads((site / "reimplementation" / "_build.json").read_text())
    assert record["cpu"] is False and record["cuda"] is False
    assert record["reasons"]["cpu"].startswith(NO_COMPILER)
    assert not list(site.glob("reimplementation/_C.abi3*"))

    script = """
import warnings, torch, reimplementation
from reimplementation import ops
features, shapes, starts = ops.feature_maps_format([torch.ones(1, 2, 4, 3, 5)])
location = torch.full((1, 6, 7, 2, 2), 0.5)
weights = torch.full((1, 6, 7, 2, 1, 2), 1 / 14)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    output = ops.deformable_aggregation_function(features, shapes, starts, location, weights)
torch.testing.assert_close(output, torch.ones(1, 6, 4))
print(reimplementation.__file__, ops.available_backends("cpu"), *(str(warning.message) for warning in caught))
"""
    # -S leaves out the import hook of an editable install, which would find that install's extension.
    ran = subprocess.run(
        [sys.executable, "-S", "-c", script],
        env=environment(PYTHONPATH=os.pathsep.join([str(site), *sys.path])),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert str(site) in ran.stdout
    assert "['grid_sample']" in ran.stdout
    assert NO_COMPILER in ran.stdout


def test_require_ext_without_a_compiler_fails_and_says_why(tmp_path, no_compiler):
    done = pip_install(tmp_path / "tree", tmp_path / "site", REQUIRE_EXT="1", **no_compiler)
    assert done.returncode != 0
    assert f"REQUIRE_EXT=1, but CPU and CUDA kernels would be left out: {NO_COMPILER}" in done.stdout
    assert (
        "set REIMPLEMENTATION_NO_CUDA=1; without any, on plain PyTorch alone, REIMPLEMENTATION_NO_EXT=1" in done.stdout
    )
