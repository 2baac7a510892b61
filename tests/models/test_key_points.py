"""The key point generators: places, earlier frames, moving anchors between frames, state dicts, errors."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from reimplementation.models.deformable import (
    Sparse4DBox3DKeyPointsGenerator,
    SparseBox3DKeyPointsGenerator,
    SparsePoint3DKeyPointsGenerator,
)

FACES = ((0.0, 0.0, 0.0), (0.45, 0.0, 0.0), (-0.45, 0.0, 0.0), (0.0, 0.45, 0.0), (0.0, 0.0, -0.45))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def boxes(bs=2, num_anchor=4, velocity_dims=3, dtype=torch.float64, device="cpu"):
    """Random box anchors, whose (sin, cos) have length 1."""
    yaw = torch.rand(bs, num_anchor, 1) * 2 * math.pi
    parts = [torch.randn(bs, num_anchor, 3) * 10, torch.randn(bs, num_anchor, 3) * 0.3, yaw.sin(), yaw.cos()]
    return torch.cat([*parts, torch.randn(bs, num_anchor, velocity_dims)], dim=-1).to(device, dtype)


def rigid(yaw, translation, bs=2, dtype=torch.float64):
    """(bs, 4, 4): turn by yaw about z, then move; each sample a little further."""
    matrix = torch.eye(4, dtype=dtype).repeat(bs, 1, 1)
    for sample in range(bs):
        angle = yaw + 0.1 * sample
        matrix[sample, :2, :2] = torch.tensor(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=dtype
        )
        matrix[sample, :3, 3] = torch.tensor(translation, dtype=dtype) + sample
    return matrix


def homogeneous(matrix, point):
    return (matrix @ torch.cat([point, point.new_ones(1)]))[:3]


def test_box_key_points_against_a_loop(device):
    generator = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=3, fix_scale=FACES).double().to(device)
    anchor, feature = boxes(device=device), torch.randn(2, 4, 16, dtype=torch.float64, device=device)
    key_points = generator(anchor, feature)
    assert key_points.shape == (2, 4, 8, 3) and generator.num_pts == 8

    for b in range(2):
        for n in range(4):
            x, y, z, w, length, h, sin, cos = anchor[b, n, :8].tolist()
            turn = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)
            size = torch.tensor([math.exp(w), math.exp(length), math.exp(h)], dtype=torch.float64)
            learned = (generator.learnable_fc(feature[b, n]).sigmoid() - 0.5).reshape(3, 3).cpu()
            for p, scale in enumerate([*generator.fix_scale.cpu(), *learned]):
                expected = turn @ (scale * size) + torch.tensor([x, y, z], dtype=torch.float64)
                torch.testing.assert_close(key_points[b, n, p].cpu(), expected)


def test_box_first_size_is_along_the_heading():
    generator = SparseBox3DKeyPointsGenerator(fix_scale=[[0.5, 0.0, 0.0]])
    anchor = torch.tensor([[[1.0, 2.0, 3.0, math.log(4.0), 0.0, 0.0, 1.0, 0.0]]])  # heads along y, 4 m long
    torch.testing.assert_close(generator(anchor)[0, 0, 0], torch.tensor([1.0, 4.0, 3.0]))


def test_box_defaults_to_the_centre():
    anchor = boxes(dtype=torch.float32)
    torch.testing.assert_close(SparseBox3DKeyPointsGenerator()(anchor)[:, :, 0], anchor[..., :3])


def test_box_without_feature_has_no_learnable_points():
    generator = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=3, fix_scale=FACES)
    assert generator(boxes(dtype=torch.float32)).shape == (2, 4, 5, 3)


def test_point_key_points_against_a_loop(device):
    heights = (0.0, 0.5, -0.25)
    generator = SparsePoint3DKeyPointsGenerator(
        16, num_sample=5, num_learnable_pts=2, fix_height=heights, ground_height=-1.8
    )
    generator = generator.double().to(device)
    anchor = torch.randn(2, 4, 10, dtype=torch.float64, device=device)
    feature = torch.randn(2, 4, 16, dtype=torch.float64, device=device)
    key_points = generator(anchor, feature)
    assert key_points.shape == (2, 4, 30, 3) and generator.num_pts == 30

    for b in range(2):
        for n in range(4):
            offsets = iter(generator.learnable_fc(feature[b, n]).reshape(30, 2))
            actual = iter(key_points[b, n])
            for sample in range(5):
                for height in heights:
                    for _ in range(2):
                        point = next(actual)
                        torch.testing.assert_close(point[:2], anchor[b, n, 2 * sample : 2 * sample + 2] + next(offsets))
                        assert point[2].item() == pytest.approx(height - 1.8)


@pytest.mark.parametrize("velocity_dims", [0, 2, 3])
def test_box_in_earlier_frames_against_a_loop(velocity_dims):
    generator = SparseBox3DKeyPointsGenerator(fix_scale=FACES)
    anchor = boxes(velocity_dims=velocity_dims)
    transforms = [rigid(0.3, (1.0, 2.0, 0.5)), rigid(-0.2, (-3.0, 0.0, 0.0))]
    now = torch.tensor([1000.5, 1001.0], dtype=torch.float64)
    times = [now - torch.tensor([0.5, 0.25]), now - 1.0]
    key_points, past = generator(anchor, None, transforms, now, times)
    torch.testing.assert_close(key_points, generator(anchor))
    assert len(past) == 2

    velocity = torch.zeros(2, 4, 3, dtype=torch.float64)
    velocity[..., :velocity_dims] = anchor[..., 8:]
    for matrix, time, points in zip(transforms, times, past, strict=True):
        for b in range(2):
            for n in range(4):
                for p in range(5):
                    moved = key_points[b, n, p] - velocity[b, n] * (now[b] - time[b])
                    torch.testing.assert_close(points[b, n, p], homogeneous(matrix[b], moved))


def test_map_in_earlier_frames_stands_still():
    generator = SparsePoint3DKeyPointsGenerator(16, num_sample=5, num_learnable_pts=2).double()
    anchor, feature = torch.randn(2, 4, 10).double(), torch.randn(2, 4, 16).double()
    matrix, now = rigid(0.3, (1.0, 2.0, 0.5)), torch.tensor([2.0, 3.0])
    key_points, (past,) = generator(anchor, feature, [matrix], now, [now - 0.5])
    for b in range(2):
        for n in range(4):
            for p in range(10):
                torch.testing.assert_close(past[b, n, p], homogeneous(matrix[b], key_points[b, n, p]))


def test_no_earlier_frame_gives_key_points_alone():
    anchor, now = boxes(), torch.zeros(2)
    generator = SparseBox3DKeyPointsGenerator()
    for temporal in [([], now, []), (None, now, [now]), ([rigid(0, (0, 0, 0))], None, [now])]:
        assert isinstance(generator(anchor, None, *temporal), torch.Tensor)


def test_as_many_transforms_as_timestamps():
    now = torch.zeros(2)
    with pytest.raises(ValueError, match="T_cur2temp_list must hold one transform per timestamp, 2; got 1"):
        SparseBox3DKeyPointsGenerator()(boxes(), None, [rigid(0, (0, 0, 0))], now, [now, now])


@pytest.mark.parametrize("velocity_dims", [0, 2, 3])
def test_box_projection_closed_form(velocity_dims):
    anchor = boxes(velocity_dims=velocity_dims)
    matrix, dt = rigid(0.7, (5.0, -1.0, 0.2)), torch.tensor([0.5, -0.25], dtype=torch.float64)
    (moved,) = SparseBox3DKeyPointsGenerator.anchor_projection(anchor, [matrix], time_intervals=[dt])
    assert moved.shape == anchor.shape
    for b in range(2):
        for n in range(4):
            old, new = anchor[b, n], moved[b, n]
            velocity = torch.zeros(3, dtype=torch.float64)
            velocity[:velocity_dims] = old[8:]
            torch.testing.assert_close(new[:3], homogeneous(matrix[b], old[:3] - velocity * dt[b]))
            torch.testing.assert_close(new[3:6], old[3:6])
            yaw = torch.atan2(old[6], old[7]) + 0.7 + 0.1 * b
            torch.testing.assert_close(new[6:8], torch.stack([yaw.sin(), yaw.cos()]))
            torch.testing.assert_close(new[8:], (matrix[b, :3, :3] @ velocity)[:velocity_dims])


def test_box_projection_times():
    anchor, matrix = boxes(), rigid(0.7, (5.0, -1.0, 0.2))
    now = torch.tensor([7.0, 8.0], dtype=torch.float64)
    project = SparseBox3DKeyPointsGenerator.anchor_projection
    (by_interval,) = project(anchor, [matrix], time_intervals=[torch.tensor([0.5, 0.5])])
    (by_scalar,) = project(anchor, [matrix], time_intervals=[0.5])
    (by_timestamps,) = project(anchor, [matrix], src_timestamp=now, dst_timestamps=[now - 0.5])
    (still,) = project(anchor, [matrix])
    torch.testing.assert_close(by_scalar, by_interval)
    torch.testing.assert_close(by_timestamps, by_interval)
    assert (still - by_interval)[..., :3].abs().max() > 0.1
    torch.testing.assert_close(still[..., 3:], by_interval[..., 3:])


def test_box_projection_round_trip(device):
    anchor, matrix = boxes(device=device), rigid(0.7, (5.0, -1.0, 0.2)).to(device)
    project = SparseBox3DKeyPointsGenerator.anchor_projection
    (there,) = project(anchor, [matrix], time_intervals=[0.5])
    (back,) = project(there, [torch.linalg.inv(matrix)], time_intervals=[-0.5])
    torch.testing.assert_close(back, anchor)


def test_map_projection_closed_form_and_round_trip():
    generator = SparsePoint3DKeyPointsGenerator(num_sample=5)
    anchor, matrix = torch.randn(2, 4, 10).double(), rigid(0.7, (5.0, -1.0, 0.2))
    (there,) = generator.anchor_projection(anchor, [matrix], time_intervals=[0.5])
    expected = torch.einsum("bij,bnsj->bnsi", matrix[:, :2, :2], anchor.reshape(2, 4, 5, 2))
    expected = expected + matrix[:, None, None, :2, 3]
    torch.testing.assert_close(there, expected.reshape(2, 4, 10))
    (back,) = generator.anchor_projection(there, [torch.linalg.inv(matrix)])
    torch.testing.assert_close(back, anchor)


def test_projection_keeps_the_anchors_dtype():
    half = boxes(dtype=torch.float16)
    (moved,) = SparseBox3DKeyPointsGenerator.anchor_projection(half, [rigid(0.1, (1.0, 0.0, 0.0))])
    assert moved.dtype == torch.float16


def test_distance_is_in_the_ground_plane():
    anchor = torch.tensor([[[3.0, 4.0, 12.0], [0.0, 0.0, 5.0]]])
    torch.testing.assert_close(SparseBox3DKeyPointsGenerator.distance(anchor), torch.tensor([[5.0, 0.0]]))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_anchors_give_float32_key_points(half):
    box = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2).to(half)
    assert box(boxes(dtype=half), torch.randn(2, 4, 16, dtype=half)).dtype == torch.float32
    line = SparsePoint3DKeyPointsGenerator(16, num_sample=5, num_learnable_pts=2).to(half)
    assert line(torch.randn(2, 4, 10, dtype=half), torch.randn(2, 4, 16, dtype=half)).dtype == torch.float32


def test_autocast_leaves_fixed_key_points_exact(device):
    generator = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2, fix_scale=FACES).to(device)
    anchor, feature = boxes(dtype=torch.float32, device=device), torch.randn(2, 4, 16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        key_points = generator(anchor, feature)
    expected = generator(anchor, feature)
    assert key_points.dtype == torch.float32
    torch.testing.assert_close(key_points[:, :, :5], expected[:, :, :5], rtol=0, atol=0)
    # Offsets are a logistic of a bfloat16 number, times sizes of at most a few metres.
    torch.testing.assert_close(key_points, expected, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)


def test_gradients_reach_anchor_and_feature():
    generator = SparseBox3DKeyPointsGenerator(4, num_learnable_pts=2, fix_scale=FACES).double()
    anchor = boxes(1, 2).requires_grad_()
    feature = torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(generator, (anchor, feature))


def test_state_dict_names():
    box = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2, fix_scale=FACES)
    assert set(box.state_dict()) == {"fix_scale", "learnable_fc.weight", "learnable_fc.bias"}
    assert box.learnable_fc.weight.shape == (6, 16)
    assert set(SparseBox3DKeyPointsGenerator().state_dict()) == {"fix_scale"}
    assert not box.fix_scale.requires_grad
    line = SparsePoint3DKeyPointsGenerator(16, num_sample=5, num_learnable_pts=2, fix_height=(0, 1))
    assert set(line.state_dict()) == {"learnable_fc.weight", "learnable_fc.bias"}
    assert line.learnable_fc.weight.shape == (40, 16)
    assert not SparsePoint3DKeyPointsGenerator().state_dict()


def test_checkpoint_with_and_without_fix_scale():
    generator = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2, fix_scale=FACES)
    checkpoint = {name: torch.randn_like(value) for name, value in generator.state_dict().items()}
    generator.load_state_dict(checkpoint, strict=True)
    torch.testing.assert_close(generator.fix_scale.data, checkpoint["fix_scale"])

    fresh = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2, fix_scale=FACES)
    del checkpoint["fix_scale"]
    fresh.load_state_dict(checkpoint, strict=True)
    torch.testing.assert_close(fresh.fix_scale.data, torch.tensor(FACES))
    torch.testing.assert_close(fresh.learnable_fc.weight.data, checkpoint["learnable_fc.weight"])
    with pytest.raises(RuntimeError, match="learnable_fc.bias"):
        fresh.load_state_dict({"learnable_fc.weight": checkpoint["learnable_fc.weight"]}, strict=True)


def test_a_checkpoint_completes_a_module_built_on_the_meta_device():
    """What the configuration fixes comes back too, though no checkpoint of SparseDrive's holds it."""
    heights = (-0.5, 1.25)
    line_settings = {"num_sample": 5, "num_learnable_pts": 2, "fix_height": heights, "ground_height": -1.8}
    for build, settings in (
        (SparseBox3DKeyPointsGenerator, {"num_learnable_pts": 2, "fix_scale": FACES}),
        (SparsePoint3DKeyPointsGenerator, line_settings),
    ):
        original = build(16, **settings)
        checkpoint = {name: value for name, value in original.state_dict().items() if name != "fix_scale"}
        with torch.device("meta"):
            module = build(16, **settings)
        for leftover in module.to_empty(device="cpu").state_dict().values():
            leftover.fill_(float("nan"))
        module.load_state_dict(checkpoint, strict=True)
        anchor, feature = torch.randn(2, 3, 10), torch.randn(2, 3, 16)
        torch.testing.assert_close(module(anchor, feature), original(anchor, feature), rtol=0, atol=0)


