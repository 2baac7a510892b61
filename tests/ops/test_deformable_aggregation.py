"""The op on every backend against the float64 formula, its errors, and its registration with PyTorch."""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from reimplementation.bench.inputs import AggregationInputs
from tests.ops import agreement
from tests.ops.agreement import run
from tests.ops.inputs import GEOMETRIES, border_inputs, random_inputs
from tests.reference import deformable_aggregation, relative_error

SMALL = (((4, 5), (2, 3)), ((3, 2), (1, 2)))  # two cameras of two levels: few enough pixels to perturb one by one
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def assert_agrees(inputs: AggregationInputs, device, dtype):
    agreement.assert_agrees(ops.deformable_aggregation_function, deformable_aggregation, inputs, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_agrees_with_float64(backend_device, dtype, geometry):
    assert_agrees(GEOMETRIES[geometry](), backend_device, dtype)


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
    inputs = random_inputs(1, num_queries=3, channels=channels, num_groups=num_groups)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert_agrees(inputs, backend_device, dtype)


@pytest.mark.parametrize("num_levels", [1, 5, 9])
@pytest.mark.parametrize("num_cams", [1, 3, 11])
@pytest.mark.parametrize("num_points", [1, 40])
def test_any_cameras_levels_points(backend_device, num_points, num_cams, num_levels):
    shapes = [[(2 + (cam + level) % 5, 3 + level) for level in range(num_levels)] for cam in range(num_cams)]
    inputs = random_inputs(2, num_queries=2, num_points=num_points, channels=8, shapes=shapes)
    assert_agrees(inputs, backend_device, torch.float64)


def test_gradcheck(backend_device):
    features, shapes, starts, location, weights = random_inputs(
        4, batch_size=1, num_queries=3, channels=8, shapes=SMALL
    ).to(backend_device, torch.float64)
    # Half a step away from the edges of pixels, where the derivative does not exist.
    leaves = [t.requires_grad_() for t in (features, location + 2.0**-13, weights)]

    def function(features, location, weights):
        return ops.deformable_aggregation_function(features, shapes, starts, location, weights)

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=1e-12)


def test_expanded_operands(backend_device):
    features, shapes, starts, location, weights = random_inputs(7, num_queries=1, num_points=1).to(
        backend_device, torch.float64
    )
    expanded = location.expand(-1, 5, 2, -1, -1), weights.expand(-1, 5, 2, -1, -1, -1)
    repeated = [t.contiguous() for t in expanded]
    got = run(ops.deformable_aggregation_function, AggregationInputs(features, shapes, starts, *expanded))
    wanted = run(ops.deformable_aggregation_function, AggregationInputs(features, shapes, starts, *repeated))
    assert all(relative_error(a, b) <= 1e-12 for a, b in zip(got, wanted))


@pytest.mark.parametrize("empty", ["batch_size", "num_queries", "num_points", "num_feat", "num_cams", "num_levels"])
def test_nothing_to_sample(backend_device, empty):
    sizes = {"batch_size": 2, "num_queries": 3, "num_points": 2}
    shapes = [[(4, 5)]] * 2
    if empty in sizes:
        sizes[empty] = 0
    elif empty == "num_cams":
        shapes = torch.empty(0, 1, 2, dtype=torch.int64)
    elif empty == "num_levels":
        shapes = torch.empty(2, 0, 2, dtype=torch.int64)
    elif empty == "num_feat":
        shapes = [[(0, 0)]] * 2
    if isinstance(shapes, torch.Tensor):
        features = torch.randn(2, 20, 32, dtype=torch.float64)
        pairs = (2, 3, 2, shapes.shape[0])
        inputs = AggregationInputs(
            features,
            shapes,
            torch.empty(shapes.shape[:2], dtype=torch.int64),
            torch.rand(*pairs, 2, dtype=torch.float64),
            torch.randn(*pairs, shapes.shape[1], 4, dtype=torch.float64),
        )
    else:
        inputs = random_inputs(9, shapes=shapes, **sizes)
    inputs = inputs.to(backend_device, torch.float64)
    output, *gradients = run(ops.deformable_aggregation_function, inputs)
    assert output.shape == (inputs.feature_maps.shape[0], inputs.sampling_location.shape[1], 32)
    assert not output.any()
    for gradient, operand in zip(gradients, (inputs.feature_maps, inputs.sampling_location, inputs.weights)):
        assert gradient.shape == operand.shape
        assert not gradient.any()


