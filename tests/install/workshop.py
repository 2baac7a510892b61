"""Where the installation matrix works: fresh environments, a wheel and an sdist of the project, toolkits that fail."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.install.surroundings import ROOT, copy_tree, environment, fake_toolkit

LIMIT = 1800  # seconds for one command
BUILD_PACKAGES = ("pip", "setuptools>=77", "wheel")
TORCH_NEEDS = ("numpy", "filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec")


class NotAvailable(Exception):
    """This machine lacks what a row is about."""


@dataclass(frozen=True)
class Room:
    """A copy of the project, an empty folder beside it, and the variables under which commands run there."""

    folder: Path
    variables: dict[str, str]

    def run(self, command: str, *, fails: bool = False, elsewhere: bool = False) -> str:
        """Runs a command in the project, or elsewhere, where only what was installed can be imported.

        Returns what it printed. Raises AssertionError where it fails, or does not though it should.
        """
        cwd = self.folder / ("elsewhere" if elsewhere else "project")
        returncode, said = _run(["bash", "-c", command], cwd=cwd, env=self.variables)
        assert (returncode != 0) == fails, f"{command!r} exited with {returncode}: {said[-1500:]}"
        return said


class Workshop:
    """Makes rooms. What several rows share is made once, in `folder`.

    Rows get the packages of this process's environment, PyTorch among them, through a .pth file; those for another
    Python or PyTorch get one that is installed from `torch_index`, which must be an index of CPU builds.
    """

    def __init__(self, folder: Path, torch_index: str, wheel: Path | None = None):
        """Builds a wheel unless it is given one."""
        self._folder = folder
        self._torch_index = torch_index
        self._given_wheel = wheel and wheel.resolve()
        self._count = 0

    def require(self, tools: tuple[str, ...]) -> None:
        for tool in tools:
            if shutil.which(tool, path=_path()) is None:
                raise NotAvailable(f"{tool} is not on the PATH")

    def room(self, python: str | None, torch_release: str | None, lacks: tuple[str, ...] = ()) -> Room:
        """A new room with a new virtual environment.

        Args:
            python: such as "3.12"; None: this process's.
            torch_release: such as "2.10.0"; None: this process's PyTorch, "" for none at all.
            lacks: tools that are not on its PATH.
        """
        interpreter = _interpreter(python or _own_python())
        packages = None if torch_release == "" else self._packages(interpreter, python, torch_release)
        return self._new_room(interpreter, packages, lacks, WHEEL=str(self._wheel), SDIST=str(self._sdist))

    def _new_room(self, interpreter: Path, packages: Path | None, lacks: tuple[str, ...] = (), **variables) -> Room:
        self._count += 1
        folder = self._folder / f"room{self._count}"
        (folder / "elsewhere").mkdir(parents=True)
        copy_tree(folder / "project")
        venv = folder / "venv"
        own_pip = ["--without-pip"] if packages else []
        _must_run([str(interpreter), "-m", "venv", *own_pip, str(venv)])
        if packages is not None:
            (_site_packages(venv) / "shared.pth").write_text(f"{packages}\n")
        path = _path_without(lacks, folder / "tools") if lacks else _path()
        variables |= {
            **{name: str(toolkit) for name, toolkit in self._toolkits.items()},
            "PATH": f"{venv / 'bin'}{os.pathsep}{path}",
            "FIRST_CALL": str(ROOT / "tests" / "install" / "first_call.py"),
            "TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
            "PYTHONNOUSERSITE": "1",
        }
        without = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        return Room(folder, {k: v for k, v in environment(**variables).items() if k not in without})

    @functools.cached_property
    def _wheel(self) -> Path:
        if self._given_wheel is not None:
            return self._given_wheel
        return self._distribution("python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .", "*.whl")

    @functools.cached_property
    def _sdist(self) -> Path:
        build = "python -c 'from setuptools import build_meta; build_meta.build_sdist(\"dist\")'"
        return self._distribution(build, "*.tar.gz")

    def _distribution(self, command: str, pattern: str) -> Path:
        room = self._new_room(_interpreter(_own_python()), _own_packages())
        room.run(command)
        return next((room.folder / "project" / "dist").glob(pattern))

    @functools.cached_property
    def _toolkits(self) -> dict[str, Path]:
        folder = self._folder / "toolkits"
        return {
            "BROKEN_NVCC": fake_toolkit(folder / "broken", runs=False),
            "FAILING_NVCC": fake_toolkit(folder / "failing", compiles=False),
            "OLD_NVCC": fake_toolkit(folder / "old", release="9.0", knows=(30, 35, 50, 60, 70)),
        }

    def _packages(self, interpreter: Path, python: str | None, release: str | None) -> Path:
        """The folder of packages with that PyTorch for that interpreter."""
        own_release = torch.__version__.partition("+")[0]
        release = release or own_release
        if (python or _own_python(), release) == (_own_python(), own_release):
            return _own_packages()
        return self._installed_packages(interpreter, release)

    @functools.cache  # noqa: B019  (there is one workshop, and it lives as long as the process)
    def _installed_packages(self, interpreter: Path, release: str) -> Path:
        venv = self._folder / f"{interpreter.name}-torch-{release}"
        _must_run([str(interpreter), "-m", "venv", str(venv)])
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
        # Without its dependencies and from one index: another could offer a build with gigabytes of CUDA.
        quick = ["--retries", "0", "--timeout", "15", "--no-deps"]
        returncode, said = _run([*pip, *quick, "--index-url", self._torch_index, f"torch=={release}"])
        if returncode != 0:
            raise NotAvailable(f"no CPU build of PyTorch {release} for {interpreter.name}: {said.splitlines()[-1]}")
        _must_run([*pip, "--upgrade", *BUILD_PACKAGES, *TORCH_NEEDS])
        return _site_packages(venv)


def _own_python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _own_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))


def _interpreter(version: str) -> Path:
    """An interpreter of that version: this process's, one on the PATH, or one of pyenv's."""
    if version == _own_python():
        return Path(sys.executable).resolve()
    candidates = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)
    for candidate in filter(None, candidates):
        returncode, said = _run([str(candidate), "-c", "import platform, venv; print(platform.python_version())"])
        if returncode == 0 and said.startswith(f"{version}."):
            return Path(candidate)
    raise NotAvailable(f"there is no Python {version}")


def _site_packages(venv: Path) -> Path:
    return next(venv.glob("lib/python*/site-packages"))


def _path() -> str:
    """The PATH, and last the folder of this process's interpreter, where its packages' commands lie."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def _path_without(tools: tuple[str, ...], folder: Path) -> str:
    """A folder of links to all that is on the PATH but those tools."""
    folder.mkdir()
    for directory in map(Path, _path().split(os.pathsep)):
        for entry in directory.iterdir() if directory.is_dir() else ():
            link = folder / entry.name
            if entry.name not in tools and not link.is_symlink():
                link.symlink_to(entry)
    return str(folder)


def _run(command: list[str], **settings) -> tuple[int, str]:
    """The exit status of a command, and what it printed on both streams."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, **settings
    )
    return done.returncode, done.stdout.strip()


def _must_run(command: list[str]) -> None:
    returncode, said = _run(command)
    if returncode != 0:
        raise AssertionError(f"{command} exited with {returncode}: {said[-1500:]}")
