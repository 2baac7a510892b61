"""Installing where something is missing: the package installs all the same, says what was left out, and runs.

The installs are real ones, by pip from a copy of the tree into an empty folder, with the packages of the
running interpreter. What depends on the tools alone is built from sources of a few lines, and nvcc is then a
script.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import toolchain
from build_tools.extension import build_extension
from build_tools.toolchain import Missing, Torch
from tests.install.surroundings import SETTINGS, copy_tree, environment, fake_toolkit

NO_COMPILER = {"CXX": "/nonexistent/c++", "CUDA_HOME": "/nonexistent"}
CUDA_13 = Torch("2.13.0+cu130", "13.0", (), "")

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")) or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler on Linux",
)


def pip_install(tree: Path, target: Path, **settings: str) -> subprocess.CompletedProcess:
    """Installs a copy of the tree, without what was built in it, into the folder `target`."""
    copy_tree(tree)
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-build-isolation", "--no-deps"]
    return subprocess.run(
        [*command, "--no-index", "--target", str(target), str(tree)],
        env=environment(**settings),
        capture_output=True,
        text=True,
    )


@pytest.fixture
def clean_settings(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """Sources laid out as the real ones are, whose library tells which halves it has (see `content_of`)."""
    folder = tmp_path / "csrc with spaces"
    for name in ("cpu", "cuda"):
        (folder / name).mkdir(parents=True)
    (folder / "library.cpp").write_text(
        "#ifdef REIMPLEMENTATION_WITH_CUDA\n"
        '#define CONTENT "cuda " REIMPLEMENTATION_CUDA_ARCHITECTURES\n'
        "#else\n"
        '#define CONTENT "cpu"\n'
        "#endif\n"
        'extern "C" __attribute__((visibility("default"))) const char* content() { return CONTENT; }\n'
    )
    (folder / "cuda" / "kernel.cu").write_text("int kernel;\n")
    return folder


def content_of(library: Path) -> str:
    function = ctypes.CDLL(str(library)).content
    function.restype = ctypes.c_char_p
    return function().decode()


def test_without_a_compiler_it_installs_and_runs_on_grid_sample(tmp_path):
    site = tmp_path / "site"
    done = pip_install(tmp_path / "tree", site, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    reason = "no C++ compiler: CXX=/nonexistent/c++ is not an executable"
    assert f"reimplementation: CPU kernels left out: {reason}\n" in done.stdout + done.stderr

    record = json.loads((site / "reimplementation" / "_build.json").read_text())
    assert record["cpu"] is False and record["cuda"] is False
    assert record["reasons"]["cpu"] == reason
    assert not list(site.glob("reimplementation/_C*"))
    assert not list(site.rglob("csrc")) and not (site / "build_tools").exists()

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
    assert reason in ran.stdout


def test_require_ext_without_a_compiler_fails_and_says_why(tmp_path):
    done = pip_install(tmp_path / "tree", tmp_path / "site", REQUIRE_EXT="1", **NO_COMPILER)
    assert done.returncode != 0
    assert "REQUIRE_EXT=1, but CPU kernels: no C++ compiler: CXX=" in done.stdout + done.stderr


@needs_compiler
def test_both_halves_are_built_where_the_tools_are_there(csrc, tmp_path, clean_settings):
    clean_settings.setenv("FORCE_CUDA", "1")
    clean_settings.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit")))
    record = build_extension(csrc, tmp_path / "build", tmp_path / "package" / "_C.abi3.so")
    assert record.reasons == {"cpu": None, "cuda": None}
    assert record.cpu and record.cuda and record.nvcc == "13.0"
    assert record.architectures == ["8.0", "9.0", "12.0+PTX"]
    assert content_of(tmp_path / "package" / "_C.abi3.so") == "cuda 8.0 9.0 12.0+PTX"
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == ["_C.abi3.so", "_build.json"]


@needs_compiler
@pytest.mark.parametrize(
    "toolkit, expected",
    [({"runs": False}, "libstdc++ went missing"), ({"compiles": False}, "kernel.cu(7): error: no such warp")],
    ids=["nvcc does not run", "nvcc does not compile"],
)
def test_a_broken_nvcc_is_named_and_the_cpu_kernels_are_built(
    csrc, tmp_path, clean_settings, capsys, toolkit, expected
):
    clean_settings.setenv("FORCE_CUDA", "1")
    clean_settings.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit", **toolkit)))
    library = tmp_path / "_C.abi3.so"
    record = build_extension(csrc, tmp_path / "build", library)
    assert record.cpu and not record.cuda and record.architectures == []
    assert expected in record.reasons["cuda"]
    assert f"reimplementation: CUDA kernels left out: {record.reasons['cuda']}\n" in capsys.readouterr().err
    assert content_of(library) == "cpu"

    clean_settings.setenv("REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="REQUIRE_EXT=1, but CUDA kernels: "):
        build_extension(csrc, tmp_path / "build", library)


@needs_compiler
def test_a_failed_build_removes_the_library_of_an_earlier_one(csrc, tmp_path, clean_settings):
    library = tmp_path / "_C.abi3.so"
    assert build_extension(csrc, tmp_path / "build", library).cpu
    (csrc / "cpu" / "kernel.cpp").write_text("#error not like this\n")
    record = build_extension(csrc, tmp_path / "build", library)
    assert "not like this" in record.reasons["cpu"]
    assert not library.exists()
    assert json.loads((tmp_path / "_build.json").read_text())["cpu"] is False


@needs_compiler
def test_a_library_that_does_not_load_is_not_installed(csrc, tmp_path, clean_settings):
    (csrc / "cpu" / "kernel.cpp").write_text("void absent(); void kernel() { absent(); }\n")
    record = build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")
    assert "does not load" in record.reasons["cpu"] and "undefined symbol" in record.reasons["cpu"]
    assert not (tmp_path / "_C.abi3.so").exists()


@needs_compiler
def test_a_changed_header_is_noticed(csrc, tmp_path, clean_settings):
    (csrc / "answer.h").write_text('#define ANSWER "old"\n')
    source = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) const char* content() '
    (csrc / "library.cpp").write_text(source + "{ return ANSWER; }\n")
    build_extension(csrc, tmp_path / "build", tmp_path / "old.so")
    (csrc / "answer.h").write_text('#define ANSWER "new"\n')
    build_extension(csrc, tmp_path / "build", tmp_path / "new.so")
    assert [content_of(tmp_path / name) for name in ("old.so", "new.so")] == ["old", "new"]


def test_torch_that_cannot_be_imported_is_named(csrc, tmp_path, clean_settings):
    clean_settings.setitem(sys.modules, "torch", None)  # what an import statement then raises is ImportError
    record = build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")
    expected = "torch is not importable while building: install with --no-build-isolation"
    assert record.reasons["cpu"].startswith(expected) and record.reasons["cuda"].startswith(expected)


def test_a_cuda_home_without_nvcc_is_broken_even_with_another_on_the_path(tmp_path, clean_settings):
    toolkit = fake_toolkit(tmp_path / "toolkit")
    clean_settings.setenv("PATH", f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.find_cuda_toolkit().root == toolkit.resolve()
    clean_settings.setenv("CUDA_HOME", str(tmp_path / "empty"))
    with pytest.raises(Missing, match="CUDA_HOME=.*empty is broken: it holds no bin/nvcc"):
        toolchain.find_cuda_toolkit()


def test_the_toolkit_behind_a_wrapper_script_is_found(tmp_path, clean_settings):
    toolkit = fake_toolkit(tmp_path / "toolkit")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {toolkit / "bin" / "nvcc"} "$@"\n')
    wrapper.chmod(0o755)
    clean_settings.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
    found = toolchain.find_cuda_toolkit()
    assert found.nvcc == str(wrapper) and found.root == toolkit.resolve()
    assert found.capabilities == ("8.0", "9.0", "12.0")


def test_nvcc_of_another_major_release_is_named(tmp_path, clean_settings):
    clean_settings.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit", release="11.8")))
    found = toolchain.find_cuda_toolkit()
    named = r"nvcc is release 11\.8, but torch 2\.13\.0\+cu130 was built with CUDA 13\.0"
    with pytest.raises(Missing, match=named):
        toolchain.check_same_major(found.release, CUDA_13)
    toolchain.check_same_major("13.2", CUDA_13)


@pytest.mark.parametrize(
    "requested, expected",
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        ("8.6 9.0a", ["8.6", "9.0a"]),
        (" 9.0; 9.0;", ["9.0"]),
        (None, ["8.0", "8.6", "9.0+PTX"]),
        ("", ["8.0", "8.6", "9.0+PTX"]),
    ],
)
def test_architecture_list(requested, expected):
    assert toolchain.architectures(requested, known=("8.0", "8.6", "8.7", "9.0")) == expected


@pytest.mark.parametrize(
    "requested, message",
    [
        ("Hopper", "expected entries like 9.0, .* got 'Hopper'"),
        ("7.0", "nvcc does not know 7.0; it knows 8.0, 9.0"),
    ],
)
def test_architecture_list_that_cannot_be_compiled(requested, message):
    with pytest.raises(Missing, match=message):
        toolchain.architectures(requested, known=("8.0", "9.0"))


def test_gencode_flags():
    assert toolchain.gencode_flags(["8.6", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