def test_init_weight_restores_the_fixed_places():
    generator = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2, fix_scale=FACES)
    for parameter in generator.parameters():
        nn.init.normal_(parameter)
    generator.init_weight()
    torch.testing.assert_close(generator.fix_scale.data, torch.tensor(FACES))
    assert not generator.learnable_fc.bias.any()
    bound = math.sqrt(6 / (16 + 6))
    assert 0 < generator.learnable_fc.weight.abs().max() <= bound


def test_init_weight_of_the_map_generator():
    generator = SparsePoint3DKeyPointsGenerator(16, num_sample=5, num_learnable_pts=2)
    generator.init_weight()
    assert not generator.learnable_fc.bias.any() and generator.learnable_fc.weight.any()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_compute_the_same(duplicate):
    feature = torch.randn(2, 4, 16)
    box = SparseBox3DKeyPointsGenerator(16, num_learnable_pts=2, fix_scale=FACES)
    anchor = boxes(dtype=torch.float32)
    torch.testing.assert_close(duplicate(box)(anchor, feature), box(anchor, feature), rtol=0, atol=0)
    line = SparsePoint3DKeyPointsGenerator(16, num_sample=5, num_learnable_pts=2)
    anchor = torch.randn(2, 4, 10)
    torch.testing.assert_close(duplicate(line)(anchor, feature), line(anchor, feature), rtol=0, atol=0)


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"fix_scale must be \(num_fixed, 3\); got \(2,\)"):
        SparseBox3DKeyPointsGenerator(fix_scale=(0.0, 0.5))
    with pytest.raises(ValueError, match=r"anchor must be \(bs, num_anchor, 8 to 11\).*got \(2, 4, 7\)"):
        SparseBox3DKeyPointsGenerator()(torch.zeros(2, 4, 7))
    with pytest.raises(ValueError, match=r"anchor must be .*got \(4, 11\)"):
        SparseBox3DKeyPointsGenerator.anchor_projection(torch.zeros(4, 11), [])
    with pytest.raises(ValueError, match=r"anchor must be \(bs, num_anchor, 10\); got \(2, 4, 40\)"):
        SparsePoint3DKeyPointsGenerator(num_sample=5).anchor_projection(torch.zeros(2, 4, 40), [])


