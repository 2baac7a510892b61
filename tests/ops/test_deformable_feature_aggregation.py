"""The op on every backend against the float64 formula, its errors, and its registration with PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reimplementation import ops
from tests import reference
from tests.ops.agreement import KernelCalls
from tests.ops.feature_aggregation_inputs import FeatureAggregationInputs, feature_aggregation_inputs
from tests.ops.inputs import with_memory_reversed
from tests.reference import TOLERANCE, relative_error

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SMALL = (((4, 5), (2, 3)), ((3, 2), (1, 2)))  # two cameras of two levels: few enough pixels to perturb one by one
FORMS = {
    "camera-term": {},
    "term-a-pair": {"by_camera": False},
    "dropped": {"attn_drop": 0.25},
    "visible-only": {"visible_only": True},
    "all-at-once": {"by_camera": False, "attn_drop": 0.25, "visible_only": True},
}
forms = pytest.mark.parametrize("form", FORMS)


def run(function, inputs: FeatureAggregationInputs, grad_output=None) -> dict[str, torch.Tensor]:
    """The output, and by their names the gradients; the output's gradient is random but for its seed."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.leaves().items()}
    output = function(*replace(inputs, **leaves))
    if grad_output is None:
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output.to(output))
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    for name, wanted in expected.items():
        error = relative_error(actual[name].cpu(), wanted.cpu())
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e} > {tolerance:.0e}"


def assert_agrees(inputs: FeatureAggregationInputs, device, dtype) -> None:
    """The op equals the float64 formula on the same, rounded, numbers."""
    inputs = inputs.to("cpu", dtype)
    shape = (*inputs.logits.shape[:2], inputs.feature_maps.shape[2])
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = run(reference.deformable_feature_aggregation, inputs.to("cpu", torch.float64), grad_output)
    actual = run(ops.deformable_feature_aggregation, inputs.to(device, dtype), grad_output)
    assert actual["output"].dtype == dtype
    # A key point's gradient is one sum over all channels, which rounds once a channel.
    rounding = shape[2] ** 0.5 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    assert_close(actual, expected, max(TOLERANCE[dtype], rounding))


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_float64(backend_device, dtype, form):
    assert_agrees(feature_aggregation_inputs(**FORMS[form]), backend_device, dtype)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 8, 71])
@pytest.mark.parametrize("group_channels", [1, 2, 30, 32])
def test_any_channels_and_groups(backend_device, group_channels, num_groups):
    channels = group_channels * num_groups
    inputs = feature_aggregation_inputs(1, num_queries=3, channels=channels, num_groups=num_groups, attn_drop=0.2)
    for dtype in (torch.float64, torch.float32, torch.float16):
        assert_agrees(inputs, backend_device, dtype)


@pytest.mark.parametrize("num_levels", [1, 5, 9])
@pytest.mark.parametrize("num_cams", [1, 3, 11])
@pytest.mark.parametrize("num_points", [1, 40])
def test_any_cameras_levels_points(backend_device, num_points, num_cams, num_levels):
    shapes = [[(2 + (cam + level) % 5, 3 + level) for level in range(num_levels)] for cam in range(num_cams)]
    sizes = {"num_queries": 2, "num_points": num_points, "channels": 8, "shapes": shapes}
    if num_points * num_levels > 1:  # where a query has one term, it is in all logits and does nothing
        assert_agrees(feature_aggregation_inputs(2, **sizes), backend_device, torch.float64)
    assert_agrees(feature_aggregation_inputs(2, **sizes, **FORMS["all-at-once"]), backend_device, torch.float64)


@pytest.mark.parametrize("by_camera", [True, False])
def test_many_queries(device, by_camera):
    """Several of them to each block or chunk."""
    inputs = feature_aggregation_inputs(3, num_queries=1500, channels=8, num_groups=2, by_camera=by_camera)
    assert_agrees(inputs, device, torch.float64)
    assert_agrees(inputs, device, torch.float32)


@forms
def test_many_points(device, form):
    """So many that blocks share them, and that the logits of a query come in several chunks."""
    inputs = feature_aggregation_inputs(3, num_queries=3, num_points=300, channels=64, num_groups=8, **FORMS[form])
    for dtype in DTYPES:
        assert_agrees(inputs, device, dtype)


