"""A few draws of the fuzzer, and that it would notice an op that is wrong; ``make fuzz`` runs many."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.fuzz.checking import ACCEPTED, REFUSED, Mismatch, check
from tests.fuzz.draws import draw
from tests.ops.table import BOXES, FEATURE_AGGREGATION, PROJECTION, SAMPLING_OPS

DRAWS = 150
SEED = 7


def test_random_calls(device):
    outcomes = []
    for number in range(DRAWS):
        try:
            outcomes.append(check(draw(SEED, number, device)))
        except Mismatch as mismatch:
            raise AssertionError(
                f"python -m tests.fuzz --seed {SEED} --device {device.type} --only {number}: {mismatch}"
            ) from mismatch
    assert min(outcomes.count(ACCEPTED), outcomes.count(REFUSED)) > DRAWS // 5


def test_a_draw_depends_on_its_seed_and_number_alone(device):
    again = [draw(SEED, 3, device) for _ in range(2)]
    other = draw(SEED, 4, device)
    assert again[0].story == again[1].story != other.story
    for one, two in zip(*(each.operands for each in again)):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def slightly_large(function):
    return lambda *operands: function(*operands) * (1 + 1e-4)


def slightly_shifted(function):
    return lambda features, shapes, starts, places, *others: function(features, shapes, starts, places + 1e-4, *others)


def without_nan(function):
    return lambda first, *others: function(first.nan_to_num(0), *others)


def of_the_next_level(function):
    return lambda features, shapes, starts, *others: function(features, shapes, starts.roll(1, -1), *others)


def without_checks(function):
    def call(*operands):
        try:
            return function(*operands)
        except (TypeError, ValueError) as error:
            raise RuntimeError("from the depth") from error

    return call


def ignoring_the_last(function):
    return lambda *operands: function(*operands[:-1])


WRONG_SAMPLING = (slightly_large, slightly_shifted, without_nan, of_the_next_level, without_checks)
WRONG_FORMULA = (slightly_large, slightly_shifted, of_the_next_level, without_checks)  # it is drawn without NaN
WRONG_POINTWISE = (slightly_large, without_nan, without_checks, ignoring_the_last)
WRONG = [(wrong, SAMPLING_OPS) for wrong in WRONG_SAMPLING]
WRONG += [(wrong, (FEATURE_AGGREGATION,)) for wrong in WRONG_FORMULA]
WRONG += [(wrong, (PROJECTION, BOXES)) for wrong in WRONG_POINTWISE]


@pytest.mark.parametrize(("wrong", "of"), WRONG, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_op_is_noticed(wrong, of):
    names = [op.name for op in of]
    draws = (draw(SEED, number, torch.device("cpu")) for number in range(400))
    for drawn in (drawn for drawn in draws if drawn.op.name in names):
        drawn.op = replace(drawn.op, function=wrong(drawn.op.function))
        try:
            check(drawn)
        except Mismatch:
            return
    pytest.fail("not one of the draws noticed")
