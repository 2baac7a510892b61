"""Builds `reimplementation._C`, one library of CPU and CUDA kernels on libtorch's and Python's stable ABIs.

torch's own BuildExtension refuses CUDA sources under a CPU build of torch. These sources need nothing but the
stable headers, which every build of torch carries, so the commands written here compile them against any of
them. The CUDA runtime is linked statically: the library loads on machines without CUDA too.

What this machine has no tools for is left out, recorded in `_build.json` beside the library, and said in one line. What
it has the tools for is built, or the installation fails: a slow package that says nothing would be found out too late.
"""

from __future__ import annotations

import contextlib
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

from . import old_libraries, toolchain
from .steps import Step, StepFailed, processors, run_steps
from .toolchain import Broken, CudaToolkit, Declined, Missing, Torch, last_line

OPTIMISATION = ["-std=c++17", "-O3"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
ABI_DEFINES = [
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # libtorch's stable ABI as of 2.10
    "-DPy_LIMITED_API=0x030a0000",  # Python's stable ABI as of 3.10
]
TERMINAL = Path("/dev/tty")
WAY_OUT = (
    "To install without the kernels for GPUs, set REIMPLEMENTATION_NO_CUDA=1; without any, on plain PyTorch alone, "
    "REIMPLEMENTATION_NO_EXT=1."
)


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
class Tools:
    """What the kernels are compiled with; without `cuda`, those for the CPU alone."""

    compiler: list[str]
    torch: Torch
    cuda: Cuda | None


def build_extension(csrc: Path, build_dir: Path, library: Path) -> BuildRecord:
    """Compiles the sources under `csrc` into `library` and writes `_build.json` beside it.

    Args:
        csrc: folder of library.cpp; every other .cpp and .cu below it is compiled too.
        build_dir: folder for objects; kept between builds, it makes the next one incremental.
        library: path of the shared library. What an earlier build left there is replaced; if nothing can be
            built, it is removed.

    Returns:
        What was built, with a reason for each half that was not.

    Raises:
        SystemExit: kernels cannot be built that this machine has the tools for, or that REQUIRE_EXT=1 asks for.
    """
    record = BuildRecord()
    library.parent.mkdir(parents=True, exist_ok=True)
    try:
        tools = _find_tools(record)
        if tools is not None:
            _install(_compile(csrc, build_dir, library.name, tools), library)
            record.cpu = True
            if tools.cuda is not None:
                record.cuda, record.architectures = True, tools.cuda.architectures
    except Broken as broken:
        record.reasons = {"cpu": str(broken), "cuda": str(broken)}
        raise SystemExit(f"reimplementation: its kernels cannot be built: {broken}\n{WAY_OUT}") from broken
    finally:
        if not record.cpu:
            library.unlink(missing_ok=True)
        (library.parent / "_build.json").write_text(json.dumps(asdict(record), indent=2) + "\n")
    return record


def _find_tools(record: BuildRecord) -> Tools | None:
    """The tools of this machine, and in the record why kernels are left out; None where that is all of them."""
    try:
        _check_platform()
        compiler = toolchain.find_compiler()
    except Missing as missing:
        _leave_out(record, ["cpu", "cuda"], missing)
        return None
    torch = toolchain.find_torch()
    record.compiler, record.torch = shlex.join(compiler), torch.version
    try:
        cuda = _find_cuda(torch)
    except Missing as missing:
        _leave_out(record, ["cuda"], missing)
        return Tools(compiler, torch, None)
    record.nvcc = cuda.toolkit.release
    return Tools(compiler, torch, cuda)


def _check_platform() -> None:
    if toolchain.is_set("REIMPLEMENTATION_NO_EXT"):
        raise Declined("the package was built under REIMPLEMENTATION_NO_EXT=1")
    if not sys.platform.startswith("linux"):
        raise Missing(f"the extension is built on Linux only, this is {sys.platform}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise Missing("free-threaded Python has no limited API yet")


def _find_cuda(torch: Torch) -> Cuda:
    forced = toolchain.is_set("FORCE_CUDA")
    if toolchain.is_set("REIMPLEMENTATION_NO_CUDA"):
        raise Declined("the package was built under REIMPLEMENTATION_NO_CUDA=1")
    if torch.cuda is None and not forced:
        raise Declined(f"torch {torch.version} is a CPU build (set FORCE_CUDA=1 to compile them all the same)")
    try:
        toolkit = toolchain.find_cuda_toolkit()
    except Missing as missing:
        if forced:
            raise Broken(f"FORCE_CUDA=1, but {missing}") from missing
        raise
    if not forced:
        toolchain.check_same_major(toolkit.release, torch)
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return Cuda(toolkit, toolchain.architectures(requested, toolkit.capabilities))


def _leave_out(record: BuildRecord, kinds: list[str], missing: Missing) -> None:
    """Records why there will be no such kernels; unless that is as wanted, says so, or fails under REQUIRE_EXT=1.

    pip shows nothing that a successful build prints, so it is said on the terminal too, where there is one.
    """
    record.reasons.update(dict.fromkeys(kinds, str(missing)))
    if isinstance(missing, Declined):
        return
    kernels = f"{' and '.join(kind.upper() for kind in kinds)} kernels"
    if toolchain.is_set("REQUIRE_EXT"):
        raise Broken(f"REQUIRE_EXT=1, but {kernels} would be left out: {missing}")
    sentence = f"reimplementation: {kernels} left out, and ops on such devices run on plain PyTorch: {missing}"
    print(sentence, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), TERMINAL.open("w") as terminal:
            terminal.write(f"\n{sentence}\n")


def _compile(csrc: Path, build_dir: Path, name: str, tools: Tools) -> Path:
    """Runs the commands whose inputs have changed; returns the library, which loads, or raises `Broken`."""
    linked = build_dir / name
    jobs = _jobs()
    compiling = _compile_steps(csrc, build_dir, tools)
    link = _link_command([step.output for step in compiling], tools)
    try:
        run_steps(compiling, jobs)
        run_steps([Step([*link, "-o", str(linked)], linked, [step.output for step in compiling])], jobs)
        if toolchain.is_set("MANYLINUX"):
            newest, linked = linked, build_dir / "manylinux" / name
            for independent in old_libraries.steps(newest, link, tools.compiler, linked):
                run_steps(independent, jobs)
    except StepFailed as failed:
        print(failed, flush=True)
        raise Broken(f"compilation failed: {_first_error(str(failed))}") from failed
    _check_loads(linked, tools.torch)
    return linked


def _jobs() -> int:
    """How many commands run at a time: MAX_JOBS, which PyTorch's builds read too, else one a processor."""
    chosen = os.environ.get("MAX_JOBS") or str(processors())
    if not chosen.isdecimal() or int(chosen) == 0:
        raise Broken(f"MAX_JOBS: expected a number of commands to run at a time, got {chosen!r}")
    return int(chosen)


def _check_loads(library: Path, torch: Torch) -> None:
    """Raises `Broken` for a library with unresolved symbols: linking a shared library lets them pass."""
    if toolchain.is_set("SANITIZE"):  # which loads only into a process that has loaded the sanitizer first
        return
    load = "import ctypes, os, sys, torch; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    done = subprocess.run([*torch.python, "-c", load, str(library)], capture_output=True, text=True)
    if done.returncode != 0:
        raise Broken(f"what was compiled does not load: {last_line(done.stderr)}")


def _install(linked: Path, library: Path) -> None:
    """A running process may have the old library mapped: it needs a new file, not new bytes in the old one."""
    arriving = library.with_suffix(".arriving")
    shutil.copyfile(linked, arriving)
    arriving.replace(library)


def _compile_steps(csrc: Path, build_dir: Path, tools: Tools) -> list[Step]:
    """The compile commands, one a source."""
    library = csrc / "library.cpp"
    if not library.is_file():
        raise Broken(f"the sources are missing: there is no {library}")
    cxx, nvcc = _compiler_flags(csrc, tools)
    steps = []
    for source in [*sorted(csrc.rglob("*.cpp")), *(sorted(csrc.rglob("*.cu")) if tools.cuda else [])]:
        output = build_dir / f"{source.relative_to(csrc)}.o"
        depfile = output.with_suffix(".d")
        command = [*nvcc] if source.suffix == ".cu" else [*cxx]
        if tools.cuda is not None and source == library:
            command.append(f'-DREIMPLEMENTATION_CUDA_ARCHITECTURES="{" ".join(tools.cuda.architectures)}"')
        command += ["-MD", "-MF", str(depfile), "-c", str(source), "-o", str(output)]
        steps.append(Step(command, output, [source], depfile))
    return steps


def _compiler_flags(csrc: Path, tools: Tools) -> tuple[list[str], list[str]]:
    """The start of a command that compiles C++, and of one that compiles CUDA, empty where none is to be compiled."""
    common = [*OPTIMISATION, *ABI_DEFINES, f"-I{csrc}"]
    for path in (sysconfig.get_paths()["include"], tools.torch.folder / "include"):
        common += ["-isystem", str(path)]
    cxx = [*tools.compiler, *common, "-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
    if toolchain.is_set("SANITIZE"):
        cxx += [*SANITIZERS, "-O1", "-g", "-fno-omit-frame-pointer"]
    if tools.cuda is None:
        return cxx, []
    toolkit = tools.cuda.toolkit
    cxx += ["-DREIMPLEMENTATION_WITH_CUDA", f"-I{toolkit.root / 'include'}"]
    nvcc = [toolkit.nvcc, *common, "-DREIMPLEMENTATION_WITH_CUDA", "--expt-relaxed-constexpr"]
    nvcc += ["-Xcompiler=-fPIC,-fvisibility=hidden", *toolchain.gencode_flags(tools.cuda.architectures)]
    if len(tools.compiler) == 1:  # the host code by the same compiler
        nvcc.append(f"-ccbin={tools.compiler[0]}")
    return cxx, nvcc


def _link_command(objects: list[Path], tools: Tools) -> list[str]:
    """The command that links the library, without its output."""
    libraries = [f"-L{tools.torch.folder / 'lib'}", "-ltorch_cpu"]
    if toolchain.is_set("SANITIZE"):
        libraries += SANITIZERS
    if tools.cuda is not None:
        libraries += [f"-L{path}" for path in tools.cuda.toolkit.library_dirs]
        libraries += ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    # --exclude-libs: the static CUDA runtime must not meet the shared one that torch may load.
    return [*tools.compiler, "-shared", *map(str, objects), "-Wl,--exclude-libs,ALL", *libraries]


def _first_error(output: str) -> str:
    """The line of a failed build to show: the first that a tool calls an error, else the last."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    error = r"\b(error|fatal)\b.*:|multiple definition|cannot find "
    return next((line for line in lines if re.search(error, line)), last_line(output))
