"""Building the extension where something is missing or broken, from sources of a few lines; nvcc is then a script."""

from __future__ import annotations

import ctypes
import functools
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from build_tools import old_libraries, toolchain
from build_tools.extension import build_extension
from tests.install.surroundings import fake_toolkit

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")) or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler on Linux",
)
find_torch = functools.cache(toolchain.find_torch)


@pytest.fixture
def csrc(tmp_path: Path, clean_settings) -> Path:
    """Sources laid out as the real ones are, whose library tells which halves it has (see `content_of`)."""
    clean_settings.setattr(toolchain, "find_torch", lambda: replace(find_torch(), cuda=None))
    # Importing torch would take longer than all that is compiled here, and its library is all that these need of it.
    quick = tmp_path / "quick" / "torch.py"
    quick.parent.mkdir()
    libtorch = find_torch().folder / "lib" / "libtorch_cpu.so"
    quick.write_text(f"import ctypes; ctypes.CDLL({str(libtorch)!r}, ctypes.RTLD_GLOBAL)\n")
    clean_settings.setenv("PYTHONPATH", str(quick.parent))
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


def test_both_halves_are_built_where_the_tools_are_there(csrc, tmp_path, clean_settings):
    clean_settings.setenv("FORCE_CUDA", "1")
    clean_settings.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit")))
    record = build_extension(csrc, tmp_path / "build", tmp_path / "package" / "_C.abi3.so")
    assert record.reasons == {"cpu": None, "cuda": None}
    assert record.cpu and record.cuda and record.nvcc == "13.0"
    assert record.architectures == ["8.0", "9.0", "12.0+PTX"]
    assert content_of(tmp_path / "package" / "_C.abi3.so") == "cuda 8.0 9.0 12.0+PTX"
    assert sorted(path.name for path in (tmp_path / "package").iterdir()) == ["_C.abi3.so", "_build.json"]


def test_a_compiler_alone_builds_the_cpu_kernels(csrc, tmp_path, clean_settings):
    only_compiler = tmp_path / "bin"
    only_compiler.mkdir()
    for name in ("c++", "as", "ld"):  # no ninja among them
        (only_compiler / name).symlink_to(shutil.which(name) or shutil.which("g++"))
    clean_settings.setenv("PATH", str(only_compiler))
    record = build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")
    assert record.cpu and not record.cuda
    assert "is a CPU build" in record.reasons["cuda"]
    assert content_of(tmp_path / "_C.abi3.so") == "cpu"
    assert not (tmp_path / "terminal").exists(), "nothing is left out that this PyTorch could use"


def test_no_nvcc_under_a_cuda_build_of_torch_is_said_on_the_terminal(csrc, tmp_path, clean_settings, capsys):
    clean_settings.setattr(toolchain, "find_torch", lambda: replace(find_torch(), cuda="13.0"))
    clean_settings.setattr(toolchain, "_find_nvcc", no_nvcc)
    record = build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")
    assert record.cpu and not record.cuda
    said = "reimplementation: CUDA kernels left out, and ops on such devices run on plain PyTorch: nvcc not found"
    assert said in capsys.readouterr().err
    assert said in (tmp_path / "terminal").read_text()


def no_nvcc():
    raise toolchain.Missing("nvcc not found (set CUDA_HOME)")


def test_force_cuda_without_nvcc_fails(csrc, tmp_path, clean_settings):
    clean_settings.setenv("FORCE_CUDA", "1")
    clean_settings.setattr(toolchain, "_find_nvcc", no_nvcc)
    with pytest.raises(SystemExit, match="FORCE_CUDA=1, but nvcc not found"):
        build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")


@pytest.mark.parametrize(
    "toolkit, expected",
    [({"runs": False}, r"libstdc\+\+ went missing"), ({"compiles": False}, r"kernel.cu\(7\): error: no such warp")],
    ids=["nvcc does not run", "nvcc does not compile"],
)
def test_a_broken_nvcc_fails_the_build_unless_the_cuda_kernels_are_declined(
    csrc, tmp_path, clean_settings, toolkit, expected
):
    clean_settings.setenv("FORCE_CUDA", "1")
    clean_settings.setenv("CUDA_HOME", str(fake_toolkit(tmp_path / "toolkit", **toolkit)))
    library = tmp_path / "_C.abi3.so"
    with pytest.raises(SystemExit, match=f"(?s){expected}.*set REIMPLEMENTATION_NO_CUDA=1"):
        build_extension(csrc, tmp_path / "build", library)

    clean_settings.setenv("REIMPLEMENTATION_NO_CUDA", "1")
    record = build_extension(csrc, tmp_path / "build", library)
    assert record.cpu and not record.cuda and record.architectures == []
    assert record.reasons["cuda"] == "the package was built under REIMPLEMENTATION_NO_CUDA=1"
    assert content_of(library) == "cpu"


