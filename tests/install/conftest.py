"""An environment without the build's settings."""

from __future__ import annotations

import pytest

from build_tools import extension
from tests.install.surroundings import SETTINGS


@pytest.fixture
def clean_settings(monkeypatch: pytest.MonkeyPatch, tmp_path) -> pytest.MonkeyPatch:
    """No variable sets anything; what a build says on the terminal goes into the file `terminal`."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(extension, "TERMINAL", tmp_path / "terminal")
    return monkeypatch
