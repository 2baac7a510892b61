"""Sizes at which 32-bit arithmetic ends: sides beyond 65535, tensors beyond 2^31 elements, memory that runs out.

What is too large for the float64 rules is compared slice by slice: a call on a slice alone must give what the whole
call gives there. ``pytest -m huge`` runs those, on a GPU with more than 100 GB.
"""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from tests.fuzz.checking import ACCEPTED, check, deterministic
from tests.fuzz.drawing import Draw
from tests.ops.agreement import assert_same, run
from tests.ops.table import AGGREGATION, ATTENTION, FEATURE_AGGREGATION, SAMPLING_OPS
from tests.reference import TOLERANCE, relative_error

LONG = {"cpu": 3_000, "cuda": 70_000}  # a CUDA grid has at most 65535 blocks along y and z
BEYOND_INT = 2**31
HALF = torch.float16

huge = [
    pytest.mark.huge,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 100e9,
        reason="needs a CUDA device with more than 100 GB",
    ),
]


def one_long_side(op, side: str, size: int, device: torch.device, backend: str) -> Draw:
    """A call whose sizes are all small but one."""
    generator = torch.Generator().manual_seed(3)
    names = ("batch", "queries", "images", "levels", "points", "channels", "groups")  # images: cameras or heads
    sizes = dict(zip(names, (1, 2, 1, 2, 2, 4, 1))) | {side: size}
    batch, queries, images, levels, points, channels, groups = sizes.values()
    channels *= groups
    samples = (batch, queries, images, levels, points)
    if op is AGGREGATION:
        shapes = torch.tensor([2, 3]).expand(images, levels, 2)
        features, starts = (batch, 6, channels), torch.zeros(images, levels, dtype=torch.int64)
        location, weights = (batch, queries, points, images, 2), (batch, queries, points, images, levels, groups)
        output = (batch, queries, channels)
    else:
        shapes, starts = torch.tensor([2, 3]).expand(levels, 2), torch.zeros(levels, dtype=torch.int64)
        features, location, weights = (batch, 6, images, channels), (*samples, 2), samples
        output = (batch, queries, images * channels)
    positions = torch.randint(-512, 4608, location, generator=generator) * 2.0**-12
    operands = [
        torch.randn(features, generator=generator),
        shapes,
        starts,
        positions,
        torch.randn(weights, generator=generator),
    ]
    grad_output = torch.randn(output, generator=generator)
    return Draw(op, backend, [t.to(device) for t in operands], (True,) * 3, grad_output.to(device))


SIDES = ["batch", "queries", "images", "levels", "points", "channels"]
LONG_SIDES = [(op, side) for op in (AGGREGATION, ATTENTION) for side in SIDES] + [(AGGREGATION, "groups")]


@pytest.mark.parametrize(("op", "side"), LONG_SIDES, ids=lambda value: getattr(value, "name", value))
def test_a_long_side(op, side, device):
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    assert check(one_long_side(op, side, LONG[device.type], device, device.type)) == ACCEPTED


def sides_of_feature_aggregation(size: int) -> dict[str, dict]:
    """Sizes that are all small but one."""
    return {
        "batch": {"batch_size": size},
        "queries": {"num_queries": size},
        "cameras": {"shapes": [[(2, 3)]] * size},
        "levels": {"shapes": [[(2, 3)] * size] * 2},
        "points": {"num_points": size},
        "channels": {"channels": 2 * size},
        "groups": {"channels": size, "num_groups": size},
    }


@pytest.mark.parametrize("side", sides_of_feature_aggregation(1))
def test_a_long_side_of_feature_aggregation(side, kernels):
    small = {"batch_size": 1, "num_queries": 2, "num_points": 2, "channels": 4, "num_groups": 2}
    small |= {"shapes": [[(2, 3)], [(3, 2)]]} | sides_of_feature_aggregation(LONG[kernels.type])[side]
    op = FEATURE_AGGREGATION
    operands = op.on(kernels, torch.float32, 3, **small)
    toward = torch.randn(op.function(*operands).shape, generator=torch.Generator().manual_seed(3)).to(kernels)
    assert check(Draw(op, kernels.type, operands, (True,) * 4, toward)) == ACCEPTED


