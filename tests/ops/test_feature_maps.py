"""feature_maps_format: rows where the kernels look for them, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reimplementation.ops import feature_maps_format

SHAPES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), min_size=1, max_size=4)


def level_maps(bs, num_cams, channels, shapes):
    """Every element another number."""
    total = 0
    levels = []
    for height, width in shapes:
        count = bs * num_cams * channels * height * width
        levels.append(torch.arange(total, total + count).view(bs, num_cams, channels, height, width).double())
        total += count
    return levels


@settings(max_examples=60, deadline=None)
@given(bs=st.integers(0, 3), num_cams=st.integers(1, 4), channels=st.integers(1, 5), shapes=SHAPES)
def test_round_trip(bs, num_cams, channels, shapes):
    levels = level_maps(bs, num_cams, channels, shapes)
    formatted = feature_maps_format(levels)
    if formatted[0].shape[1] == 0:
        return  # no row is left to tell the cameras from
    (back,) = feature_maps_format(formatted, inverse=True)
    assert len(back) == len(levels)
    assert all(torch.equal(got, wanted) for got, wanted in zip(back, levels))
    assert all(torch.equal(got, wanted) for got, wanted in zip(feature_maps_format([back]), formatted))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bs=st.integers(1, 2), channels=st.integers(1, 3), num_levels=st.integers(1, 3))
def test_round_trip_of_groups(data, bs, channels, num_levels):
    shape = st.tuples(st.integers(1, 4), st.integers(1, 4))
    shapes = st.lists(shape, min_size=num_levels, max_size=num_levels)
    groups, before = [], None
    for _ in range(data.draw(st.integers(2, 3))):
        drawn = data.draw(shapes.filter(lambda s, before=before: s != before))
        groups.append(level_maps(bs, data.draw(st.integers(1, 3)), channels, drawn))
        before = drawn
    back = feature_maps_format(feature_maps_format(groups), inverse=True)
    assert [len(group) for group in back] == [len(group) for group in groups]
    for got, wanted in zip(back, groups):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    again = feature_maps_format(back)
    assert all(torch.equal(a, b) for a, b in zip(again, feature_maps_format(groups)))


@settings(max_examples=40, deadline=None)
@given(bs=st.integers(1, 2), num_cams=st.integers(1, 3), channels=st.integers(1, 4), shapes=SHAPES)
def test_rows_are_where_the_metadata_says(bs, num_cams, channels, shapes):
    levels = level_maps(bs, num_cams, channels, shapes)
    rows, spatial_shape, starts = feature_maps_format(levels)
    assert spatial_shape.dtype == starts.dtype == torch.int64
    assert rows.is_contiguous()
    for level, feature_map in enumerate(levels):
        for cam in range(num_cams):
            height, width = spatial_shape[cam, level].tolist()
            start = int(starts[cam, level])
            assert (height, width) == tuple(feature_map.shape[-2:])
            assert torch.equal(
                rows[:, start : start + height * width].transpose(1, 2).reshape(bs, channels, height, width),
                feature_map[:, cam],
            )


def test_gradients_flow_both_ways():
    levels = [level.requires_grad_() for level in level_maps(2, 3, 4, [(3, 4), (2, 2)])]
    formatted = feature_maps_format(levels)
    (back,) = feature_maps_format(formatted, inverse=True)
    sum((level**2).sum() for level in back).backward()
    assert all(torch.equal(level.grad, 2 * level) for level in levels)


def test_metadata_lies_on_the_maps_device(device):
    levels = [level.to(device) for level in level_maps(1, 2, 3, [(2, 3)])]
    assert all(tensor.device.type == device.type for tensor in feature_maps_format(levels))


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([], ValueError, "feature_maps must hold at least one level; got an empty list"),
        ([torch.zeros(1, 2, 3, 4)], ValueError, r"each level must be \(bs, num_cams, C, H, W\)"),
        (
            [torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 5, 2, 2)],
            ValueError,
            r"with bs=1, num_cams=2, C=3; got \(1, 2, 5, 2, 2\)",
        ),
        ([[torch.zeros(1, 2, 3, 4, 4)], []], ValueError, "every group must have num_levels=1 levels; got 0"),
        ([[1, 2]], TypeError, "feature_maps must hold torch.Tensor levels; got int"),
    ],
)
def test_errors(maps, error, message):
    with pytest.raises(error, match=message):
        feature_maps_format(maps)


def test_inverse_refuses_metadata_of_other_features():
    rows, spatial_shape, starts = feature_maps_format(level_maps(1, 2, 3, [(2, 3)]))
    with pytest.raises(ValueError, match="spatial_shape must describe all num_feat=11 rows of col_feats; got 12 rows"):
        feature_maps_format([rows[:, 1:], spatial_shape, starts], inverse=True)


def test_inverse_nests_as_a_planner_unpacks_it():
    """SparseDrive's planner takes ``[0][-1]``: the last level of the first group of cameras."""
    levels = level_maps(1, 2, 3, [(4, 4), (2, 2)])
    back = feature_maps_format(feature_maps_format(levels), inverse=True)
    assert torch.equal(back[0][-1], levels[-1])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_trace_computes_the_same():
    traced = torch.jit.trace(lambda *levels: tuple(feature_maps_format(levels)), level_maps(2, 3, 4, [(4, 6), (2, 3)]))
    levels = level_maps(1, 3, 4, [(4, 6), (2, 3)])
    for got, wanted in zip(traced(*levels), feature_maps_format(levels), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows, shapes, starts: [rows, shapes], ValueError, "with inverse=True; got a list of 2"),
        (lambda rows, shapes, starts: [rows, -shapes, starts], ValueError, "heights and widths of at least 0"),
        (lambda rows, shapes, starts: [rows, shapes.float(), starts], TypeError, "spatial_shape must be int64 or"),
        (
            lambda rows, shapes, starts: [rows, shapes, starts.flip(0)],
            ValueError,
            r"scale_start_index must count the rows of all levels.* expected \[\[0\], \[6\]\]; got \[\[6\], \[0\]\]",
        ),
    ],
)
def test_inverse_refuses_what_does_not_belong_together(change, error, message):
    with pytest.raises(error, match=message):
        feature_maps_format(change(*feature_maps_format(level_maps(1, 2, 3, [(2, 3)]))), inverse=True)
