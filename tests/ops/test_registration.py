"""What becomes of an op whose operator the compiled library lacks."""

import dataclasses

import pytest

from reimplementation.ops import _register, deformable_aggregation


def test_a_library_of_older_sources_says_so(monkeypatch):
    monkeypatch.setattr(_register, "EXTENSION_AVAILABLE", True)
    spec = dataclasses.replace(deformable_aggregation.SPEC, name="from_a_later_version")
    with pytest.raises(ImportError, match=r"has no from_a_later_version: .* older sources .* build it again"):
        _register.define(spec, formula=lambda *operands: operands[0])
