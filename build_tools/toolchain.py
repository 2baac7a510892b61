"""Finds what the extension is built with: torch's headers, a C++ compiler, nvcc, GPUs to build for.

Each function returns what it found. It raises `Missing` for what this machine does not have, and `Broken` for what is
there, or was asked for, and does not work; both carry a message for the person who installs the package.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

OLDEST_TORCH = (2, 10)  # the first release with every stable-ABI symbol that the kernels use
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


class Missing(Exception):
    """This machine cannot build some kernels; the message says why. The package is installed without them."""


class Declined(Missing):
    """Nobody wants these kernels here: a setting says so, or torch could not use them."""


class Broken(Exception):
    """Kernels that this machine should be able to build cannot be built; the installation fails with the message."""


@dataclass(frozen=True)
class Torch:
    """The torch to compile against.

    `cuda` is None for a CPU build, else the CUDA release, such as "13.0". `folder` holds include/ and lib/. `python` is
    the start of a command that can import it.
    """

    version: str
    cuda: str | None
    folder: Path
    python: tuple[str, ...]


@dataclass(frozen=True)
class CudaToolkit:
    """An nvcc that runs; release such as "13.0", and the compute capabilities it knows, such as "9.0"."""

    nvcc: str
    root: Path
    release: str
    capabilities: tuple[str, ...]

    @property
    def library_dirs(self) -> tuple[str, ...]:
        """Where libcudart_static.a may lie: lib64 by NVIDIA's installer, lib by conda and PyPI."""
        candidates = [self.root / "lib64", self.root / "lib", *sorted(self.root.glob("targets/*/lib"))]
        return tuple(str(path) for path in candidates if path.is_dir())


def is_set(variable: str) -> bool:
    """True when an environment variable such as FORCE_CUDA is set to anything but "" or "0"."""
    return os.environ.get(variable, "") not in ("", "0")


def last_line(output: str) -> str:
    """Where a failed command's message usually stands."""
    return (output.strip().splitlines() or ["it printed nothing"])[-1].strip()


def find_torch() -> Torch:
    """The torch that this build imports, else that of the environment which the package is being installed into.

    Under build isolation pip hides that environment from a build, through PYTHONPATH. The interpreter is still that of
    the environment, and with -E, which ignores such variables, it sees what is installed there.
    """
    ask = "import json, torch; print(json.dumps([torch.__version__, torch.version.cuda, torch.__file__]))"
    for python in ((sys.executable,), (sys.executable, "-E")):
        done = subprocess.run([*python, "-c", ask], capture_output=True, text=True)
        if done.returncode == 0:
            break
    else:
        raise Broken(
            f"torch cannot be imported by {sys.executable}: {last_line(done.stderr)} (install torch first; where the "
            "build has an environment of its own, as under uv, turn that off with --no-build-isolation)"
        )
    version, cuda, file = json.loads(last_line(done.stdout))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise Broken(f"torch {version} is older than 2.10, the first with the ABI that the extension uses")
    return Torch(version, cuda, Path(file).parent, python)


def find_compiler() -> list[str]:
    """The start of a compile command: CXX if it is set, which may hold arguments, else c++ or g++."""
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen)
        if shutil.which(command[0]) is None:
            raise Broken(f"no C++ compiler: CXX={chosen} is not an executable")
    else:
        found = shutil.which("c++") or shutil.which("g++")
        if found is None:
            raise Missing("no C++ compiler: neither c++ nor g++ is on the PATH (install one, or set CXX)")
        command = [found]
    _output_of([*command, "--version"], f"the C++ compiler {command[0]} is broken")
    return command


def find_cuda_toolkit() -> CudaToolkit:
    """nvcc of CUDA_HOME or CUDA_PATH; where neither is set, nvcc on the PATH, else in /usr/local/cuda."""
    nvcc = _find_nvcc()
    broken = f"nvcc is broken: {nvcc}"
    release = re.search(r"release (\d+\.\d+)", _output_of([nvcc, "--version"], broken))
    if release is None:
        raise Broken(f"{broken} --version names no release")
    known = re.findall(r"compute_(\d+)(\d)\b", _output_of([nvcc, "--list-gpu-arch"], broken))
    return CudaToolkit(
        nvcc=nvcc,
        root=_toolkit_root(nvcc),
        release=release[1],
        capabilities=tuple(f"{major}.{minor}" for major, minor in known),
    )


def check_same_major(nvcc_release: str, torch: Torch) -> None:
    """Raises `Broken` unless nvcc and a CUDA build of torch share their major version."""
    if nvcc_release.split(".")[0] != torch.cuda.split(".")[0]:
        raise Broken(
            f"nvcc is release {nvcc_release}, but torch {torch.version} was built with CUDA {torch.cuda} "
            "(set CUDA_HOME to a matching toolkit, or FORCE_CUDA=1 to compile them all the same)"
        )


def architectures(requested: str | None, known: tuple[str, ...]) -> list[str]:
    """The compute capabilities to compile for.

    Args:
        requested: TORCH_CUDA_ARCH_LIST as torch reads it, numbers only: "8.0;9.0+PTX" or "8.6 9.0a". None
            or "": the default list without what nvcc does not know, and PTX of the newest for GPUs to come.
        known: the capabilities that nvcc knows, such as ("8.0", "9.0").

    Raises:
        Broken: an entry is not a capability, or nvcc does not know it.
    """
    if not requested:
        default = [capability for capability in DEFAULT_ARCHITECTURES if capability in known]
        if not default:
            wanted = ", ".join(DEFAULT_ARCHITECTURES)
            raise Broken(f"nvcc compiles for none of {wanted} (set TORCH_CUDA_ARCH_LIST)")
        return [*default[:-1], default[-1] + "+PTX"]
    chosen = re.split(r"[;\s]+", requested.strip("; \t"))
    for entry in chosen:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", entry)
        if match is None:
            raise Broken(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0, 9.0a or 9.0+PTX, got {entry!r}")
        if match[1] not in known:
            raise Broken(f"TORCH_CUDA_ARCH_LIST: nvcc does not know {entry}; it knows {', '.join(known)}")
    return list(dict.fromkeys(chosen))


def gencode_flags(chosen: list[str]) -> list[str]:
    """nvcc's flags for `architectures`: machine code for each entry, and PTX for those that end in +PTX."""
    flags = []
    for entry in chosen:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
            if nvcc is None:  # looking elsewhere would build with a toolkit that the user did not choose
                raise Broken(f"{variable}={home} is broken: it holds no bin/nvcc")
            return nvcc
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise Missing("nvcc not found (set CUDA_HOME)")
    return nvcc


def _toolkit_root(nvcc: str) -> Path:
    """The folder with include/ and lib64/. nvcc on the PATH may be a wrapper script, so it is asked."""
    dryrun = _output_of([nvcc, "--dryrun", "-x", "cu", os.devnull], f"nvcc is broken: {nvcc}")
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    candidates = [Path(top[1].strip())] if top else []
    candidates += [Path(nvcc).resolve().parent.parent, Path("/usr/local/cuda")]
    return next((path.resolve() for path in candidates if (path / "include").is_dir()), candidates[0])


def _output_of(command: list[str], complaint: str) -> str:
    """What a command prints on both streams; `Broken` with the complaint and its last line if it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise Broken(f"{complaint}: {error.strerror}") from error
    if done.returncode != 0:
        end = f"exited with {done.returncode}: {last_line(done.stdout)}"
        raise Broken(f"{complaint} {shlex.join(command[1:])} {end}")
    return done.stdout
