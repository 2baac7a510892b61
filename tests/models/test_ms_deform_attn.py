"""MSDeformAttn: its initialisation, its state dict, and its output against Deformable DETR's equations."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation import ops
from reimplementation.bench.inputs import pixel_centres
from reimplementation.models import MSDeformAttn
from reimplementation.models.ms_deform_attn import initial_offsets
from tests.reference import TOLERANCE, ms_deform_attn, relative_error

SHAPES = ((6, 9), (3, 5), (2, 2))
NUM_VALUES = sum(height * width for height, width in SHAPES)


def spatial_arguments(device="cpu"):
    shapes = torch.tensor(SHAPES, device=device)
    rows = shapes.prod(-1)
    return shapes, rows.cumsum(0) - rows


def trained(seed=0, **settings) -> MSDeformAttn:
    """A module whose offsets and weights depend on the query, as after some training."""
    module = MSDeformAttn(**{"d_model": 16, "n_levels": 3, "n_heads": 4, "n_points": 2, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def random_input(num_queries=11, coordinates=2, seed=1, batch_size=2, channels=16):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch_size, num_queries, channels, generator=generator)
    points = torch.rand(batch_size, num_queries, len(SHAPES), coordinates, generator=generator)
    return query, points, torch.randn(batch_size, NUM_VALUES, channels, generator=generator)


def expected_output(module, query, points, source, mask=None):
    """Equation 3 of the paper, one head, level and point at a time, in float64."""
    module = module.double()
    query, points, source = query.double(), points.double(), source.double()
    shapes, starts = spatial_arguments()
    heads, levels, num_points = module.n_heads, module.n_levels, module.n_points
    value = module.value_proj(source)
    if mask is not None:
        value = torch.where(mask[..., None], 0.0, value)
    value = value.view(*value.shape[:2], heads, -1)
    samples = (*query.shape[:2], heads, levels, num_points)
    offsets = module.sampling_offsets(query).view(*samples, 2)
    weights = module.attention_weights(query).view(*query.shape[:2], heads, -1).exp()
    weights = (weights / weights.sum(-1, keepdim=True)).view(samples)
    locations = torch.empty(*samples, 2, dtype=torch.float64)
    for level, (height, width) in enumerate(SHAPES):
        for point in range(num_points):
            reference = points[:, :, None, level].expand(-1, -1, heads, -1)
            offset = offsets[:, :, :, level, point]
            if points.shape[-1] == 2:
                step = torch.tensor([1 / width, 1 / height], dtype=torch.float64)
            else:
                step = reference[..., 2:] / 2 / num_points
            locations[:, :, :, level, point] = reference[..., :2] + offset * step
    return module.output_proj(ms_deform_attn(value, shapes, starts, locations, weights))


@pytest.mark.parametrize("ratio", [1.0, 0.5])
@pytest.mark.parametrize("coordinates", [2, 4])
def test_output(backend_device, coordinates, ratio):
    module, arguments = trained(ratio=ratio), random_input(coordinates=coordinates)
    query, points, source = (t.to(backend_device) for t in arguments)
    output = module.to(backend_device)(query, points, source, *spatial_arguments(backend_device))
    assert output.shape == query.shape and output.dtype == torch.float32
    expected = expected_output(module.cpu(), *arguments)
    assert relative_error(output.cpu(), expected) <= TOLERANCE[torch.float32]


def test_padding_counts_as_zero(backend_device):
    module, arguments = trained(), random_input()
    mask = torch.rand(2, NUM_VALUES, generator=torch.Generator().manual_seed(2)) < 0.4
    query, points, source = (t.to(backend_device) for t in arguments)
    source[mask.to(backend_device)] = float("nan")  # what is padding may hold anything
    output = module.to(backend_device)(
        query, points, source, *spatial_arguments(backend_device), mask.to(backend_device)
    )
    expected = expected_output(module.cpu(), *arguments, mask)
    assert relative_error(output.cpu(), expected) <= TOLERANCE[torch.float32]


def test_gradients(backend_device):
    """To the query, the reference points, the input and every parameter, against the formula's."""
    module, arguments = trained(), random_input()
    leaves = [t.to(backend_device).requires_grad_() for t in arguments]
    output = module.to(backend_device)(*leaves, *spatial_arguments(backend_device))
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(output, [*leaves, *module.parameters()], grad_output.to(backend_device))

    module = module.cpu().double()
    leaves = [t.double().requires_grad_() for t in arguments]
    expected = torch.autograd.grad(
        expected_output(module, *leaves), [*leaves, *module.parameters()], grad_output.double()
    )
    names = ["query", "reference_points", "input_flatten", *dict(module.named_parameters())]
    for name, gradient, wanted in zip(names, got, expected, strict=True):
        assert relative_error(gradient.cpu(), wanted) <= 10 * TOLERANCE[torch.float32], name


