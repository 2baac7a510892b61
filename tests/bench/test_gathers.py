"""The rows that an op gathers, against the op; and the kernel that gathers nothing else, against them."""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from reimplementation.bench.cases import OpCase
from reimplementation.bench.floor import WARP, gather_step, measure_floor, team_lanes
from reimplementation.bench.gathers import Gathers, gathers
from reimplementation.bench.inputs import (
    AggregationInputs,
    AttentionInputs,
    OpInputs,
    aggregation_inputs,
    attention_inputs,
)
from reimplementation.bench.steps import op_step


def at_pixel_corners(location: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Moved to where four pixels of a level meet: each then weighs a quarter."""
    size = location.new_tensor([width, height])
    return (location * size).round() / size


def summed(found: Gathers) -> torch.Tensor:
    """(num_bags, channels): the sum of each bag's rows."""
    bags = torch.repeat_interleave(torch.arange(len(found.starts) - 1), found.starts.diff())
    rows = found.table[found.rows.long()]
    return found.table.new_zeros(len(found.starts) - 1, found.table.shape[1]).index_add_(0, bags, rows)


def test_rows_of_aggregation_add_up_to_its_output():
    base = aggregation_inputs("rig", 2, num_queries=40, channels=8, strides=(32,), dtype=torch.float64)
    location = at_pixel_corners(base.sampling_location, 22, 8)
    inputs = AggregationInputs(*list(base)[:3], location, torch.ones_like(base.weights))
    found = gathers(inputs)
    assert found.rows.dtype == torch.int32 and found.starts[-1] == len(found.rows) > 0
    expected = ops.deformable_aggregation_function(*inputs)
    torch.testing.assert_close(summed(found).view_as(expected) / 4, expected)


def test_rows_of_attention_add_up_to_its_output():
    base = attention_inputs("small-decoder", 2, geometry="uniform", dtype=torch.float64)
    value, shapes, starts, locations, weights = base
    locations = (locations * 1.4 - 0.2).clone()
    for level, (height, width) in enumerate(shapes.tolist()):
        locations[:, :, :, level] = at_pixel_corners(locations[:, :, :, level], width, height)
    inputs = AttentionInputs(value, shapes, starts, locations, torch.ones_like(weights))
    found = gathers(inputs)
    assert 0 < len(found.rows) < 4 * weights.numel()  # some footprints reach beyond the level, or lie there
    by_head = summed(found).view(2, value.shape[2], -1, value.shape[3])
    torch.testing.assert_close(by_head.transpose(1, 2).flatten(2) / 4, ops.ms_deform_attn(*inputs))


def test_nothing_outside_is_gathered():
    base = aggregation_inputs("dense", 1, num_queries=3, num_points=2, channels=8, strides=(32,))
    for outside in (-1e6, 0.0, 1.0, float("nan"), float("inf")):
        location = torch.full_like(base.sampling_location, outside)
        found = gathers(AggregationInputs(*list(base)[:3], location, base.weights))
        assert len(found.rows) == 0 and found.starts.tolist() == [0] * 4


class OtherInputs(OpInputs):
    """Operands of an op that the benchmark does not know."""


def test_an_unknown_op_is_refused():
    """It must not be taken for attention, whose rows are others."""
    with pytest.raises(TypeError, match="the rows of OtherInputs are not known"):
        gathers(OtherInputs())
    with pytest.raises(TypeError, match="ops for AggregationInputs, .*AttentionInputs; got OtherInputs"):
        op_step(OtherInputs(), "cpu", "forward")


@pytest.mark.parametrize(("dtype", "channel_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_gathered_bytes(dtype, channel_bytes):
    base = aggregation_inputs("dense", 1, num_queries=3, num_points=2, channels=8, strides=(32, 16), dtype=dtype)
    location = torch.full_like(base.sampling_location, 0.4)
    found = gathers(AggregationInputs(*list(base)[:3], location, base.weights))
    samples = 3 * 2 * 6 * 2  # queries, points, cameras, levels
    assert found.gathered_bytes == samples * 4 * 8 * channel_bytes


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [8, 64, 256, 512, 1000])
def test_floor_adds_the_rows(channels, dtype):
    inputs = aggregation_inputs(num_queries=30, channels=channels, strides=(16, 32), dtype=dtype, device="cuda")
    check_floor(gathers(inputs))


@pytest.mark.cuda
@pytest.mark.parametrize("case", ["small-encoder", "small-decoder"])
def test_floor_adds_the_rows_of_heads(case):
    check_floor(gathers(attention_inputs(case, 2, device="cuda")))


def check_floor(found: Gathers) -> None:
    """Every way to split the bags gives the sum of the rows as 32-bit words, to the bit."""
    words = found.table.view(torch.int32)
    bags = torch.repeat_interleave(torch.arange(len(found.starts) - 1, device="cuda"), found.starts.diff())
    expected = torch.zeros(len(found.starts) - 1, words.shape[1], dtype=torch.int64, device="cuda")
    expected.index_add_(0, bags, words[found.rows.long()].long())
    splits = 1
    while splits * team_lanes(found) <= 8 * WARP:
        actual = gather_step(found, splits)()
        assert torch.equal(actual, expected.to(torch.int32)), splits  # both wrap around at 32 bits
        splits *= 2


@pytest.mark.cuda
def test_floor_is_timed_as_a_graph():
    inputs = aggregation_inputs(num_queries=30, channels=64, strides=(16, 32), device="cuda")
    timing = measure_floor([gathers(inputs)], torch.device("cuda"), repeats=2)
    assert timing.method == "graph" and timing.median_us > 0
    assert OpCase(AggregationInputs, aggregation_inputs).passes("floor") == ("forward",)
