"""`python -m tests.install.artifacts FILE`: a wheel or an sdist holds what it must, and nothing else.

A wheel's extension must also need nothing of PyTorch but the C functions of its stable ABI, or it would be tied to one
release.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.install.surroundings import ROOT

BUILT = re.compile(r"__pycache__|\.so$|_build\.json$")
METADATA = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
SDIST_FILES = {".ci/run", "LICENSE", "MANIFEST.in", "README.md", "PKG-INFO", "pyproject.toml", "setup.cfg", "setup.py"}


def check_wheel(wheel: Path, built: bool = True) -> None:
    """The package without its kernels' sources, with the extension if built, and the licence; for Python 3.10 on."""
    assert re.search(r"-cp310-abi3-\w*linux_\w+\.whl$", wheel.name), f"the wheel's tags are wrong: {wheel.name}"
    package = ROOT / "reimplementation"
    files = [path for path in package.rglob("*") if path.is_file() and not BUILT.search(str(path))]
    expected = {str(path.relative_to(ROOT)) for path in files if package / "ops" / "csrc" not in path.parents}
    expected |= {"reimplementation/_build.json"} | ({"reimplementation/_C.abi3.so"} if built else set())
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    found = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert found == METADATA, f"the wheel's metadata differ: {sorted(found ^ METADATA)}"
    names = {name for name in names if ".dist-info/" not in name}
    assert names == expected, (
        f"the wheel lacks {sorted(expected - names)}, and should not hold {sorted(names - expected)}"
    )


def check_symbols(wheel: Path) -> None:
    """Every C++ symbol that the extension needs is versioned, and so the C++ library's: PyTorch's have no version."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        library = archive.extract("reimplementation/_C.abi3.so", folder)
        listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = listed.stdout.split()[1::2]  # each line: U, and the name
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), f"it needs nothing of PyTorch: {symbols}"
    unstable = [symbol for symbol in symbols if symbol.startswith("_Z") and "@" not in symbol]
    assert not unstable, f"the extension needs symbols outside of PyTorch's stable ABI: {unstable}"


def check_sdist(sdist: Path) -> None:
    """All that is needed to build and to test; nothing that was built."""
    folders = ("build_tools", "reimplementation", "tests")
    sources = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    expected = {str(path.relative_to(ROOT)) for path in sources if not BUILT.search(str(path))} | SDIST_FILES
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert names >= expected, f"the sdist lacks {sorted(expected - names)}"
    stray = [name for name in names if BUILT.search(name) or name.split("/")[0] in (".git", ".venv", "build", "dist")]
    assert not stray, f"the sdist should not hold {stray}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    if file.suffix == ".whl":
        check_wheel(file)
        check_symbols(file)
    else:
        check_sdist(file)