def test_culled_pairs_touch_nothing(backend_device):
    """NaN weights of unseen pairs and NaN pixels outside the footprints leave no trace."""
    inputs = border_inputs().to(backend_device, torch.float64)
    features, shapes, starts, location, weights = inputs
    visible = ((location > 0) & (location < 1)).all(-1)
    poisoned = weights.masked_fill(~visible[..., None, None], float("nan"))
    clean = run(ops.deformable_aggregation_function, inputs)
    for got, wanted in zip(
        run(
            ops.deformable_aggregation_function,
            AggregationInputs(features, shapes, starts, location, poisoned),
        ),
        clean,
    ):
        assert relative_error(got, wanted) <= 1e-12

    features = torch.randn(1, 18, 8, dtype=torch.float64, device=backend_device)
    features[:, [0, 17]] = float("nan")  # the rows around a level of 4 x 4
    corners = torch.tensor([[0.01, 0.01], [0.99, 0.01], [0.01, 0.99], [0.99, 0.99]], dtype=torch.float64)
    inputs = AggregationInputs(
        features,
        torch.tensor([[[4, 4]]], device=backend_device),
        torch.tensor([[1]], device=backend_device),
        corners.view(1, 4, 1, 1, 2).to(backend_device),
        torch.ones(1, 4, 1, 1, 1, 1, dtype=torch.float64, device=backend_device),
    )
    output, grad_features, grad_location, grad_weights = run(ops.deformable_aggregation_function, inputs)
    assert all(t.isfinite().all() for t in (output, grad_features, grad_location, grad_weights))


def test_levels_beyond_the_features(backend_device):
    features, shapes, starts, location, weights = random_inputs(10).to(backend_device, torch.float64)
    for bad_shapes, bad_starts in [
        (shapes, starts + 1),
        (shapes, starts - 1),
        (shapes * torch.tensor([1, 2], device=backend_device), starts),
        (-shapes, starts),
        (torch.full_like(shapes, 2**31 - 1), starts),
    ]:
        message = r"spatial_shape and scale_start_index must stay within num_feat=\d+ rows; got a level of .*"
        with pytest.raises(ValueError, match=message):
            ops.deformable_aggregation_function(features, bad_shapes.cpu(), bad_starts.cpu(), location, weights)
        if backend_device.type == "cuda":
            output = ops.deformable_aggregation_function(features, bad_shapes, bad_starts, location, weights)
            fits = (bad_shapes > 0).all(-1) & (bad_starts >= 0)
            fits &= bad_starts + bad_shapes.prod(-1).clamp(max=2**40) <= features.shape[1]
            kept = torch.where(fits[..., None], bad_shapes, 0), torch.where(fits, bad_starts, 0)
            expected = ops.deformable_aggregation_function(features, *kept, location, weights)
            assert torch.equal(output, expected)


def test_overlapping_and_permuted_levels(backend_device):
    inputs = random_inputs(11, shapes=(((6, 5), (6, 5)), ((6, 5), (2, 3))))
    permuted = AggregationInputs(
        inputs.feature_maps, inputs.spatial_shape, torch.tensor([[60, 3], [0, 0]]), *list(inputs)[3:]
    )
    assert_agrees(permuted, backend_device, torch.float64)


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
        (wrong(weights=lambda t: t.tolist()), TypeError, r"weights must be a torch.Tensor; got list"),
        (
            wrong(feature_maps=lambda t: t.to_sparse()),
            TypeError,
            r"feature_maps must be a dense \(strided\) tensor",
        ),
        (wrong(weights=lambda t: t.to("meta")), ValueError, r"weights must be on cpu; got meta"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.deformable_aggregation_function(**arguments)


def test_direct_calls_of_the_operator_are_checked(device):
    """Also levels, as long as they are on the CPU."""
    if device.type not in ops.available_backends(device):
        pytest.skip("the extension is not built")
    operator = torch.ops.reimplementation.deformable_aggregation
    for arguments in (
        wrong(sampling_location=lambda t: t[:, :, :, :2]),
        wrong(scale_start_index=lambda t: t + 1),
        wrong(weights=lambda t: t[..., :3]),
        wrong(sampling_location=lambda t: t.half()),
        wrong(spatial_shape=lambda t: t.double()),
    ):
        with pytest.raises(RuntimeError, match="sampling_location|scale_start_index|num_groups|spatial_shape"):
            operator(*(t if i in (1, 2) else t.to(device) for i, t in enumerate(arguments.values())))
