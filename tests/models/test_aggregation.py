"""DeformableFeatureAggregation against explicit loops, and everything that a call site relies on."""

import copy
import math

import pytest
import torch
from torch import nn

from reimplementation import ops
from reimplementation.models.deformable import (
    DeformableFeatureAggregation,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
    project_points,
)
from tests.ops.agreement import KernelCalls
from tests.reference import feature_aggregation_weights

BS, NUM_ANCHOR, EMBED_DIMS, NUM_GROUPS, NUM_CAMS = 2, 5, 16, 4, 3
LEVELS = ((8, 16), (4, 8))
WIDTH, HEIGHT = 128, 64
BOX = {
    "type": "SparseBox3DKeyPointsGenerator",
    "num_learnable_pts": 2,
    "fix_scale": ((0.0, 0.0, 0.0), (0.45, 0.0, 0.0), (0.0, -0.45, 0.2)),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(**settings):
    settings = {"kps_generator": BOX, **settings}
    module = DeformableFeatureAggregation(
        EMBED_DIMS, num_groups=NUM_GROUPS, num_levels=len(LEVELS), num_cams=NUM_CAMS, **settings
    )
    return module.double()


def surround_rig():
    """Projection matrices (BS, NUM_CAMS, 4, 4) of cameras that look out level in NUM_CAMS directions."""
    matrices = torch.zeros(BS, NUM_CAMS, 4, 4, dtype=torch.float64)
    for sample in range(BS):
        for cam in range(NUM_CAMS):
            yaw = 2 * math.pi * cam / NUM_CAMS + 0.05 * sample
            to_camera = torch.tensor(
                [
                    [math.sin(yaw), -math.cos(yaw), 0, 0.1],
                    [0, 0, -1, 1.5],
                    [math.cos(yaw), math.sin(yaw), 0, -0.4],
                    [0, 0, 0, 1],
                ],
                dtype=torch.float64,
            )
            intrinsics = torch.eye(4, dtype=torch.float64)
            intrinsics[:2, :3] = torch.tensor([[50.0, 0, WIDTH / 2], [0, 50.0, HEIGHT / 2]])
            matrices[sample, cam] = intrinsics @ to_camera
    return matrices


def box_anchors():
    bearing, distance = torch.rand(2, BS, NUM_ANCHOR, dtype=torch.float64)
    bearing, distance = bearing * 2 * math.pi, distance * 10 + 4
    centre = torch.stack([distance * bearing.cos(), distance * bearing.sin(), torch.ones_like(bearing)], dim=-1)
    log_size = torch.randn(BS, NUM_ANCHOR, 3).double() * 0.2 + 0.5
    yaw = torch.rand(BS, NUM_ANCHOR, 1).double() * 2 * math.pi
    return torch.cat([centre, log_size, yaw.sin(), yaw.cos(), torch.randn(BS, NUM_ANCHOR, 3).double()], dim=-1)


def scene(dtype=torch.float64, device="cpu", anchor=None):
    """The arguments of a forward: instance feature, anchor, embedding, maps per level, metas."""
    anchor = box_anchors() if anchor is None else anchor
    feature, embed = torch.randn(2, BS, NUM_ANCHOR, EMBED_DIMS)
    maps = [torch.randn(BS, NUM_CAMS, EMBED_DIMS, height, width) for height, width in LEVELS]
    image_wh = torch.tensor([WIDTH, HEIGHT]).expand(BS, NUM_CAMS, 2)
    to = {"device": device, "dtype": dtype}
    metas = {"projection_mat": surround_rig().to(**to), "image_wh": image_wh.to(**to)}
    return feature.to(**to), anchor.to(**to), embed.to(**to), [level.to(**to) for level in maps], metas


def bilinear(level, x, y):
    """Sample (C, H, W) at a normalised location; nothing outside the unit square, zeros beyond the border."""
    channels, height, width = level.shape
    total = level.new_zeros(channels)
    if not (0 < x < 1 and 0 < y < 1):
        return total
    column, row = x * width - 0.5, y * height - 0.5
    left, top = math.floor(column.item()), math.floor(row.item())
    for i in (top, top + 1):
        for j in (left, left + 1):
            if 0 <= i < height and 0 <= j < width:
                total = total + level[:, i, j] * (1 - (row - i).abs()) * (1 - (column - j).abs())
    return total


def reference(module, key_points, feature, embed, maps, metas):
    """The aggregation before the residual, sample by sample."""
    query = feature + embed
    matrices = metas["projection_mat"]
    if module.camera_encoder is not None:
        query = query[:, :, None] + module.camera_encoder(matrices[:, :, :3].reshape(BS, NUM_CAMS, 12))[:, None]
    weights = module.weights_fc(query).reshape(BS, NUM_ANCHOR, -1, NUM_GROUPS).softmax(dim=2)
    weights = weights.reshape(BS, NUM_ANCHOR, NUM_CAMS, len(LEVELS), -1, NUM_GROUPS)
    rows = []
    for b in range(BS):
        for n in range(NUM_ANCHOR):
            total = feature.new_zeros(EMBED_DIMS)
            for cam in range(NUM_CAMS):
                for p, point in enumerate(key_points[b, n]):
                    projected = matrices[b, cam] @ torch.cat([point, point.new_ones(1)])
                    x, y = projected[:2] / projected[2].clamp(min=1e-5) / metas["image_wh"][b, cam]
                    for level, feature_map in enumerate(maps):
                        weight = weights[b, n, cam, level, p].repeat_interleave(EMBED_DIMS // NUM_GROUPS)
                        total = total + weight * bilinear(feature_map[b, cam], x, y)
            rows.append(total)
    return module.output_proj(torch.stack(rows).reshape(BS, NUM_ANCHOR, EMBED_DIMS))


def values_and_gradients(module, feature, anchor, embed, maps, metas, formatted=False, function=None):
    """Output and gradients with respect to every input and trainable parameter."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (feature, anchor, embed, *maps)]
    maps = leaves[3:]
    if function is None:
        output = module(*leaves[:3], ops.feature_maps_format(maps) if formatted else maps, metas)
    else:
        output = function(module, module.kps_generator(leaves[1], leaves[0]), leaves[0], leaves[2], maps, metas)
        output = output + leaves[0]
    leaves += [parameter for parameter in module.parameters() if parameter.requires_grad]
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
    return [output, *torch.autograd.grad((output.flatten() * cotangent).sum(), leaves)]


@pytest.mark.parametrize("use_camera_embed", [False, True])
@pytest.mark.parametrize("use_deformable_func", [False, True])
def test_against_explicit_loops(use_deformable_func, use_camera_embed, device):
    module = build(use_deformable_func=use_deformable_func, use_camera_embed=use_camera_embed).to(device)
    arguments = scene(device=device)
    expected = values_and_gradients(module, *arguments, function=reference)
    assert expected[1].abs().max() > 0 and expected[2].abs().max() > 0  # the cameras see the boxes
    for actual, wanted in zip(values_and_gradients(module, *arguments), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_map_anchors_against_explicit_loops(device):
    generator = {
        "type": "SparsePoint3DKeyPointsGenerator",
        "num_sample": 3,
        "num_learnable_pts": 2,
        "fix_height": (0.0, 0.5),
        "ground_height": 0.5,
    }
    module = build(use_deformable_func=True, kps_generator=generator).to(device)
    anchor = torch.randn(BS, NUM_ANCHOR, 6) * 6
    feature, anchor, embed, maps, metas = scene(device=device, anchor=anchor)
    expected = reference(module, module.kps_generator(anchor, feature), feature, embed, maps, metas) + feature
    assert (expected - feature).abs().max() > 0.1
    torch.testing.assert_close(module(feature, anchor, embed, maps, metas), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_of_maps_and_both_paths_agree(dtype, device):
    arguments = scene(dtype, device)
    module = build(use_deformable_func=True).to(device, dtype)
    plain = copy.deepcopy(module)
    plain.use_deformable_func = False
    expected = values_and_gradients(plain, *arguments)
    # Sums of a few hundred terms, in different order; locations are scaled by the size of a level.
    tolerance = {"rtol": 1e3 * torch.finfo(dtype).eps, "atol": 1e3 * torch.finfo(dtype).eps}
    for variant, formatted in [(plain, True), (module, False), (module, True)]:
        for actual, wanted in zip(values_and_gradients(variant, *arguments, formatted), expected, strict=True):
            torch.testing.assert_close(actual, wanted, **tolerance)


def test_both_paths_call_what_they_promise(device):
    """One operator for all of it, or none at all."""
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    arguments = scene(device=device)
    for fused, names in ((True, ["aggregation_module"]), (False, [])):
        with KernelCalls() as calls, torch.no_grad():
            build(use_deformable_func=fused).to(device)(*arguments)
        assert calls.names == names


def test_project_points_puts_cameras_first():
    points, matrices = torch.randn(BS, NUM_ANCHOR, 4, 3).double(), surround_rig()
    wh = torch.tensor([WIDTH, HEIGHT]).double().expand(BS, NUM_CAMS, 2)
    by_camera = DeformableFeatureAggregation.project_points(points, matrices, wh)
    assert by_camera.shape == (BS, NUM_CAMS, NUM_ANCHOR, 4, 2)
    torch.testing.assert_close(by_camera[1, 2], project_points(points, matrices, wh)[1, :, :, 2])


def test_plain_path_runs_grid_sample_whatever_there_is(monkeypatch):
    forced = []
    original = ops.use_backend
    monkeypatch.setattr(ops, "use_backend", lambda name: forced.append(name) or original(name))
    build(use_deformable_func=True)(*scene())
    assert forced == []
    build(use_deformable_func=False)(*scene())
    assert forced == ["grid_sample"]


def test_float32_is_close_to_float64(device):
    module = build(use_deformable_func=True).to(device)
    feature, anchor, embed, maps, metas = scene(device=device)
    expected = module(feature, anchor, embed, maps, metas)
    single = {name: tensor.float() for name, tensor in metas.items()}
    actual = module.float()(feature.float(), anchor.float(), embed.float(), [m.float() for m in maps], single)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_camera_groups_of_different_shapes():
    module = build(use_deformable_func=True)
    feature, anchor, embed, maps, metas = scene()
    wide = [level[:, :2] for level in maps]
    tall = [torch.randn(BS, 1, EMBED_DIMS, 2 * height, width).double() for height, width in LEVELS]
    grouped = module(feature, anchor, embed, [wide, tall], metas)
    torch.testing.assert_close(grouped, module(feature, anchor, embed, ops.feature_maps_format([wide, tall]), metas))
    only_tall = [torch.cat([torch.zeros_like(t), torch.zeros_like(t), t], dim=1) for t in tall]
    only_wide = [torch.cat([w, torch.zeros_like(w[:, :1])], dim=1) for w in wide]
    bias = module.output_proj.bias
    summed = module(feature, anchor, embed, only_tall, metas) + module(feature, anchor, embed, only_wide, metas)
    torch.testing.assert_close(grouped, summed - feature - bias)


def test_without_image_size_the_matrix_goes_to_normalised_coordinates():
    module = build()
    feature, anchor, embed, maps, metas = scene()
    expected = module(feature, anchor, embed, maps, metas)
    normalised = metas["projection_mat"].clone()
    normalised[:, :, 0] /= WIDTH
    normalised[:, :, 1] /= HEIGHT
    for absent in ({}, {"image_wh": None}):
        actual = module(feature, anchor, embed, maps, {"projection_mat": normalised, **absent})
        torch.testing.assert_close(actual, expected)


def test_points_behind_the_camera_contribute_nothing():
    module = build(use_deformable_func=True, residual_mode=None)
    feature, anchor, embed, maps, metas = scene()
    backwards = metas["projection_mat"][:, :1] * torch.tensor([-1.0, -1.0, -1.0, 1.0])[:, None]
    ahead = metas["projection_mat"][:, :1]
    anchor[..., :3] = torch.tensor([8.0, 0.5, 1.5])  # in front of the first camera
    seen = module(feature, anchor, embed, maps, {**metas, "projection_mat": ahead.expand(BS, NUM_CAMS, 4, 4)})
    unseen = module(feature, anchor, embed, maps, {**metas, "projection_mat": backwards.expand(BS, NUM_CAMS, 4, 4)})
    assert (seen - module.output_proj.bias).abs().max() > 0.01
    torch.testing.assert_close(unseen, module.output_proj.bias.expand_as(unseen))


def sampling_weights(module, arguments, monkeypatch):
    """The weights that the op makes of what a forward hands to it."""
    handed = []
    original = ops.deformable_feature_aggregation

    def spy(*arguments):
        handed.append(arguments)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "deformable_feature_aggregation", spy)
        module(*arguments)
    cameras, logits = handed[0][3:6], handed[0][6:]
    camera_logits, keep, attn_drop = logits[1:]
    return feature_aggregation_weights(
        *cameras, logits[0], camera_logits, keep, attn_drop, visible_only=False, num_levels=len(LEVELS)
    )


def test_a_layer_in_place_of_the_weights_one_gets_every_pair():
    """Quantised or adapted, it has no weight that it is the product with."""
    module, arguments = build(use_camera_embed=True), scene()
    expected = module(*arguments)
    module.weights_fc = nn.Sequential(module.weights_fc)
    torch.testing.assert_close(module(*arguments), expected)


@pytest.mark.parametrize("use_camera_embed", [False, True])
def test_weights_add_up_to_one_per_group(use_camera_embed, monkeypatch):
    module = build(use_camera_embed=use_camera_embed)
    weights = sampling_weights(module, scene(), monkeypatch)
    assert weights.shape == (BS, NUM_ANCHOR, 5, NUM_CAMS, len(LEVELS), NUM_GROUPS)
    torch.testing.assert_close(weights.sum(dim=(2, 3, 4)), torch.ones(BS, NUM_ANCHOR, NUM_GROUPS).double())


def test_attn_drop_drops_whole_pairs_and_rescales(monkeypatch):
    module, arguments = build(attn_drop=0.25), scene()
    kept = sampling_weights(module.eval(), arguments, monkeypatch)
    module.train()
    torch.manual_seed(3)
    dropped = sampling_weights(module, arguments, monkeypatch)
    ratio = dropped / kept
    of_pair = ratio[..., :1, :1]
    assert (ratio == 0).sum() > 0 and (ratio != 0).sum() > 0
    torch.testing.assert_close(ratio, of_pair.expand_as(ratio))
    torch.testing.assert_close(of_pair[of_pair != 0], torch.full_like(of_pair[of_pair != 0], 1 / 0.75))
    share = (of_pair == 0).double().mean().item()
    deviation = math.sqrt(0.25 * 0.75 / of_pair.numel())
    assert abs(share - 0.25) < 4 * deviation

    torch.manual_seed(3)
    torch.testing.assert_close(sampling_weights(module, arguments, monkeypatch), dropped, rtol=0, atol=0)


def test_proj_drop_only_in_training():
    module, arguments = build(proj_drop=0.5, residual_mode=None), scene()
    assert (module.train()(*arguments) == 0).any()
    assert not (module.eval()(*arguments) == 0).any()


def test_residual_modes():
    plain, arguments = build(residual_mode=None), scene()
    output, feature = plain(*arguments), arguments[0]
    for mode, expected in [("add", output + feature), ("cat", torch.cat([output, feature], dim=-1))]:
        module = build(residual_mode=mode)
        module.load_state_dict(plain.state_dict())
        torch.testing.assert_close(module(*arguments), expected)


@pytest.mark.parametrize("use_deformable_func", [False, True])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_stays_close(half, use_deformable_func, device):
    module = build(use_deformable_func=use_deformable_func, use_camera_embed=True).float().to(device)
    arguments = scene(torch.float32, device)
    expected = module(*arguments)
    with torch.autocast(device.type, dtype=half):
        actual = module(*arguments)
    actual.float().sum().backward()
    # Linear layers in half precision on numbers of size 1; locations in half precision would be far off.
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=10 * torch.finfo(half).eps)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_maps_under_a_float32_module(half, device):
    module = build(use_deformable_func=True).float().to(device)
    feature, anchor, embed, maps, metas = scene(torch.float32, device)
    maps = [level.to(half) for level in maps]
    actual = module(feature, anchor, embed, maps, metas)
    assert actual.dtype == torch.float32
    expected = module(feature, anchor, embed, [level.float() for level in maps], metas)
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(half).eps)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_module(half, device):
    module = build(use_deformable_func=True, use_camera_embed=True).to(device, half)
    feature, anchor, embed, maps, metas = scene(torch.float32, device)
    actual = module(feature.to(half), anchor, embed.to(half), [level.to(half) for level in maps], metas)
    assert actual.dtype == half
    expected = module.float()(feature, anchor, embed, maps, metas)
    torch.testing.assert_close(actual.float(), expected, rtol=0, atol=20 * torch.finfo(half).eps)


def test_no_queries():
    module = build(use_deformable_func=True)
    feature, anchor, embed, maps, metas = scene()
    assert module(feature[:, :0], anchor[:, :0], embed[:, :0], maps, metas).shape == (BS, 0, EMBED_DIMS)


@pytest.mark.parametrize("use_camera_embed", [False, True])
def test_state_dict_names_and_shapes(use_camera_embed):
    module = DeformableFeatureAggregation(
        embed_dims=256,
        kps_generator={
            "type": "SparseBox3DKeyPointsGenerator",
            "num_learnable_pts": 6,
            "fix_scale": [[0.0] * 3] * 7,
        },
        use_camera_embed=use_camera_embed,
    )
    expected = {
        "kps_generator.fix_scale": (7, 3),
        "kps_generator.learnable_fc.weight": (18, 256),
        "kps_generator.learnable_fc.bias": (18,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
        "weights_fc.weight": (8 * 4 * 13 * (1 if use_camera_embed else 6), 256),
        "weights_fc.bias": (8 * 4 * 13 * (1 if use_camera_embed else 6),),
    }
    if use_camera_embed:
        expected["camera_encoder.0.weight"] = (256, 12)
        expected["camera_encoder.3.weight"] = (256, 256)
        vectors = ["0.bias", "2.weight", "2.bias", "3.bias", "5.weight", "5.bias"]
        expected.update({f"camera_encoder.{name}": (256,) for name in vectors})
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == expected


def test_checkpoint_without_fix_scale_loads_strictly():
    module, other = build(), build()
    checkpoint = {name: value for name, value in other.state_dict().items() if "fix_scale" not in name}
    module.load_state_dict(checkpoint, strict=True)
    arguments = scene()
    torch.testing.assert_close(module(*arguments), other(*arguments), rtol=0, atol=0)


def test_init_weight_as_a_head_calls_it(monkeypatch):
    module = build()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for submodule in module.modules():
        if hasattr(submodule, "init_weight"):
            submodule.init_weight()
    torch.testing.assert_close(module.kps_generator.fix_scale.data.tolist(), [list(p) for p in BOX["fix_scale"]])
    assert not module.output_proj.bias.any() and module.output_proj.weight.any()
    weights = sampling_weights(module, scene(), monkeypatch)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / (5 * NUM_CAMS * len(LEVELS))))


def test_attributes_and_defaults():
    module = DeformableFeatureAggregation()
    assert isinstance(module.kps_generator, SparseBox3DKeyPointsGenerator)
    assert (module.embed_dims, module.num_groups, module.group_dims) == (256, 8, 32)
    assert (module.num_levels, module.num_cams, module.num_pts) == (4, 6, 1)
    assert module.temp_module is None and module.camera_encoder is None
    assert module.use_temporal_anchor_embed and not module.use_deformable_func
    assert module.residual_mode == "add" and module.attn_drop == 0.0 and module.proj_drop.p == 0.0
    assert "num_pts=1" in repr(module) and "residual_mode='add'" in repr(module)


class Fusion(nn.Module):
    def __init__(self, embed_dims, gain=1.0):
        super().__init__()
        self.embed_dims, self.gain = embed_dims, gain


def test_key_point_generator_by_name_class_and_module():
    by_name = {"type": "SparsePoint3DKeyPointsGenerator", "num_learnable_pts": 1, "embed_dims": 3}
    for config in (by_name, {**by_name, "type": SparsePoint3DKeyPointsGenerator}):
        before = dict(config)
        generator = DeformableFeatureAggregation(32, kps_generator=config).kps_generator
        assert isinstance(generator, SparsePoint3DKeyPointsGenerator)
        assert generator.embed_dims == 32 and generator.num_pts == 20
        assert config == before
        assert DeformableFeatureAggregation(32, kps_generator=generator).kps_generator is generator


def test_temporal_fusion_module():
    config = {"type": Fusion, "gain": 2.0}
    module = DeformableFeatureAggregation(32, temporal_fusion_module=config).temp_module
    assert (module.embed_dims, module.gain) == (32, 2.0)
    assert config == {"type": Fusion, "gain": 2.0}
    own_width = DeformableFeatureAggregation(32, temporal_fusion_module={"type": Fusion, "embed_dims": 8})
    assert own_width.temp_module.embed_dims == 8
    assert DeformableFeatureAggregation(32, temporal_fusion_module=module).temp_module is module


def test_further_keyword_arguments_are_ignored():
    module, arguments = build(), scene()
    torch.testing.assert_close(module(*arguments, depth_prob=None), module(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"embed_dims": 30}, ValueError, "embed_dims must be divisible by num_groups; got 30 and 8"),
        ({"attn_drop": 1.0}, ValueError, r"attn_drop must be in \[0, 1\); got 1.0"),
        (
            {"residual_mode": "mul"},
            ValueError,
            "residual_mode must be one of .*'add', 'cat', None.*; got 'mul'",
        ),
        (
            {"kps_generator": {"type": "Typo"}},
            ValueError,
            "must be a class or one of SparseBox3DKeyPointsGenerator, SparsePoint3D.*; got 'Typo'",
        ),
        (
            {"kps_generator": {"num_learnable_pts": 6}},
            TypeError,
            "kps_generator must be .* with the key 'type'; got",
        ),
        (
            {"temporal_fusion_module": 3},
            TypeError,
            "temporal_fusion_module must be an nn.Module, or a dict.*; got 3",
        ),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        DeformableFeatureAggregation(**settings)


def test_metas_without_projection_matrix():
    feature, anchor, embed, maps, metas = scene()
    with pytest.raises(KeyError, match=r"metas must hold 'projection_mat' .*got the keys \['image_wh'\]"):
        build()(feature, anchor, embed, maps, {"image_wh": metas["image_wh"]})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f, a, e, m, metas: (f[..., :8], a, e, m, metas),
            r"instance_feature must be .*embed_dims=16; got \(2, 5, 8",
        ),
        (
            lambda f, a, e, m, metas: (f, a[:, :4], e, m, metas),
            r"instance_feature must be .*num_anchor=4; got \(2, 5, 16\)",
        ),
        (
            lambda f, a, e, m, metas: (f, a, e, m[:1], metas),
            "feature_maps must be .* with num_levels=2, bs=2, num_cams=3, embed_dims=16; got num_levels=1, bs=2",
        ),
        (
            lambda f, a, e, m, metas: (f, a, e, [level[:, :, :8] for level in m], metas),
            "feature_maps must be num_levels maps of .* embed_dims=16; got .* embed_dims=8",
        ),
        (
            lambda f, a, e, m, metas: (f, a, e, m, {"projection_mat": metas["projection_mat"][:, :2]}),
            r"metas\['projection_mat'\] must be .*num_cams=3; got \(2, 2, 4, 4\)",
        ),
    ],
)
def test_wrong_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        build()(*change(*scene()))


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda rows, shapes, starts: [rows[..., :8], shapes, starts],
            r"feature_maps\[0\] must be .*got \(2, 480, 8\)",
        ),
        (lambda rows, shapes, starts: [rows, shapes[:, :1], starts], r"feature_maps\[1\] must be .*got \(3, 1, 2\)"),
        (lambda rows, *levels: [rows.to("meta"), *levels], "feature_maps must be on cpu; got meta"),
    ],
)
def test_wrong_formatted_maps(change, message):
    feature, anchor, embed, maps, metas = scene()
    with pytest.raises(ValueError, match=message):
        build()(feature, anchor, embed, change(*ops.feature_maps_format(maps)), metas)


@pytest.mark.parametrize(
    "shape", [(BS, NUM_ANCHOR - 1, EMBED_DIMS), (1, BS, NUM_ANCHOR, EMBED_DIMS), (BS, NUM_ANCHOR, 2)]
)
def test_an_embedding_that_does_not_fit(shape):
    feature, anchor, _, maps, metas = scene()
    with pytest.raises(ValueError, match=r"anchor_embed must be \(bs, num_anchor, embed_dims\), or broadcast to it"):
        build()(feature, anchor, torch.zeros(shape).double(), maps, metas)


@pytest.mark.parametrize("shape", [(EMBED_DIMS,), (1, NUM_ANCHOR, EMBED_DIMS), (BS, 1, 1)])
def test_an_embedding_that_broadcasts(shape):
    feature, anchor, _, maps, metas = scene()
    module, embed = build(), torch.randn(shape).double()
    expected = module(feature, anchor, embed.expand(BS, NUM_ANCHOR, EMBED_DIMS), maps, metas)
    torch.testing.assert_close(module(feature, anchor, embed, maps, metas), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda f, a, e, m, metas: (f, a, e, m, None),
            "metas must be a dict that holds 'projection_mat' .*got NoneType",
        ),
        (
            lambda f, a, e, m, metas: (f, a, e, m, {"projection_mat": metas["projection_mat"].tolist()}),
            r"metas\['projection_mat'\] must be a torch.Tensor; got list",
        ),
        (lambda f, a, e, m, metas: (f, a, None, m, metas), "anchor_embed must be a torch.Tensor; got NoneType"),
        (lambda f, a, e, m, metas: (f, a.tolist(), e, m, metas), "anchor must be a torch.Tensor; got list"),
        (lambda f, a, e, m, metas: (f, a, e, m[0], metas), "feature_maps must be a list of maps.*; got Tensor"),
    ],
)
def test_wrong_types(change, message):
    with pytest.raises(TypeError, match=message):
        build()(*change(*scene()))


@pytest.mark.parametrize(
    "settings, error, message",
    [
        *(
            ({name: 0}, ValueError, f"{name} must be at least 1; got 0")
            for name in ("embed_dims", "num_groups", "num_levels", "num_cams")
        ),
        ({"num_groups": 8.0}, TypeError, "num_groups must be an integer; got 8.0"),
        (
            {"kps_generator": {"type": "SparsePoint3DKeyPointsGenerator"}},
            ValueError,
            "kps_generator must place at least one key point; got num_pts=0",
        ),
    ],
)
def test_settings_out_of_range(settings, error, message):
    with pytest.raises(error, match=message):
        DeformableFeatureAggregation(**settings)
