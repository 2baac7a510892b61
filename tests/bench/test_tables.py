"""The tables: ratios, goals, and what stands beside ours."""

from __future__ import annotations

import pytest

from reimplementation.bench import cases, goals, tables
from tests.bench.figures import document, result


def test_ratios_and_goals():
    backward = result(passed="backward", us=100)
    found = document(
        result(us=12, gathered_bytes=24_000_000, extra_bytes=5),
        result(us=600, backend="grid_sample"),
        result(us=8, backend="floor"),
        backward,
        result(passed="backward frozen", us=50),
    )
    forward = found.results[0]
    assert forward.gather_bandwidth == pytest.approx(2000)  # 24 MB in 12 us
    assert [tables.ours_us(r, found) for r in found.results] == [None, 12, None, None, None]
    assert [tables.floor_us(r, found) for r in found.results] == [8, None, None, None, None]
    assert [tables.default_us(r, found) for r in found.results] == [None, None, None, None, 100]
    assert [goals.goal_us(r) for r in found.results] == [24, None, None, 105, None]
    table = tables.markdown(found)
    assert "| rig-bs1 | forward | 12 / 24 | 1.50x |" in table
    assert "| rig-bs1 | backward frozen | 50 |  |" in table
    assert "| rig-bs1 | forward | float32 | 12 | 600 (50.0x) |" in table


def test_a_peer_stands_beside_ours_and_not_among_them():
    peer = result("msda-encoder", us=30, backend="deformops-triton", dtype="bfloat16")
    found = document(
        result("msda-encoder", us=20, dtype="bfloat16"), peer, result("msda-encoder", us=15, backend="floor")
    )
    assert not peer.is_ours and tables.ours_us(peer, found) == 20
    assert tables.floor_us(peer, found) is None and goals.goal_us(peer) is None
    table = tables.markdown(found)
    assert "| msda-encoder | forward | bfloat16 | 20 | 30 (1.50x) |" in table and table.count("30") == 1


def test_triton_stands_beside_the_extension():
    """Its row is not taken for the extension's of the same case, pass and dtype."""
    found = document(result(us=20), result(us=25, backend="triton"))
    assert "| rig-bs1 | forward | 20 / 24 |" in tables.markdown(found)
    assert "| rig-bs1 | forward | float32 | 20 | 25 (1.25x) |" in tables.markdown(found)


def test_every_goal_belongs_to_a_case():
    for device, case, passed, dtype in goals.GOALS:
        assert device in goals.MACHINES and dtype in cases.DTYPES
        assert passed in cases.CASES[case].passes(device), (case, passed)
        assert case in cases.DEFAULT_CASES[device]
