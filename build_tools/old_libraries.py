"""Binds a library to older C and C++ libraries than this machine's, so that it loads on systems that have those.

A linker binds each symbol to its newest version, and the library then asks for that one wherever it is loaded, though
an older one would do: `dlopen` of glibc 2.34 is the `dlopen` of 2.2.5, moved from libdl into libc. So the library is
linked a second time, with the linker's --wrap, which sends every use of such a symbol to `__wrap_` and its name. That
is a jump to the newest version within the limits, which libc keeps for old programs; where it keeps none, it stands in
old_libraries.cpp. libdl, libpthread and librt, where these symbols lie in old systems, come with libtorch.

The headers stay this machine's. What a later one newly asks for is found when the built library is loaded: `__wrap_`
and its name are then undefined.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

from .steps import Step
from .toolchain import Broken

LIMITS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}  # what manylinux_2_28 allows on x86-64

_JUMP = """
    .symver old_{name}, {name}@{version}
    .globl __wrap_{name}
    .hidden __wrap_{name}
    .type __wrap_{name}, @function
__wrap_{name}:
    jmp *old_{name}@GOTPCREL(%rip)
"""


_NO_CODE_ON_THE_STACK = """
    .section .note.GNU-stack, "", @progbits
"""


def steps(linked: Path, link: list[str], compiler: list[str], output: Path) -> list[list[Step]]:
    """What links `output` within the limits, where the command `link` made `linked`.

    Returns lists to run one after the other, of steps that are independent.
    """
    if platform.machine() != "x86_64":
        raise Broken(f"MANYLINUX=1 is for x86_64; this machine is {platform.machine()}")
    output.parent.mkdir(parents=True, exist_ok=True)
    newer = symbols_beyond_limits(linked)
    kept = {name: version for name, version in _versions_kept(compiler).items() if name in newer}
    jumps = output.parent / "jumps.s"
    jumps.write_text("".join(_JUMP.format(name=name, version=kept[name]) for name in kept) + _NO_CODE_ON_THE_STACK)
    stand_ins = Path(__file__).with_suffix(".cpp")
    sources = {jumps: [], stand_ins: ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden"]}
    compiling = [
        Step([*compiler, *flags, "-c", str(source), "-o", str(made)], made, [source])
        for source, flags in sources.items()
        for made in [output.parent / f"{source.name}.o"]
    ]
    objects = [step.output for step in compiling]
    command = [*link, *map(str, objects), *(f"-Wl,--wrap={name}" for name in newer), "-o", str(output)]
    return [compiling, [Step(command, output, [linked, *objects])]]


def symbols_beyond_limits(library: Path) -> list[str]:
    """The symbols that a library takes from others in a version later than the limits."""
    return sorted(name for name, version in _versioned_symbols(library, "--undefined-only") if not _is_allowed(version))


def _versions_kept(compiler: list[str]) -> dict[str, str]:
    """For each symbol of this machine's C libraries the newest of its versions within the limits."""
    kept: dict[str, str] = {}
    for library in ("libc.so.6", "libm.so.6"):
        asked = subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        for name, version in _versioned_symbols(Path(asked.stdout.strip()), "--defined-only"):
            if _is_allowed(version) and (name not in kept or _numbers(version) > _numbers(kept[name])):
                kept[name] = version
    return kept


def _versioned_symbols(library: Path, which: str) -> list[tuple[str, str]]:
    command = ["nm", "--dynamic", "--with-symbol-versions", which, str(library)]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode != 0:
        raise Broken(f"nm cannot list the symbols of {library}: {listed.stderr.strip()}")
    return re.findall(r"(\S+?)@@?(\S+)$", listed.stdout, re.MULTILINE)


def _is_allowed(version: str) -> bool:
    limit = LIMITS.get(version.partition("_")[0])
    return limit is None or bool(_numbers(version)) and _numbers(version) <= limit


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 34) of "GLIBC_2.34"; () of "GLIBC_PRIVATE"."""
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("_")[2]))