def test_shared_reference_points(backend_device):
    """One batch element and one level of reference points serve all, as in ViT-Adapter and DINOv3."""
    module = trained().to(backend_device)
    query, points, source = (t.to(backend_device) for t in random_input())
    shared = points[:1, :, :1]
    spatial = spatial_arguments(backend_device)
    output = module(query, shared, source, *spatial)
    torch.testing.assert_close(output, module(query, shared.expand_as(points), source, *spatial))


def test_initial_offsets():
    offsets = initial_offsets(8, 3)
    assert offsets.shape == (8, 3, 2)
    around = [[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]]
    for point in range(3):
        expected = torch.tensor(around, dtype=torch.float32) * (point + 1)
        torch.testing.assert_close(offsets[:, point], expected, atol=1e-5, rtol=0)
    angles = torch.atan2(*initial_offsets(5, 1)[:, 0].flip(-1).unbind(-1)) % (2 * math.pi)
    torch.testing.assert_close(angles, torch.arange(5) * 2 * math.pi / 5, atol=1e-5, rtol=0)


def test_initialisation():
    module = MSDeformAttn(d_model=64, n_levels=2, n_heads=8, n_points=3)
    assert not module.sampling_offsets.weight.any()
    bias = module.sampling_offsets.bias.view(8, 2, 3, 2)
    for level in range(2):
        assert torch.equal(bias[:, level], initial_offsets(8, 3))
    assert not module.attention_weights.weight.any() and not module.attention_weights.bias.any()
    bound = math.sqrt(6 / (64 + 64))  # Glorot and Bengio's uniform distribution
    for projection in (module.value_proj, module.output_proj):
        assert not projection.bias.any()
        assert 0.95 * bound < projection.weight.abs().max() <= bound
    before = module.value_proj.weight.clone()
    module.sampling_offsets.bias.data.zero_()
    module._reset_parameters()
    assert torch.equal(module.sampling_offsets.bias.view(8, 2, 3, 2)[:, 0], initial_offsets(8, 3))
    assert not torch.equal(module.value_proj.weight, before)


