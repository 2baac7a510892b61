"""deformable_aggregation: channels, groups, cameras, levels and points in any number, and the words of its errors."""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from tests.ops.agreement import assert_agrees
from tests.ops.inputs import random_inputs
from tests.ops.table import AGGREGATION


@pytest.mark.parametrize(
    ("channels", "num_groups"),
    [
        (1, 1),
        (2, 2),
        (8, 1),
        (30, 1),
        (30, 5),
        (32, 8),
        (71, 1),
        (71, 71),
        (96, 4),
        (256, 1),
        (512, 8),
        (1025, 5),
    ]
    + [(2048, 2), (3096, 3)],
)
def test_any_channels_and_groups(backend_device, channels, num_groups):
    operands = random_inputs(1, batch_size=1, num_queries=3, channels=channels, num_groups=num_groups)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert_agrees(AGGREGATION, operands, backend_device, dtype)


@pytest.mark.parametrize("num_levels", [1, 9])
@pytest.mark.parametrize("num_cams", [1, 3, 11])
@pytest.mark.parametrize("num_points", [1, 40])
def test_any_cameras_levels_points(backend_device, num_points, num_cams, num_levels):
    shapes = [[(2 + (cam + level) % 5, 3 + level) for level in range(num_levels)] for cam in range(num_cams)]
    operands = random_inputs(2, num_queries=1, num_points=num_points, channels=8, shapes=shapes)
    assert_agrees(AGGREGATION, operands, backend_device, torch.float64)


def wrong(**changes):
    """Valid arguments with some replaced."""
    inputs = random_inputs(12)
    arguments = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
    arguments.update({name: change(arguments[name]) for name, change in changes.items()})
    return arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            wrong(sampling_location=lambda t: t[:, :, :, :2]),
            ValueError,
            r"sampling_location must be \(bs, num_queries, num_pts, num_cams, 2\) with bs=2, num_cams=3; "
            r"got \(2, 7, 3, 2, 2\)",
        ),
        (wrong(feature_maps=lambda t: t[0]), ValueError, r"feature_maps must be \(bs, num_feat, C\); got"),
        (
            wrong(spatial_shape=lambda t: t[0]),
            ValueError,
            r"spatial_shape must be \(num_cams, num_levels, 2\); got",
        ),
        (
            wrong(scale_start_index=lambda t: t[:1]),
            ValueError,
            r"scale_start_index must be \(num_cams, num_levels\) with num_cams=3, num_levels=2; got \(1, 2\)",
        ),
        (wrong(weights=lambda t: t[..., :3, :1, :]), ValueError, r"weights must be .* num_levels=2; got .*"),
        (
            wrong(weights=lambda t: t[..., :3]),
            ValueError,
            r"weights: num_groups must divide C=32; got num_groups=3",
        ),
        (
            wrong(weights=lambda t: t[..., :0]),
            ValueError,
            r"weights: num_groups must divide C=32; got num_groups=0",
        ),
        (
            wrong(sampling_location=lambda t: t.half()),
            TypeError,
            r"sampling_location must be float32 or float64; got float16",
        ),
        (wrong(weights=lambda t: t.half()), TypeError, r"weights must be float64 or float32; got float16"),
        (wrong(feature_maps=lambda t: t.long()), TypeError, r"feature_maps must be float64 or .*; got int64"),
        (
            wrong(spatial_shape=lambda t: t.float()),
            TypeError,
            r"spatial_shape must be int64 or .*; got float32",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.deformable_aggregation_function(**arguments)