@forms
def test_gradcheck(kernels, form):
    inputs = feature_aggregation_inputs(
        4, batch_size=1, num_queries=3, num_points=2, channels=4, num_groups=2, shapes=SMALL, **FORMS[form]
    )
    # Half a step away from the edges of pixels, where the derivative does not exist.
    inputs = replace(inputs, key_points=inputs.key_points + 2.0**-13).to(kernels, torch.float64)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.leaves().items()}

    def function(*tensors):
        return ops.deformable_feature_aggregation(*replace(inputs, **dict(zip(leaves, tensors))))

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_features_with_float32_logits(backend_device, dtype):
    inputs = feature_aggregation_inputs(5).to(backend_device, dtype)
    mixed = replace(inputs, logits=inputs.logits.float())
    for operands in (mixed, replace(mixed, camera_logits=inputs.camera_logits.float())):
        exact = run(reference.deformable_feature_aggregation, operands.to("cpu", torch.float64))
        actual = run(ops.deformable_feature_aggregation, operands)
        assert actual["logits"].dtype == torch.float32
        assert actual["camera_logits"].dtype == operands.camera_logits.dtype
        assert_close(actual, exact, TOLERANCE[dtype])


def test_without_image_size_the_matrix_goes_to_normalised_coordinates(backend_device):
    inputs = feature_aggregation_inputs(5).to(backend_device, torch.float64)
    normalised = inputs.projection_mat.clone()
    normalised[:, :, 0] /= 16
    normalised[:, :, 1] /= 8
    without = replace(inputs, projection_mat=normalised, image_wh=None)
    expected = run(ops.deformable_feature_aggregation, inputs)
    assert_close(run(ops.deformable_feature_aggregation, without), expected, 1e-12)


def test_gradients_of_the_cameras(backend_device):
    """The kernels have none; the formula does."""
    inputs = feature_aggregation_inputs(7).to(backend_device, torch.float64)
    gradients = []
    for function, operands in (
        (ops.deformable_feature_aggregation, inputs),
        (reference.deformable_feature_aggregation, inputs.to("cpu", torch.float64)),
    ):
        wanted = operands.projection_mat, operands.image_wh, operands.logits
        leaves = [t.detach().clone().requires_grad_() for t in wanted]
        output = function(*replace(operands, projection_mat=leaves[0], image_wh=leaves[1], logits=leaves[2]))
        gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    for got, wanted in zip(*gradients):
        assert wanted.any()
        assert relative_error(got.cpu(), wanted) <= 1e-12


@forms
def test_strides(backend_device, form):
    inputs = feature_aggregation_inputs(8, **FORMS[form]).to(backend_device, torch.float64)
    expected = run(ops.deformable_feature_aggregation, inputs)
    tensors = {
        name: with_memory_reversed(tensor)
        for name in FeatureAggregationInputs.__dataclass_fields__
        if isinstance(tensor := getattr(inputs, name), torch.Tensor)
    }
    assert_close(run(ops.deformable_feature_aggregation, replace(inputs, **tensors)), expected, 1e-12)


@forms
@pytest.mark.parametrize("empty", ["batch_size", "num_queries", "num_points", "num_feat", "num_cams", "num_levels"])
def test_nothing_to_sample(backend_device, empty, form):
    shapes = {
        "num_feat": [[(0, 0)]] * 2,
        "num_cams": torch.empty(0, 1, 2, dtype=torch.int64),
        "num_levels": torch.empty(2, 0, 2, dtype=torch.int64),
    }.get(empty, [[(4, 5)]] * 2)
    sizes = {empty: 0} if empty in ("batch_size", "num_queries", "num_points") else {}
    inputs = feature_aggregation_inputs(9, shapes=shapes, **sizes, **FORMS[form]).to(backend_device, torch.float64)
    got = run(ops.deformable_feature_aggregation, inputs)
    assert got.pop("output").shape == (*inputs.logits.shape[:2], 32)
    for name, gradient in got.items():
        assert gradient.shape == getattr(inputs, name).shape
        assert not gradient.any()


def same_or_both_nan(actual: dict, expected: dict) -> None:
    for name, wanted in expected.items():
        assert torch.allclose(actual[name], wanted, rtol=1e-9, atol=1e-9, equal_nan=True), name


@forms
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_logits_act_as_in_the_formula(backend_device, value, form):
    """They spoil their group and no other, or with -inf count for nothing."""
    inputs = feature_aggregation_inputs(10, **FORMS[form]).to(backend_device, torch.float64)
    inputs.logits[0, 1, 5] = value  # of group 1
    inputs.logits[1, 2, 2::4] = value  # all of group 2, unless cameras have their own
    got = run(ops.deformable_feature_aggregation, inputs)
    with ops.use_backend("grid_sample"):
        expected = run(ops.deformable_feature_aggregation, inputs)
    assert got["output"].isnan().any()
    same_or_both_nan(got, expected)


