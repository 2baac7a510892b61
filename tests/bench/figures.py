"""Results for tests, as a run on a GPU would leave them."""

from __future__ import annotations

from reimplementation.bench.results import Document, Result
from reimplementation.bench.timing import Timing


def result(case="rig-bs1", backend="cuda", passed="forward", us=10.0, dtype="float32", **fields) -> Result:
    return Result(case, "cuda", backend, dtype, passed, Timing(us, 0.1, "graph"), **fields)


def document(*found: Result, **machine) -> Document:
    machine = {"device": "NVIDIA H200", "cpu": "a", "threads": 1, **machine}
    return Document(machine, {"torch": "2.11", "cuda": "13.0"}, "2026-01-02", list(found))
