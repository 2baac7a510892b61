"""Adds the compiled extension to the package of pyproject.toml; build_tools/ does the compiling."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip runs this file without its folder on the path

from build_tools.extension import build_extension  # noqa: E402


class BuildExtension(build_ext):
    def run(self) -> None:
        csrc = ROOT / "reimplementation" / "ops" / "csrc"
        # Not build_temp: that is a new folder for each `pip install -e`, and all would be compiled again.
        build_dir = ROOT / "build" / "extension"
        library = Path(self.get_ext_fullpath(self.extensions[0].name))
        build_extension(csrc, build_dir, library)


setup(
    ext_modules=[Extension("reimplementation._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