def test_map_generator_needs_learnable_points_and_a_feature():
    with pytest.raises(ValueError, match="num_learnable_pts >= 1.*got num_learnable_pts=0 and an instance_feature"):
        SparsePoint3DKeyPointsGenerator(16, num_sample=5)(torch.zeros(2, 4, 10), torch.zeros(2, 4, 16))
    with pytest.raises(ValueError, match="got num_learnable_pts=1 and no instance_feature"):
        SparsePoint3DKeyPointsGenerator(16, num_sample=5, num_learnable_pts=1)(torch.zeros(2, 4, 10))


@pytest.mark.parametrize("velocity_dims", [0, 2, 3])
def test_sparse4d_leaves_cosine_before_sine(velocity_dims):
    """In the anchors that it projects, and nowhere else; its modules load the same checkpoints."""
    anchor, matrix = boxes(velocity_dims=velocity_dims), rigid(0.7, (5.0, -1.0, 0.2))
    generator = Sparse4DBox3DKeyPointsGenerator(fix_scale=FACES)
    (ours,) = SparseBox3DKeyPointsGenerator.anchor_projection(anchor, [matrix], time_intervals=[0.5])
    (theirs,) = generator.anchor_projection(anchor, [matrix], time_intervals=[0.5])
    yaw = torch.atan2(anchor[..., 6], anchor[..., 7]) + 0.7 + 0.1 * torch.arange(2)[:, None]
    torch.testing.assert_close(theirs[..., 6], yaw.cos())
    torch.testing.assert_close(theirs[..., 7], yaw.sin())
    others = [component for component in range(anchor.shape[-1]) if component not in (6, 7)]
    assert torch.equal(theirs[..., others], ours[..., others])

    plain = SparseBox3DKeyPointsGenerator(fix_scale=FACES)
    generator.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(generator(anchor), plain(anchor))


def test_what_is_no_tensor():
    line = SparsePoint3DKeyPointsGenerator(num_sample=5, num_learnable_pts=1)
    anchor = [[0.0] * 10]
    for call in (
        lambda: SparseBox3DKeyPointsGenerator()(anchor),
        lambda: SparseBox3DKeyPointsGenerator.anchor_projection(anchor, []),
        lambda: line(anchor, torch.zeros(1, 1, 256)),
        lambda: line.anchor_projection(anchor, []),
    ):
        with pytest.raises(TypeError, match="anchor must be a torch.Tensor; got list"):
            call()


def test_settings_out_of_range():
    for build in (SparseBox3DKeyPointsGenerator, SparsePoint3DKeyPointsGenerator):
        with pytest.raises(ValueError, match="num_learnable_pts must be at least 0; got -1"):
            build(num_learnable_pts=-1)
    with pytest.raises(ValueError, match="num_sample must be at least 1; got 0"):
        SparsePoint3DKeyPointsGenerator(num_sample=0)