def test_a_new_module_averages_its_neighbourhood():
    """Equal weights, points around the reference point: a constant input comes back through the two projections."""
    module = MSDeformAttn(d_model=16, n_levels=3, n_heads=4, n_points=1)
    query, points, source = random_input()
    source = source[:, :1].expand(-1, NUM_VALUES, -1)
    points = torch.full_like(points, 0.5)
    output = module(query, points, source, *spatial_arguments())
    # Level by level: a point 1 pixel away from the centre of 2 x 2 pixels has half of its footprint outside.
    centre = torch.tensor([0.5, 0.5])
    inside = []
    for height, width in SHAPES:
        pixel = (centre + initial_offsets(4, 1)[:, 0] / torch.tensor([width, height])) * torch.tensor([width, height])
        gap = torch.minimum(pixel - 0.5 + 1, torch.tensor([width, height]) - pixel + 0.5).clamp(0, 1)
        inside.append(gap.prod(-1))
    share = torch.stack(inside).mean(0).repeat_interleave(4)  # of each head's channels
    expected = module.output_proj(module.value_proj(source[:, :1]) * share)
    torch.testing.assert_close(output, expected.expand_as(output))


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_state_dict_of_the_peers_loads_strictly(ratio):
    """Names and shapes of Deformable DETR's, Mask2Former's and, with a ratio, ViT-Adapter's and DINOv3's module."""
    value_channels = int(256 * ratio)
    state = {
        "sampling_offsets.weight": torch.randn(8 * 4 * 4 * 2, 256),
        "sampling_offsets.bias": torch.randn(8 * 4 * 4 * 2),
        "attention_weights.weight": torch.randn(8 * 4 * 4, 256),
        "attention_weights.bias": torch.randn(8 * 4 * 4),
        "value_proj.weight": torch.randn(value_channels, 256),
        "value_proj.bias": torch.randn(value_channels),
        "output_proj.weight": torch.randn(256, value_channels),
        "output_proj.bias": torch.randn(256),
    }
    module = MSDeformAttn(ratio=ratio)
    module.load_state_dict(state, strict=True)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state.items())