def test_special_cameras_logits_act_as_in_the_formula(backend_device):
    inputs = feature_aggregation_inputs(10).to(backend_device, torch.float64)
    inputs.camera_logits[0, 1, 3], inputs.camera_logits[1, 2] = float("nan"), float("-inf")
    got = run(ops.deformable_feature_aggregation, inputs)
    with ops.use_backend("grid_sample"):
        expected = run(ops.deformable_feature_aggregation, inputs)
    same_or_both_nan(got, expected)


def test_logits_far_apart(backend_device):
    """The largest one takes all, whatever the exponentials of the others would be."""
    inputs = feature_aggregation_inputs(11, by_camera=False)
    for scale in (1e2, 1e4, 1e30):
        scaled = replace(inputs, logits=(inputs.logits * scale).round())
        for dtype in (torch.float64, torch.float32):
            got = run(ops.deformable_feature_aggregation, scaled.to(backend_device, dtype))
            expected = reference.deformable_feature_aggregation(*scaled.to("cpu", dtype))
            assert_close(got, {"output": expected}, TOLERANCE[dtype])
            assert all(tensor.isfinite().all() for tensor in got.values())


@pytest.mark.parametrize("visible_only", [False, True])
def test_special_key_points(device, visible_only):
    """NaN, infinities and depths of 0 are seen by no camera, and get no gradient from the kernels."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    inputs = feature_aggregation_inputs(11, visible_only=visible_only).to(device, torch.float64)
    special = torch.tensor([[float("nan")] * 3, [0.1, 0.1, float("inf")], [0.3, 0.1, 0.0]])
    inputs.key_points[0, :3, 0] = special.to(inputs.key_points)
    got = run(ops.deformable_feature_aggregation, inputs)
    assert all(tensor.isfinite().all() for tensor in got.values())
    assert not got["key_points"][0, :3, 0].any()
    moved = inputs.key_points.clone()
    moved[0, :3, 0] = torch.tensor([50.0, 50.0, 1.0]).to(moved)  # outside of every image
    assert_close(got, run(ops.deformable_feature_aggregation, replace(inputs, key_points=moved)), 1e-12)


def test_unseen_pixels_leave_no_trace(backend_device):
    inputs = feature_aggregation_inputs(12, shapes=[[(4, 4)]], channels=8).to(backend_device, torch.float64)
    padded = torch.nn.functional.pad(inputs.feature_maps, (0, 0, 1, 1), value=float("nan"))
    got = run(
        ops.deformable_feature_aggregation,
        replace(inputs, feature_maps=padded, scale_start_index=inputs.scale_start_index + 1),
    )
    assert got["feature_maps"][:, [0, -1]].eq(0).all()
    got["feature_maps"] = got["feature_maps"][:, 1:-1]
    assert_close(got, run(ops.deformable_feature_aggregation, inputs), 1e-12)


def test_all_dropped(backend_device):
    inputs = feature_aggregation_inputs(13, attn_drop=0.5).to(backend_device, torch.float64)
    got = run(ops.deformable_feature_aggregation, replace(inputs, keep=torch.zeros_like(inputs.keep)))
    assert not any(tensor.any() for tensor in got.values())


def test_visible_only_sums_to_one_where_a_camera_sees_all(backend_device):
    inputs = feature_aggregation_inputs(14, shapes=[[(4, 4)], [(4, 4)]], visible_only=True)
    in_the_middle = torch.tensor([0.0, 0.0, 1.0]).expand_as(inputs.key_points)  # the second camera looks the other way
    inputs = replace(inputs, key_points=in_the_middle.double(), feature_maps=torch.ones_like(inputs.feature_maps))
    inputs = inputs.to(backend_device, torch.float64)
    ones = ops.deformable_feature_aggregation(*inputs)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    assert (ops.deformable_feature_aggregation(*replace(inputs, visible_only=False)) < 0.99).all()


def test_levels_beyond_the_features(backend_device):
    inputs = feature_aggregation_inputs(15).to(backend_device, torch.float64)
    beyond = replace(inputs, scale_start_index=inputs.scale_start_index + 1)
    message = r"spatial_shape and scale_start_index must stay within num_feat=\d+ rows; got a level of .*"
    with pytest.raises(ValueError, match=message):
        ops.deformable_feature_aggregation(
            *replace(beyond, spatial_shape=beyond.spatial_shape.cpu(), scale_start_index=beyond.scale_start_index.cpu())
        )
    if backend_device.type == "cuda":
        got = run(ops.deformable_feature_aggregation, beyond)
        kept = inputs.spatial_shape.clone()
        kept[-1, -1] = 0
        assert_close(got, run(ops.deformable_feature_aggregation, replace(beyond, spatial_shape=kept)), 1e-12)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"feature_maps": lambda t: t[0]}, ValueError, r"feature_maps must be \(bs, num_feat, C\); got"),
        (
            {"key_points": lambda t: t[:, :, :, :2]},
            ValueError,
            r"key_points must be \(bs, num_queries, num_pts, 3\) with bs=2; got \(2, 7, 3, 2\)",
        ),
        (
            {"projection_mat": lambda t: t[:, :2]},
            ValueError,
            r"projection_mat must be \(bs, num_cams, 4, 4\) with bs=2, num_cams=3; got \(2, 2, 4, 4\)",
        ),
        ({"image_wh": lambda t: t[..., :1]}, ValueError, r"image_wh must be \(bs, num_cams, 2\)"),
        ({"logits": lambda t: t[:, :5]}, ValueError, r"logits must be \(bs, num_queries, num_weights\) with bs=2"),
        (
            {"logits": lambda t: t[..., :-1]},
            ValueError,
            r"logits and camera_logits must have one width, num_levels \* num_pts \* num_groups; got 23 and 24",
        ),
        (
            {"logits": lambda t: t[..., :-1], "camera_logits": lambda t: t[..., :-1]},
            ValueError,
            r"logits must be \(bs, num_queries, num_levels \* num_pts \* num_groups\), 6 a group, and num_groups must "
            r"divide C=32; got 23 logits a query",
        ),
        (
            {"camera_logits": lambda t: None},
            ValueError,
            r"logits must be \(bs, num_queries, num_cams \* num_levels \* num_pts \* num_groups\), 18 a group, and "
            r"num_groups must divide C=32; got 24 logits a query",
        ),
        (
            {"feature_maps": lambda t: t[..., :30]},
            ValueError,
            r"num_groups must divide C=30; got 24 logits a query",
        ),
        (
            {"keep": lambda t: torch.ones(2, 7, 3, 3)},
            TypeError,
            "keep must be bool; got float32",
        ),
        (
            {"keep": lambda t: torch.ones(2, 7, 3, 2, dtype=torch.bool)},
            ValueError,
            r"keep must be \(bs, num_queries, num_cams, num_pts\) with bs=2, num_queries=7, num_cams=3, num_pts=3; got",
        ),
        ({"attn_drop": lambda p: 1.0}, ValueError, r"attn_drop must be in \[0, 1\); got 1.0"),
        ({"attn_drop": lambda p: float("nan")}, ValueError, r"attn_drop must be in \[0, 1\); got nan"),
        ({"logits": lambda t: t.long()}, TypeError, "logits must be float64 or float32; got int64"),
        ({"logits": lambda t: None}, TypeError, "logits must be a torch.Tensor; got NoneType"),
        ({"key_points": lambda t: t.tolist()}, TypeError, "key_points must be a torch.Tensor; got list"),
        ({"camera_logits": lambda t: t.to("meta")}, ValueError, "camera_logits must be on .*; got meta"),
    ],
)
def test_errors(backend_device, changes, error, message):
    inputs = feature_aggregation_inputs(16).to(backend_device, torch.float64)
    changed = {}
    for name, change in changes.items():
        value = change(getattr(inputs, name))
        moves = isinstance(value, torch.Tensor) and value.device.type == "cpu"
        changed[name] = value.to(backend_device) if moves else value
    with pytest.raises(error, match=message):
        ops.deformable_feature_aggregation(*replace(inputs, **changed))


@forms
def test_one_kernel(device, form):
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    inputs = feature_aggregation_inputs(**FORMS[form]).to(device, torch.float32)
    with KernelCalls() as calls:
        run(ops.deformable_feature_aggregation, inputs)
    assert calls.names == ["deformable_feature_aggregation", "deformable_feature_aggregation_backward"]


def test_little_is_kept_for_the_backward(device):
    """The operands, and two numbers a query and group."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    inputs = feature_aggregation_inputs(num_queries=50, attn_drop=0.2).to(device, torch.float32)
    for tensor in inputs.leaves().values():
        tensor.requires_grad_()
    of_operands = {t.data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.deformable_feature_aggregation(*inputs)
    own = [t for t in kept if t.data_ptr() not in of_operands]
    assert [t.shape for t in own] == [(2, 50, 4, 2)]


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_opcheck(device, dtype, form):
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    inputs = feature_aggregation_inputs(19, **FORMS[form]).to(device, dtype)
    for tensor in inputs.leaves().values():
        tensor.requires_grad_()
    operator = torch.ops.reimplementation.deformable_feature_aggregation
    torch.library.opcheck(operator, tuple(inputs), rtol=1e-2, atol=1e-2)
    *operands, attn_drop, visible_only = inputs
    with torch.no_grad():
        output, statistics = operator(*inputs)
        needs = [name in inputs.leaves() for name in ("feature_maps", "key_points", "logits", "camera_logits")]
        settings = attn_drop, visible_only
        detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in operands]
        backward = torch.ops.reimplementation.deformable_feature_aggregation_backward
        torch.library.opcheck(backward, (torch.randn_like(output), *detached, statistics, *settings, *needs))


