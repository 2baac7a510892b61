"""What the CUDA kernels' host code decides without CUDA, compiled for the host and asked there."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass

import pytest
from torch.utils.cpp_extension import include_paths

from tests.csrc.compiling import CSRC, run_program, tool

MOST_SAMPLES, MOST_MERGED, MOST_KEYS = 2**26, 2**23, 2**32 - 1


def test_nobody_meets_in_a_pool_and_it_is_no_larger_than_its_users(tmp_path):
    assert run_program("pool.cpp", tmp_path, tool("c++", "g++"), "-pthread").split() == ["0", "1", "1", "1"]


def test_macros_of_pytorch_are_those_of_the_oldest_that_compiles_it():
    """Headers of a later PyTorch have more, and sources that use them compile on a developer's machine alone."""
    sources = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    used = {name for path in sources for name in re.findall(r"\b(?:STABLE|STD)_TORCH_\w+", path.read_text())}
    assert used == {"STABLE_TORCH_LIBRARY", "STD_TORCH_CHECK"}


@dataclass(frozen=True)
class Call:
    """The sizes of a call of the features' gradient."""

    batch: int = 6
    heads: int = 1
    queries: int = 900
    points: int = 13
    cams: int = 6
    levels: int = 4
    rows: int = 89_760
    channels: int = 256
    groups: int = 8
    deterministic: int = 0
    single_queries: int = 0

    @property
    def query_samples(self) -> int:
        return self.heads * self.points * self.cams * self.levels


CALLS = {
    "rig": Call(),
    "rig, deterministic": Call(deterministic=1),
    "one sample": Call(1, 1, 1, 1, 1, 1, 1, 1, 1),
    "many batch elements": Call(batch=1000),
    "many batch elements, deterministic": Call(batch=1000, deterministic=1),
    "more samples than at once": Call(batch=2, queries=500_000),
    "one query alone is the most": Call(batch=1, queries=3, points=2**24, cams=1, levels=4),
    "more rows than memory for keys": Call(batch=7, rows=2**26, queries=3),
    "weights beyond 32 bits": Call(2, 1, 2, 1024, 256, 4, 1024, 2048, 2048, 0, 1),
}
TOO_LARGE = {
    "samples of a query": Call(points=2**25),
    "rows": Call(heads=8, rows=2**28),
    "channels": Call(channels=2**32),
}


@pytest.fixture(scope="module")
def divide(tmp_path_factory):
    """What `divide` says of many calls: for each its seven numbers and its shares, or None where it is too large."""
    calls = [*CALLS.values(), *TOO_LARGE.values()]
    printed = run_program(
        "division.cpp",
        tmp_path_factory.mktemp("division"),
        tool("c++", "g++"),
        *(f"-I{path}" for path in include_paths()),
        reads="\n".join(" ".join(map(str, map(int, astuple(call)))) for call in calls),
    )
    lines = printed.splitlines()
    assert len(lines) == len(calls)
    return {call: None if line == "too large" else [int(n) for n in line.split()] for call, line in zip(calls, lines)}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_shares_of_the_features_gradient(divide, call):
    batches, queries, samples, tiles, keys, crowded_from, most_crowded, *shares = divide[call]
    assert samples == batches * queries * call.query_samples <= MOST_SAMPLES
    assert keys == 16 * tiles + 1 <= MOST_KEYS
    assert batches == 1 or 4 * (keys - 1) <= 2**30
    assert batches == 1 or not call.deterministic or samples <= MOST_MERGED
    assert queries == 1 or not call.single_queries
    # As many tiles as can have so many samples: each counts for its own tile, and for three neighbours.
    assert min(tiles, 4 * samples // crowded_from) == most_crowded

    visits = [
        (batch, query)
        for at in range(0, len(shares), 4)
        for batch in range(shares[at], shares[at] + shares[at + 1])
        for query in (shares[at + 2], shares[at + 2] + shares[at + 3])
    ]
    ends = {}
    for (batch, begin), (_, end) in zip(visits[::2], visits[1::2]):
        assert ends.get(batch, 0) == begin, "the shares of a batch element's queries follow each other"
        ends[batch] = end
    assert ends == dict.fromkeys(range(call.batch), call.queries)
    assert max(shares[1::4]) == batches and max(shares[3::4]) == queries


@pytest.mark.parametrize("call", TOO_LARGE.values(), ids=TOO_LARGE)
def test_what_32_bits_cannot_number_is_refused(divide, call):
    assert divide[call] is None
