"""What an installation meets: a fresh tree, an environment without settings, a CUDA toolkit that is a script."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    *("CXX", "CUDA_HOME", "CUDA_PATH", "FORCE_CUDA", "REQUIRE_EXT", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"),
    *("MANYLINUX", "SANITIZE", "REIMPLEMENTATION_NO_EXT", "REIMPLEMENTATION_NO_CUDA", "REIMPLEMENTATION_BACKEND"),
}


def copy_tree(destination: Path) -> None:
    """Copies the project without what was built in it."""
    tools = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__")
    built = ("build", "dist", "*.egg-info", "*.so", "_build.json")
    shutil.copytree(ROOT, destination, ignore=shutil.ignore_patterns(*tools, *built))


def environment(**settings: str) -> dict[str, str]:
    """This process's variables with none of the build's settings but the given ones."""
    return {name: value for name, value in os.environ.items() if name not in SETTINGS} | settings


def fake_toolkit(
    folder: Path,
    *,
    release: str = "13.0",
    knows: tuple[int, ...] = (80, 90, 120),
    compiles: bool = True,
    runs: bool = True,
) -> Path:
    """A CUDA_HOME whose nvcc is a script that makes an object with c++, or fails to, or does not run.

    `knows` are the compute capabilities that it says it compiles for.
    """
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    make_object = 'for out; do :; done; echo "int k;" | c++ -x c++ -fPIC -c - -o "$out" && : > "${out%.o}.d"'
    body = f"""case "$1" in
        --version) echo "Cuda compilation tools, release {release}, V{release}.88";;
        --list-gpu-arch) printf 'compute_%s\\n' {" ".join(map(str, knows))};;
        --dryrun) echo '#$ TOP={folder}';;
        *) {make_object if compiles else 'echo "kernel.cu(7): error: no such warp"; exit 2'};;
    esac"""
    nvcc.write_text("#!/bin/sh\n" + (body if runs else "echo 'libstdc++ went missing'; exit 1") + "\n")
    nvcc.chmod(0o755)
    return folder
