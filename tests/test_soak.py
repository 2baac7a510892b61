"""The soak's own parts: what it calls a leak, and a few of its steps."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.soak import growth, train_once

TIMES = np.linspace(0, 30, 180)


def test_growth_is_that_of_the_line_after_the_warm_up():
    warm_up = np.where(TIMES < 6, TIMES * 100, 600)
    assert growth(TIMES, warm_up) == pytest.approx(0, abs=1e-6)
    assert growth(TIMES, warm_up + 2 * TIMES) == pytest.approx(48, rel=0.01)  # 2 a minute for 24 minutes


def test_growth_looks_through_noise():
    noise = np.random.default_rng(0).normal(0, 1, TIMES.shape)
    assert abs(growth(TIMES, 500 + noise)) < 1
    assert growth(TIMES, 500 + noise + 0.2 * TIMES) == pytest.approx(4.8, abs=1)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_short_a_soak_says_so(count):
    with pytest.raises(ValueError, match="a trend needs 5 samples after the warm-up"):
        growth(TIMES[:count], np.ones(count))


def test_steps_train(device):
    draw = random.Random(0)
    for _ in range(4):
        train_once(draw, device)
