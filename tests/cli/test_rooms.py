"""The rooms of the package import one another in one direction."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "reimplementation"
MAY_IMPORT = {  # of the package's rooms; each may import itself
    "cli": {"demo", "bench", "training", "data", "integrations", "models", "ops"},
    "demo": {"bench", "data", "models", "ops"},
    "bench": {"data", "integrations", "models", "ops"},
    "training": {"data", "integrations", "models", "ops"},
    "integrations": {"models", "ops"},
    "data": set(),
}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Each module that a file imports by its full name, and the name that it takes from there."""
    package = ("reimplementation", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def room_of(module: str, name: str) -> str:
    """The room that an import leads to, as `ops` for reimplementation.ops.backends; empty for others' modules."""
    top, *rest = f"{module}.{name}".split(".")
    return rest[0] if top == "reimplementation" and rest[0] in {"ops", "models", *MAY_IMPORT} else ""


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_go_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        for module, name in imports(path):
            other = room_of(module, name)
            assert not other or other == room or other in MAY_IMPORT[room], f"{path.name} imports {module}.{name}"
            private = any(part.startswith("_") and not part.startswith("__") for part in f"{module}.{name}".split("."))
            assert not (private and other and other != room), f"{path.name} imports the private {module}.{name}"


def test_data_needs_little():
    """Its inputs may be anyone's, and its readers may be used without anything else of the package.

    Three files draw synthetic drives, which is a GPU's work.
    """
    allowed = {*sys.stdlib_module_names, "numpy", "PIL", "reimplementation"}
    for path in (PACKAGE / "data").rglob("*.py"):
        draws = path.name in ("rendering.py", "painting.py", "tracing.py")
        also = {"torch", "triton"} if draws else set()
        assert {module.partition(".")[0] for module, _ in imports(path)} <= allowed | also, path.name