def test_a_failed_build_removes_the_library_of_an_earlier_one(csrc, tmp_path, clean_settings):
    library = tmp_path / "_C.abi3.so"
    assert build_extension(csrc, tmp_path / "build", library).cpu
    (csrc / "cpu" / "kernel.cpp").write_text("#error not like this\n")
    with pytest.raises(SystemExit, match="(?s)compilation failed: .*not like this.*REIMPLEMENTATION_NO_EXT=1"):
        build_extension(csrc, tmp_path / "build", library)
    assert not library.exists()
    recorded = json.loads((tmp_path / "_build.json").read_text())
    assert recorded["cpu"] is False and "not like this" in recorded["reasons"]["cpu"]

    clean_settings.setenv("REIMPLEMENTATION_NO_EXT", "1")
    record = build_extension(csrc, tmp_path / "build", library)
    assert not record.cpu and record.reasons["cpu"] == "the package was built under REIMPLEMENTATION_NO_EXT=1"
    assert not library.exists()


def test_a_library_that_does_not_load_is_not_installed(csrc, tmp_path):
    (csrc / "cpu" / "kernel.cpp").write_text("void absent(); void kernel() { absent(); }\n")
    with pytest.raises(SystemExit, match="does not load: .*undefined symbol"):
        build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")
    assert not (tmp_path / "_C.abi3.so").exists()


def test_only_what_has_changed_is_compiled_again(csrc, tmp_path, clean_settings, capsys):
    clean_settings.setenv("MAX_JOBS", "1")  # one after the other, in their order

    def build() -> tuple[str, list[str]]:
        """The library's content, and the names of what was made."""
        build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")
        made = [Path(line).name for line in capsys.readouterr().out.splitlines()]
        copy = shutil.copyfile(tmp_path / "_C.abi3.so", tmp_path / f"{len(list(tmp_path.iterdir()))}.so")
        return content_of(copy), made  # a path is loaded once

    (csrc / "cpu" / "kernel.cpp").write_text("void kernel() {}\n")
    (csrc / "an answer.h").write_text('#define ANSWER "old"\n')
    source = '#include "an answer.h"\nextern "C" __attribute__((visibility("default"))) const char* content() '
    (csrc / "library.cpp").write_text(source + "{ return ANSWER; }\n")
    assert build() == ("old", ["kernel.cpp.o", "library.cpp.o", "_C.abi3.so"])
    assert build() == ("old", [])
    (csrc / "an answer.h").write_text('#define ANSWER "new"\n')
    assert build() == ("new", ["library.cpp.o", "_C.abi3.so"])


@pytest.mark.parametrize("chosen", ["many", "0", "-1"])
def test_max_jobs_is_checked(csrc, tmp_path, clean_settings, chosen):
    clean_settings.setenv("MAX_JOBS", chosen)
    with pytest.raises(SystemExit, match="MAX_JOBS: expected a number of commands to run at a time, got"):
        build_extension(csrc, tmp_path / "build", tmp_path / "_C.abi3.so")


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_a_library_for_old_systems_asks_for_no_later_symbols(csrc, tmp_path, clean_settings):
    (csrc / "cpu" / "kernel.cpp").write_text(
        "#include <cmath>\n#include <dlfcn.h>\n#include <pthread.h>\n#include <sstream>\n"
        'extern "C" __attribute__((visibility("default"))) int works(double x) {\n'
        "  std::stringstream text;\n"
        "  text << std::exp(x) << ' ' << (dlopen(nullptr, RTLD_NOW) != nullptr);\n"
        "  pthread_t thread;\n"
        "  pthread_create(&thread, nullptr, [](void* found) { *static_cast<int*>(found) += 1; return found; }, &x);\n"
        "  pthread_join(thread, nullptr);\n"
        '  return text.str() == "1 1";\n'
        "}\n"
    )
    clean_settings.setenv("MANYLINUX", "1")
    library = tmp_path / "_C.abi3.so"
    build_extension(csrc, tmp_path / "build", library)
    assert old_libraries.symbols_beyond_limits(library) == []
    works = ctypes.CDLL(str(library)).works
    works.argtypes = [ctypes.c_double]
    assert works(0.0) == 1
