"""What build_tools/toolchain.py finds and refuses; PyTorch, compilers and nvcc are then scripts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from build_tools import toolchain
from build_tools.toolchain import Broken, Torch
from tests.install.surroundings import fake_toolkit

CUDA_13 = Torch("2.13.0+cu130", "13.0", Path(), ())


def test_torch_of_this_environment_is_found():
    found = toolchain.find_torch()
    assert (found.version, found.cuda) == (torch.__version__, torch.version.cuda)
    assert (found.folder / "include" / "torch" / "csrc" / "stable").is_dir()
    assert found.python == (sys.executable,)


def test_torch_behind_build_isolation_is_found(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('an isolated build does not see torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = toolchain.find_torch()
    assert found.version == torch.__version__ and found.python == (sys.executable, "-E")


def test_torch_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ModuleNotFoundError: nothing called torch' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Broken, match="torch cannot be imported by .*nothing called torch .install torch first"):
        toolchain.find_torch()


def test_torch_that_is_too_old_is_named(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'["2.9.1+cpu", null, "/torch/__init__.py"]\'\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Broken, match=r"torch 2\.9\.1\+cpu is older than 2\.10"):
        toolchain.find_torch()


@pytest.mark.parametrize(
    "chosen, message",
    [
        ("/nonexistent/c++ -m64", "CXX=/nonexistent/c\\+\\+ -m64 is not an executable"),
        ("false", "the C\\+\\+ compiler false is broken"),
    ],
)
def test_a_chosen_compiler_that_does_not_work_is_named(clean_settings, chosen, message):
    clean_settings.setenv("CXX", chosen)
    with pytest.raises(Broken, match=message):
        toolchain.find_compiler()


def test_a_cuda_home_without_nvcc_is_broken_even_with_another_on_the_path(tmp_path, clean_settings):
    toolkit = fake_toolkit(tmp_path / "toolkit")
    clean_settings.setenv("PATH", f"{toolkit / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert toolchain.find_cuda_toolkit().root == toolkit.resolve()
    clean_settings.setenv("CUDA_HOME", str(tmp_path / "empty"))
    with pytest.raises(Broken, match="CUDA_HOME=.*empty is broken: it holds no bin/nvcc"):
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
    with pytest.raises(Broken, match=named):
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
    with pytest.raises(Broken, match=message):
        toolchain.architectures(requested, known=("8.0", "9.0"))


def test_gencode_flags():
    assert toolchain.gencode_flags(["8.6", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