def dtypes_read(monkeypatch) -> list[tuple]:
    """Filled with the dtypes of value, reference points, offsets and logits, as the op gets them."""
    seen, original = [], ops.ms_deform_attn_from_offsets

    def spy(value, shapes, starts, references, offsets, logits):
        seen.append(tuple(t.dtype for t in (value, references, offsets, logits)))
        return original(value, shapes, starts, references, offsets, logits)

    monkeypatch.setattr(ops, "ms_deform_attn_from_offsets", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(backend_device, dtype, monkeypatch):
    """The module in half precision, and under autocast: the op reads what the linear layers made, and wide points."""
    seen = dtypes_read(monkeypatch)
    module, arguments = trained(), random_input()
    module = module.to(dtype).float()  # the same rounded numbers in every precision
    arguments = [t.to(dtype).float() for t in arguments]
    expected = expected_output(module, *arguments).detach()
    query, points, source = (t.to(backend_device) for t in arguments)
    spatial = spatial_arguments(backend_device)
    half = module.to(backend_device, dtype)(query.to(dtype), points.to(dtype), source.to(dtype), *spatial)
    with torch.autocast(backend_device.type, dtype):
        autocast = module.float()(query, points, source, *spatial)
    assert seen == [(dtype, torch.float32, dtype, dtype)] * 2
    for output in (half, autocast):
        assert output.dtype == dtype
        assert relative_error(output.cpu(), expected) <= 4 * TOLERANCE[dtype]


class Casts(TorchDispatchMode):
    """Counts the casts to other dtypes, by the shape of what is cast."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_autocast_casts_nothing_twice(kernels):
    """Under autocast the query, the input, and each weight and bias; between the linear layers nothing is cast."""
    module, arguments = trained().to(kernels), [t.to(kernels) for t in random_input()]
    spatial = spatial_arguments(kernels)
    query, _, source = arguments
    of_inputs = [tuple(query.shape), tuple(source.shape)]
    of_weights = [tuple(parameter.shape) for parameter in module.parameters()]
    with torch.no_grad(), torch.autocast(kernels.type, torch.bfloat16):
        with Casts() as first:
            module(*arguments, *spatial)
        with Casts() as second:  # which finds the weights' casts in PyTorch's cache
            module(*arguments, *spatial)
    assert sorted(first.shapes) == sorted(of_inputs + of_weights)
    assert sorted(second.shapes) == sorted(of_inputs)
    with Casts() as without_autocast:
        module(*arguments, *spatial)
    assert without_autocast.shapes == []


@pytest.mark.parametrize("coordinates", [2, 4])
def test_nothing_between_the_linear_layers_is_kept(kernels, coordinates):
    """For the backward: what the op reads, which is what the linear layers made."""
    module, arguments = trained().to(kernels), [t.to(kernels) for t in random_input(50, coordinates)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        module(*arguments, *spatial_arguments(kernels))
    own = [t.numel() // 100 for t in kept.values() if t.numel() % 100 == 0]  # of 2 * 50 queries
    # Queries, reference points, offsets, logits, and the op's output for the last linear layer.
    per_query = [16, 3 * coordinates, 4 * 3 * 2 * 2, 4 * 3 * 2, 16]
    assert sorted(own) == sorted(per_query)


def test_encoder(backend_device):
    """Queries that are the input itself, at the centres of its pixels."""
    module = trained()
    _, _, source = random_input()
    points = pixel_centres(SHAPES)[None, :, None].expand(2, -1, 3, -1)
    spatial = spatial_arguments(backend_device)
    arguments = [t.to(backend_device) for t in (source, points, source)]
    output = module.to(backend_device)(*arguments, *spatial)
    expected = expected_output(module.cpu(), source, points, source)
    assert relative_error(output.cpu(), expected) <= TOLERANCE[torch.float32]


def test_a_warning_where_heads_are_no_power_of_two():
    with pytest.warns(UserWarning, match="power of two; got 240 channels for 8 heads, 30 each"):
        MSDeformAttn(d_model=240)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MSDeformAttn(d_model=256)
        MSDeformAttn(d_model=8, n_heads=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 100}, r"d_model must be a multiple of n_heads=8; got 100"),
        ({"ratio": 0.6}, r"int\(d_model \* ratio\) must be a multiple of n_heads=8; got 153"),
        ({"ratio": 0.0}, r"int\(d_model \* ratio\) must be a multiple of n_heads=8; got 0"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MSDeformAttn(**settings)


ARGUMENTS = ("query", "reference_points", "input_flatten", "input_spatial_shapes", "input_level_start_index")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": lambda t: t[0]}, r"query must be \(N, Lq, d_model\) with d_model=16; got \(11, 16\)"),
        ({"input_flatten": lambda t: t[:1]}, r"input_flatten must be .* with N=2, d_model=16; got \(1, 73, 16\)"),
        (
            {"reference_points": lambda t: t[..., :1]},
            r"reference_points must be \(N, Lq, n_levels, 2 or 4\) with N=2, Lq=11, n_levels=3, "
            r"N and n_levels may be 1; got \(2, 11, 3, 1\)",
        ),
        ({"reference_points": lambda t: t[:, :1]}, r"reference_points must be .* got \(2, 1, 3, 2\)"),
        ({"input_spatial_shapes": lambda t: t[:2]}, r"input_spatial_shapes must be .* n_levels=3; got \(2, 2\)"),
        ({"input_flatten": lambda t: t[:, 1:]}, r"add up to 73 pixels, but input_flatten has S=72 rows"),
        (
            {"input_padding_mask": lambda _: torch.zeros(2, 72, dtype=torch.bool)},
            r"input_padding_mask must be \(N, S\) with N=2, S=73; got \(2, 72\)",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(changes, message):
    arguments = dict(zip(ARGUMENTS, (*random_input(), *spatial_arguments())))
    arguments |= {name: change(arguments.get(name)) for name, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        trained()(**arguments)


@pytest.mark.parametrize("name", ["d_model", "n_levels", "n_heads", "n_points"])
def test_settings_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1; got 0"):
        MSDeformAttn(**{name: 0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query must be a torch.Tensor; got NoneType"),
        ({"input_spatial_shapes": [(1, 1)]}, "input_spatial_shapes must be a torch.Tensor; got list"),
        ({"input_level_start_index": torch.zeros(3)}, "input_level_start_index must be int64 or .*; got float32"),
        ({"input_padding_mask": torch.zeros(2, NUM_VALUES)}, "input_padding_mask must be bool; got float32"),
    ],
)
def test_wrong_types(change, message):
    arguments = dict(zip(ARGUMENTS, (*random_input(), *spatial_arguments())))
    with pytest.raises(TypeError, match=message):
        trained()(**(arguments | change))