@forms
def test_compiled(device, form):
    torch._dynamo.reset()
    inputs = feature_aggregation_inputs(20, **FORMS[form]).to(device, torch.float64)
    expected = run(ops.deformable_feature_aggregation, inputs)
    compiled = torch.compile(ops.deformable_feature_aggregation, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(run(compiled, inputs), expected, 1e-11)


def test_compiled_with_gradients_of_the_cameras(device):
    torch._dynamo.reset()
    inputs = feature_aggregation_inputs(20).to(device, torch.float64)
    projection = inputs.projection_mat.requires_grad_()
    compiled = torch.compile(ops.deformable_feature_aggregation, fullgraph=True, backend="aot_eager", dynamic=True)
    gradients = [
        torch.autograd.grad(function(*inputs).square().sum(), projection)[0]
        for function in (ops.deformable_feature_aggregation, compiled)
    ]
    assert relative_error(*gradients) <= 1e-11


@pytest.mark.cuda
class TestOnAGpu:
    """What only a GPU has; the tests above run there too."""

    @pytest.fixture(autouse=True)
    def needs_kernels(self, cuda_kernels):
        pass

    @forms
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_same_bits_every_time(self, dtype, form):
        inputs = feature_aggregation_inputs(22, num_queries=400, channels=128, **FORMS[form]).to("cuda", dtype)
        torch.use_deterministic_algorithms(True)
        try:
            expected = run(ops.deformable_feature_aggregation, inputs)
            for _ in range(20):
                got = run(ops.deformable_feature_aggregation, inputs)
                assert all(torch.equal(got[name], wanted) for name, wanted in expected.items())
        finally:
            torch.use_deterministic_algorithms(False)

    def test_levels_on_the_cpu(self):
        inputs = feature_aggregation_inputs(23).to("cuda", torch.float32)
        levels = {
            "spatial_shape": inputs.spatial_shape.cpu(),
            "scale_start_index": inputs.scale_start_index.int().cpu(),
        }
        expected = run(ops.deformable_feature_aggregation, inputs)
        assert_close(
            run(ops.deformable_feature_aggregation, replace(inputs, **levels)), expected, TOLERANCE[torch.float32]
        )

    def test_waits_for_nothing_but_its_stream(self):
        inputs = feature_aggregation_inputs(26).to("cuda", torch.float32)
        expected = run(ops.deformable_feature_aggregation, inputs)
        zeros = replace(inputs, feature_maps=torch.zeros_like(inputs.feature_maps))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            zeros.feature_maps.copy_(inputs.feature_maps)
            got = run(ops.deformable_feature_aggregation, zeros)
        stream.synchronize()
        assert_close(got, expected, TOLERANCE[torch.float32])

    def test_memory(self):
        """At SparseDrive's sizes: nothing of the size of the weights in the forward."""
        shapes = [[(64, 176), (32, 88), (16, 44), (8, 22)]] * 6
        inputs = feature_aggregation_inputs(
            28, batch_size=6, num_queries=900, num_points=13, channels=256, num_groups=8, shapes=shapes
        ).to("cuda", torch.float32)
        weights = 6 * 900 * 6 * 4 * 13 * 8 * 4
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = ops.deformable_feature_aggregation(*inputs)
        peak = torch.cuda.max_memory_allocated() - before
        assert peak < output.numel() * 4 + weights // 20