def random(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.rand(shape, device="cuda", dtype=dtype)


def assert_slice_agrees(function, whole, part, rows: slice | None, queries: slice, levels: slice = slice(None)):
    """The results of a whole call are, at these rows of the features and queries, those of a call on that part.

    rows: None where the features' gradient is of all queries, and so another one in the part.
    levels: whose weights have the same gradients in both calls.
    """
    generator = torch.Generator("cuda").manual_seed(5)
    output = function(*whole)
    grad_output = torch.randn(output.shape, device="cuda", dtype=output.dtype, generator=generator)
    del output
    outputs, features, locations, weights = run_with(function, whole, grad_output)
    of_part = run_with(function, part, grad_output[:, queries])
    names = ["output", "locations", "weights"]
    found, expected = [outputs[:, queries], locations[:, queries], weights[:, queries]], [of_part[0], *of_part[2:]]
    if rows is not None:
        names, found, expected = [*names, "features"], [*found, features[:, rows]], [*expected, of_part[1]]
    for name, got, wanted in zip(names, found, expected):
        if name == "weights":  # levels are the last dimension but one in both ops
            got, wanted = got[..., levels, :], wanted[..., levels, :]
        assert got.shape == wanted.shape, f"{name}: {tuple(got.shape)} for {tuple(wanted.shape)}"
        assert wanted.any(), f"{name}: there is nothing to compare"
        error = relative_error(got, wanted)
        assert error <= TOLERANCE[HALF], f"{name}: relative L2 error {error:.2e}"


def run_with(function, operands, grad_output):
    """Output and gradients; the operands are not copied, they may be most of the memory."""
    leaves = [operands[i].detach().requires_grad_() for i in (0, 3, 4)]
    output = function(leaves[0], *operands[1:3], *leaves[1:])
    return output.detach(), *torch.autograd.grad(output, leaves, grad_output)


class TestBeyondInt:
    """More elements than an int counts, forward and backward; what is compared lies at the far end."""

    pytestmark = huge

    @pytest.fixture(autouse=True)
    def memory(self):
        torch.manual_seed(0)
        torch.cuda.empty_cache()
        yield
        torch.cuda.empty_cache()

    @pytest.fixture(params=["cpu", "cuda"], ids=lambda where: f"levels-on-{where}")
    def where(self, request):
        return request.param

    @pytest.mark.parametrize("wanted", [False, True], ids=["any-order", "deterministic"])
    def test_more_samples_than_are_put_in_order_at_once(self, wanted):
        """Two parts of one call's queries add to the features' gradient, one after the other."""
        queries, points, channels = 70_000, 1000, 4
        location = random(1, queries, points, 1, 2, dtype=torch.float32)
        weights = random(1, queries, points, 1, 1, 1, dtype=torch.float32)
        operands = [
            random(1, 15, channels, dtype=torch.float32),
            torch.tensor([[[3, 5]]]),
            torch.tensor([[0]]),
            location,
            weights,
        ]
        grad_output = random(1, queries, channels, dtype=torch.float32)
        half = queries // 2
        parts = [
            run_with(
                ops.deformable_aggregation_function,
                [*operands[:3], location[:, at], weights[:, at]],
                grad_output[:, at],
            )[1]
            for at in (slice(0, half), slice(half, None))
        ]
        with deterministic(wanted):
            whole = run_with(ops.deformable_aggregation_function, operands, grad_output)[1]
        terms = 4 * queries * points / operands[0].shape[1]  # of each pixel's sum
        rounding = terms**0.5 * torch.finfo(torch.float32).eps
        assert relative_error(whole, parts[0].double() + parts[1].double()) <= rounding

    def test_features_of_deformable_aggregation(self, where):
        rows, channels = 2**25 + 24, 64  # the last 24 rows are a level of 4 x 6
        features = random(1, rows, channels)
        shapes = torch.tensor([[[4096, 8192], [4, 6]]], device=where)
        starts = torch.tensor([[0, 2**25]], device=where)
        location, weights = random(1, 50, 5, 1, 2, dtype=torch.float32), random(1, 50, 5, 1, 2, 4)
        weights[..., 0, :] = 0  # of the large level: its rows are no part of the small features
        assert features.numel() > BEYOND_INT
        assert_slice_agrees(
            ops.deformable_aggregation_function,
            (features, shapes, starts, location, weights),
            (features[:, -24:], shapes * torch.tensor([[[0], [1]]], device=where), starts * 0, location, weights),
            slice(-24, None),
            slice(None),
            levels=slice(1, None),
        )

    def test_value_of_attention(self, where):
        rows, heads, channels = 2**23 + 24, 8, 32
        value = random(1, rows, heads, channels)
        shapes = torch.tensor([[2048, 4096], [4, 6]], device=where)
        starts = torch.tensor([0, 2**23], device=where)
        locations, weights = random(1, 50, heads, 2, 4, 2, dtype=torch.float32), random(1, 50, heads, 2, 4)
        weights[:, :, :, 0] = 0
        assert value.numel() > BEYOND_INT
        assert_slice_agrees(
            ops.ms_deform_attn,
            (value, shapes, starts, locations, weights),
            (value[:, -24:], shapes * torch.tensor([[0], [1]], device=where), starts * 0, locations, weights),
            slice(-24, None),
            slice(None),
            levels=slice(1, None),
        )

    def test_locations_and_weights_of_deformable_aggregation(self):
        queries, points, cams = 2**22 + 100, 64, 4
        shapes = torch.tensor([[2, 3]]).expand(cams, 1, 2)
        location, weights = (
            random(1, queries, points, cams, 2, dtype=torch.float32),
            random(1, queries, points, cams, 1, 2),
        )
        assert min(location.numel(), weights.numel()) > BEYOND_INT
        self.last_queries(ops.deformable_aggregation_function, random(1, 24, 16), shapes, location, weights)

    def test_locations_and_weights_of_attention(self):
        queries, heads, levels, points = 2**22 + 100, 8, 2, 32
        shapes = torch.tensor([[3, 4], [2, 3]])
        locations = random(1, queries, heads, levels, points, 2, dtype=torch.float32)
        weights = random(1, queries, heads, levels, points)
        assert min(locations.numel(), weights.numel()) > BEYOND_INT
        self.last_queries(ops.ms_deform_attn, random(1, 18, heads, 8), shapes, locations, weights)

    def test_output_of_deformable_aggregation(self):
        queries, channels = 2**21 + 100, 1024
        location, weights = random(1, queries, 2, 1, 2, dtype=torch.float32), random(1, queries, 2, 1, 1, 8)
        assert queries * channels > BEYOND_INT
        features, shapes = random(1, 6, channels), torch.tensor([[[2, 3]]])
        self.last_queries(ops.deformable_aggregation_function, features, shapes, location, weights)

    def test_output_of_attention(self):
        queries, heads, channels = 2**21 + 100, 8, 128
        locations, weights = random(1, queries, heads, 1, 2, 2, dtype=torch.float32), random(1, queries, heads, 1, 2)
        assert queries * heads * channels > BEYOND_INT
        shapes = torch.tensor([[2, 3]])
        self.last_queries(ops.ms_deform_attn, random(1, 6, heads, channels), shapes, locations, weights)

    def test_features_of_feature_aggregation(self, where):
        """The large level has logits of -inf: its rows are no part of the small features."""
        rows, channels = 2**25 + 24, 64
        features = random(1, rows, channels)
        shapes = torch.tensor([[[4096, 8192], [4, 6]]], device=where)
        starts = torch.tensor([[0, 2**25]], device=where)
        cameras = self.points_before_a_camera(50, 5)
        logits = random(1, 50, 2, 5 * 4)
        logits[:, :, 0] = float("-inf")
        assert features.numel() > BEYOND_INT
        small_shapes = shapes * torch.tensor([[[0], [1]]], device=where)
        whole = self.run_fused(features, (shapes, starts), *cameras, logits.flatten(2))
        part = self.run_fused(features[:, -24:], (small_shapes, starts * 0), *cameras, logits.flatten(2))
        assert part[1].any()
        assert relative_error(whole[1][:, -24:], part[1]) <= TOLERANCE[HALF]
        for got, wanted in zip((whole[0], *whole[2:]), (part[0], *part[2:])):
            assert relative_error(got, wanted) <= TOLERANCE[HALF]

    def test_logits_of_feature_aggregation(self):
        queries, points = 2**22 + 100, 64
        key_points, projection = self.points_before_a_camera(queries, points)
        logits, levels = random(1, queries, points * 8), (torch.tensor([[[4, 6]]]), torch.tensor([[0]]))
        assert logits.numel() > BEYOND_INT
        features, last = random(1, 24, 16), slice(-100, None)
        whole = self.run_fused(features, levels, key_points, projection, logits, last)
        part = self.run_fused(features, levels, key_points[:, last], projection, logits[:, last])
        for got, wanted in zip((whole[0], *whole[2:]), (part[0], *part[2:])):
            assert wanted.any()
            assert relative_error(got[:, last], wanted) <= TOLERANCE[HALF]

    @staticmethod
    def points_before_a_camera(queries: int, points: int):
        """Key points a metre before a camera whose image they are all in."""
        key_points = random(1, queries, points, 3, dtype=torch.float32)
        key_points[..., 2] = 1
        return key_points, torch.eye(4, device="cuda").view(1, 1, 4, 4)

    @staticmethod
    def run_fused(features, levels, key_points, projection, logits, toward: slice = slice(None)):
        """Output and gradients of features, key points and logits, towards some of the queries."""
        leaves = [tensor.detach().requires_grad_() for tensor in (features, key_points, logits)]
        output = ops.deformable_feature_aggregation(leaves[0], *levels, leaves[1], projection, None, leaves[2])
        grad_output = torch.zeros_like(output)
        of_some = grad_output[:, toward]
        of_some.copy_(torch.linspace(-1, 1, of_some.numel(), device="cuda").view_as(of_some))
        return output.detach(), *torch.autograd.grad(output, leaves, grad_output)

    def last_queries(self, function, features, shapes, locations, weights):
        """The last hundred queries; the features' gradient is of all queries, so it is left out."""
        rows = shapes.prod(-1).flatten()
        starts = (rows.cumsum(0) - rows).view(shapes.shape[:-1])
        last = slice(-100, None)
        assert_slice_agrees(
            function,
            (features, shapes, starts, locations, weights),
            (features, shapes, starts, locations[:, last], weights[:, last]),
            None,
            last,
        )

    def test_more_channels_than_a_grid_has_blocks(self):
        channels = 2**24 + 256
        features, weights = random(1, 6, channels), random(1, 2, 3, 1, 1, 1)
        location, levels = random(1, 2, 3, 1, 2, dtype=torch.float32), (torch.tensor([[[2, 3]]]), torch.tensor([[0]]))
        whole = ops.deformable_aggregation_function(features, *levels, location, weights)
        part = ops.deformable_aggregation_function(features[..., -256:], *levels, location, weights)
        assert relative_error(whole[..., -256:], part) <= TOLERANCE[HALF]


@pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)
def test_more_than_there_is_memory_for(op, device):
    """Features of a thousand terabytes, expanded and not stored, raise an exception, and the next call is right."""
    small = one_long_side(op, "queries", 3, device, ops.available_backends(device)[0])
    features, shapes, starts, locations, weights = small.operands
    expanded = features.narrow(-1, 0, 1).expand(*features.shape[:-1], 2**27)
    expanded = expanded.narrow(1, 0, 1).expand(features.shape[0], 2**23, *expanded.shape[2:])
    with pytest.raises(RuntimeError, match="memory"):
        op.function(expanded, shapes, starts, locations, weights)
    assert check(small) == ACCEPTED


@pytest.mark.cuda
@pytest.mark.parametrize("op", SAMPLING_OPS, ids=str)
def test_memory_that_runs_out_in_a_backward(op):
    """The backward fails with an exception; the next call, a smaller one, gives what it gave before."""
    small, large = (op.on("cuda", torch.float32, 1, channels=channels) for channels in (8, 2**17))
    expected = run(op, small)
    output = op.function(*(t.requires_grad_(t.is_floating_point()) for t in large))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            output.sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(op, run(op, small), expected)
