"""Builds `reimplementation._C`, one library of CPU and CUDA kernels on libtorch's and Python's stable ABIs.

torch's own BuildExtension refuses CUDA sources under a CPU build of torch. These sources need nothing but the
stable headers, which every build of torch carries, so a build.ninja written here compiles them against any of
them. The CUDA runtime is linked statically: the library loads on machines without CUDA too.

Nothing here fails for want of a tool. What cannot be compiled is left out, said in one line on stderr and
recorded in `_build.json` beside the library, unless REQUIRE_EXT=1 asks for an error.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from . import toolchain
from .toolchain import CudaToolkit, Missing, Torch, last_line

OPTIMISATION = ["-std=c++17", "-O3"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
ABI_DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # libtorch's stable ABI as of 2.10
    "-DPy_LIMITED_API=0x030a0000",  # Python's stable ABI as of 3.10
]


@dataclass
class BuildRecord:
    """What was built and why the rest was not: the content of `_build.json`."""

    cpu: bool = False
    cuda: bool = False
    architectures: list[str] = field(default_factory=list)
    reasons: dict[str, str | None] = field(default_factory=lambda: {"cpu": None, "cuda": None})
    torch: str | None = None
    nvcc: str | None = None
    compiler: str | None = None


@dataclass(frozen=True)
class Cuda:
    """The CUDA half of a build: the toolkit and the architectures to compile for."""

    toolkit: CudaToolkit
    architectures: list[str]


@dataclass(frozen=True)
class Step:
    """One command, making `output` from `inputs`; a compiler lists the headers that it read in `depfile`."""

    command: list[str]
    output: Path
    inputs: list[Path]
    depfile: Path | None = None


def build_extension(csrc: Path, build_dir: Path, library: Path) -> BuildRecord:
    """Compiles the sources under `csrc` into `library` and writes `_build.json` beside it.

    Args:
        csrc: folder of library.cpp; every other .cpp and .cu below it is compiled too.
        build_dir: folder for build.ninja and objects; kept between builds, it makes the next one incremental.
        library: path of the shared library. What an earlier build left there is replaced; if nothing can be
            built, it is removed.

    Returns:
        What was built, with a reason for each half that was not.

    Raises:
        SystemExit: under REQUIRE_EXT=1 the CPU kernels, or with FORCE_CUDA=1 the CUDA kernels, are left out.
    """
    record = BuildRecord()
    library.parent.mkdir(parents=True, exist_ok=True)
    try:
        _build(csrc, build_dir, library, record)
    except Missing as missing:
        record.reasons["cpu"] = str(missing)
        record.reasons["cuda"] = record.reasons["cuda"] or str(missing)
        library.unlink(missing_ok=True)
    (library.parent / "_build.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    _report(record)
    return record


def _build(csrc: Path, build_dir: Path, library: Path, record: BuildRecord) -> None:
    """Builds what can be built and records it; raises `Missing` where that is nothing."""
    _check_platform()
    torch = toolchain.find_torch()
    record.torch = torch.version
    cuda = None
    try:
        cuda = _find_cuda(torch)
        record.nvcc = cuda.toolkit.release
    except Missing as missing:
        record.reasons["cuda"] = str(missing)
    ninja = toolchain.find_ninja()
    compiler = toolchain.find_compiler()
    record.compiler = shlex.join(compiler)

    linked = build_dir / library.name
    if cuda is not None:
        try:
            _run_ninja(ninja, build_dir, _steps(csrc, build_dir, linked, compiler, torch, cuda))
            _check_loads(linked)
        except Missing as missing:
            record.reasons["cuda"] = str(missing)
        else:
            record.cuda = True
            record.architectures = cuda.architectures
    if not record.cuda:
        _run_ninja(ninja, build_dir, _steps(csrc, build_dir, linked, compiler, torch, None))
        _check_loads(linked)
    record.cpu = True
    # A running process may have the old library mapped: give it a new file, not new bytes in the old one.
    arriving = library.with_suffix(".arriving")
    shutil.copyfile(linked, arriving)
    arriving.replace(library)


def _check_platform() -> None:
    if not sys.platform.startswith("linux"):
        raise Missing(f"the extension is built on Linux only, this is {sys.platform}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Missing("free-threaded Python has no limited API yet")


def _find_cuda(torch: Torch) -> Cuda:
    forced = toolchain.is_set("FORCE_CUDA")
    if torch.cuda is None and not forced:
        raise Missing(f"torch {torch.version} is a CPU build (set FORCE_CUDA=1 to compile them all the same)")
    toolkit = toolchain.find_cuda_toolkit()
    if not forced:
        toolchain.check_same_major(toolkit.release, torch)
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return Cuda(toolkit, toolchain.architectures(requested, toolkit.capabilities))


def _run_ninja(ninja: str, build_dir: Path, steps: list[Step]) -> None:
    """Runs those steps whose inputs have changed; raises `Missing` with the first error of a failed build."""
    build_dir.mkdir(parents=True, exist_ok=True)
    (build_dir / "build.ninja").write_text(_ninja_file(steps))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run(
        [ninja, "-C", str(build_dir), *jobs], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise Missing(f"compilation failed: {_first_error(done.stdout)}")


def _check_loads(library: Path) -> None:
    """Raises `Missing` for a library with unresolved symbols: linking a shared library lets them pass."""
    if toolchain.is_set("SANITIZE"):  # which loads only into a process that has loaded the sanitizer first
        return
    load = "import ctypes, os, sys, torch; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    done = subprocess.run([sys.executable, "-c", load, str(library)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Missing(f"what was compiled does not load: {last_line(done.stderr)}")


def _steps(
    csrc: Path, build_dir: Path, linked: Path, compiler: list[str], torch: Torch, cuda: Cuda | None
) -> list[Step]:
    """The compile commands, one a source, and the link command."""
    library = csrc / "library.cpp"
    if not library.is_file():
        raise Missing(f"the sources are missing: there is no {library}")
    sources = [*sorted(csrc.rglob("*.cpp")), *(sorted(csrc.rglob("*.cu")) if cuda else [])]

    common = [*OPTIMISATION, *ABI_DEFINES, f"-I{csrc}"]
    for path in [sysconfig.get_paths()["include"], *torch.include_dirs]:
        common += ["-isystem", path]
    cxx = [*compiler, *common, "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
    link = [f"-L{torch.library_dir}", "-ltorch_cpu"]
    if toolchain.is_set("SANITIZE"):
        cxx += [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer"]
        link += SANITIZERS
    nvcc = []
    if cuda is not None:
        cxx += ["-DREIMPLEMENTATION_WITH_CUDA", f"-I{cuda.toolkit.root / 'include'}"]
        nvcc = [cuda.toolkit.nvcc, *common, "-DREIMPLEMENTATION_WITH_CUDA", "--expt-relaxed-constexpr"]
        nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden", *toolchain.gencode_flags(cuda.architectures)]
        nvcc += [f"-ccbin={compiler[0]}"] if len(compiler) == 1 else []  # the host code by the same compiler
        link += [f"-L{path}" for path in cuda.toolkit.library_dirs]
        link += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]

    steps = []
    for source in sources:
        output = build_dir / f"{source.relative_to(csrc)}.o"
        depfile = output.with_suffix(".d")
        command = [*nvcc] if source.suffix == ".cu" else [*cxx]
        if cuda is not None and source == library:
            command.append(f'-DREIMPLEMENTATION_CUDA_ARCHITECTURES="{" ".join(cuda.architectures)}"')
        command += ["-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        steps.append(Step(command, output, [source], depfile))
    objects = [step.output for step in steps]
    # --exclude-libs: the static CUDA runtime must not meet the shared one that torch may load.
    command = [*compiler, "-shared", *map(str, objects), "-Wl,--exclude-libs,ALL", *link, "-o", str(linked)]
    return [*steps, Step(command, linked, objects)]


def _ninja_file(steps: list[Step]) -> str:
    """The text of a build.ninja that runs the steps in the order of their dependencies."""
    lines = ["rule run", "  command = $command", "  description = $out", ""]
    for step in steps:
        inputs = " ".join(_ninja_path(path) for path in step.inputs)
        lines.append(f"build {_ninja_path(step.output)}: run {inputs}")
        lines.append(f"  command = {shlex.join(step.command).replace('$', '$$')}")
        if step.depfile is not None:
            lines += [f"  depfile = {_ninja_path(step.depfile)}", "  deps = gcc"]
        lines.append("")
    return "\n".join(lines)


def _ninja_path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))


def _first_error(output: str) -> str:
    """The line of a failed build to show: the first that a tool calls an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    error = r"\b(error|fatal)\b.*:|multiple definition|cannot find "
    return next((line for line in lines if re.search(error, line)), last_line(output))


def _report(record: BuildRecord) -> None:
    """One line on stderr for each half left out; an error if it was asked for and REQUIRE_EXT=1."""
    reasons = {name: reason for name, reason in record.reasons.items() if reason is not None}
    for name, reason in reasons.items():
        print(f"reimplementation: {name.upper()} kernels left out: {reason}", file=sys.stderr)
    asked = ["cpu", "cuda"] if toolchain.is_set("FORCE_CUDA") else ["cpu"]
    refused = [f"{name.upper()} kernels: {reasons[name]}" for name in asked if name in reasons]
    if refused and toolchain.is_set("REQUIRE_EXT"):
        raise SystemExit("reimplementation: REQUIRE_EXT=1, but " + "; ".join(refused))
