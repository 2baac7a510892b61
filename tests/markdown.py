"""What tests read in the project's Markdown pages: code, commands, links, headings, tables."""

from __future__ import annotations

import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def code_blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without their indentation."""
    return [textwrap.dedent(code) for _, found, code in _FENCE.findall(page.read_text()) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every command in the page's shell blocks, without comments, pipes and redirections."""
    lines = "".join(code_blocks(page, "sh")).replace("\\\n", " ").splitlines()
    words = (shlex.split(re.split(r" [|>] ", line)[0], comments=True) for line in lines)
    return [command for command in words if command]


def links(page: Path) -> list[str]:
    """The targets of all links and pictures that lead to a place in the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", _prose(page))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def table_rows(text: str) -> list[list[str]]:
    """The cells of all table rows of a text, headings included."""
    rows = re.findall(r"^\|(.+)\|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows if not re.fullmatch(r"[-: |]+", row)]


def _prose(page: Path) -> str:
    """A page without its fenced blocks, where a comment would look like a heading."""
    return _FENCE.sub("", page.read_text())
