"""How steps and calls are timed, by a clock that the steps set."""

from __future__ import annotations

import time

import pytest
import torch

from reimplementation.bench import timing
from reimplementation.bench.timing import measure, measure_host, measure_in_turn

CPU = torch.device("cpu")


class Clock:
    """A clock that stands still until it is set on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.seconds = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.seconds)

    def passes(self, microseconds: float) -> None:
        self.seconds += microseconds * 1e-6


def test_measure_runs_every_step_in_turn(monkeypatch):
    clock, order = Clock(monkeypatch), []

    def step(number: int) -> None:
        order.append(number)
        clock.passes(100 * (1 + number))

    taken = measure([lambda i=i: step(i) for i in range(3)], CPU, repeats=4)
    assert order == [0, 1, 2] * (timing.WARM_UP + 4)
    assert taken.method == "wall"
    assert (taken.median_us, taken.spread_us) == (pytest.approx(200), pytest.approx(200))


def test_contestants_take_turns_and_have_timings_of_their_own(monkeypatch):
    clock, order = Clock(monkeypatch), []

    def step(number: int) -> None:
        order.append(number)
        clock.passes(100 * (1 + number))

    taken = measure_in_turn([lambda i=i: step(i) for i in range(3)], CPU, repeats=4)
    assert order == [0, 1, 2] * (timing.WARM_UP + 4)
    assert [each.median_us for each in taken] == pytest.approx([100, 200, 300])
    assert all(each.spread_us == pytest.approx(0, abs=1e-3) for each in taken)


def test_measure_host_prepares_each_call_outside_of_the_timing(monkeypatch):
    clock, made, used = Clock(monkeypatch), [], []

    def prepare() -> int:
        clock.passes(1e6)
        made.append(len(made))
        return made[-1]

    def call(item: int) -> None:
        clock.passes(7)
        used.append(item)

    taken = measure_host(call, CPU, repeats=2, prepare=prepare)
    assert used == made and len(made) >= 2 * timing.HOST_CALLS
    assert (
        taken.method == "host" and taken.median_us == pytest.approx(7) and taken.spread_us == pytest.approx(0, abs=1e-3)
    )
