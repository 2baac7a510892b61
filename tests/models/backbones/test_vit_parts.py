"""The parts of the ViT one by one: positions, drop path, layers, heads."""

from __future__ import annotations

import math
import re
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reimplementation.models.backbones.vit import (
    AttentivePool,
    AttentivePoolHeadConfig,
    CrossAttention,
    FourierPositions,
    HeadConfig,
    LearnedPositions,
    NormMLP,
    RotaryPositions,
    SelfAttention,
    TransposedConv2dHeadConfig,
    UpsampleHeadConfig,
)
from reimplementation.models.backbones.vit.residual import LayerScale, add_branch
from reimplementation.models.backbones.vit.rope import rotate

from . import vit_formulas as formulas

DOUBLE = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestRope:
    @pytest.mark.parametrize(
        ("normalize", "rows", "columns"), [("separate", 3, 5), ("max", 5, 5), ("min", 3, 3)], ids=lambda v: str(v)
    )
    def test_coordinates(self, normalize, rows, columns):
        """The angle of a row is 2 pi times its coordinate over the period; what divides it is the setting."""
        rope = RotaryPositions(8, base=16.0, normalize_coords=normalize)
        assert rope.periods.tolist() == [1.0, 4.0]  # base ** (2 i / 4)
        angles = torch.tensor(
            [
                [2 * math.pi * (2 * (i + 0.5) / rows - 1) / p for p in (1, 4)]
                + [2 * math.pi * (2 * (j + 0.5) / columns - 1) / p for p in (1, 4)]
                for i in range(3)
                for j in range(5)
            ]
        ).repeat(1, 2)
        torch.testing.assert_close(rope((3, 5)), torch.stack([angles.sin(), angles.cos()]), rtol=0, atol=4e-6)

    def test_the_product_depends_on_the_distance_alone(self):
        sin_cos = RotaryPositions(16, normalize_coords="max")((1, 9))
        torch.manual_seed(0)
        query, key = (rotate(torch.randn(16).expand(1, 1, 9, 16), sin_cos)[0, 0] for _ in range(2))
        products = query @ key.T
        for distance in range(1, 4):
            along = products.diagonal(distance)
            torch.testing.assert_close(along, along[:1].expand_as(along), rtol=0, atol=2e-5)

    def test_tokens_before_the_patches_stay(self):
        x = torch.randn(2, 3, 8, 16)
        turned = rotate(x, RotaryPositions(16)((2, 3)))
        assert torch.equal(turned[:, :, :2], x[:, :, :2]) and not torch.isclose(turned[:, :, 2:], x[:, :, 2:]).all()

    def test_half_precision_is_turned_in_float32(self):
        sin_cos = RotaryPositions(16)((4, 4))
        x = torch.randn(1, 1, 16, 16).bfloat16()
        assert torch.equal(rotate(x, sin_cos), rotate(x.float(), sin_cos).bfloat16())

    def test_angles_of_most_images_are_kept(self):
        rope = RotaryPositions(8, shift=0.5, size=(3, 5)).eval()
        assert rope((3, 5)) is rope.kept and torch.equal(rope.kept, RotaryPositions(8)((3, 5)))
        assert rope((5, 3)).shape == (2, 15, 8) and not torch.equal(rope((5, 3)), rope.kept)
        assert list(rope.state_dict()) == ["periods"]
        assert not torch.equal(rope.train()((3, 5)), rope.kept)  # its augmentation draws
        kept = rope.kept.clone()
        assert torch.equal(rope.bfloat16().kept, kept)
        assert torch.equal(RotaryPositions(8, size=(3, 5), device="meta").to_empty(device="cpu").kept, kept)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_fewer_kernels_than_the_formula(self, dtype):
        """Which is what transforms see; outputs and gradients, of views as attention hands them over."""
        torch.manual_seed(0)
        sin_cos = RotaryPositions(16)((3, 4))
        x = torch.randn(2, 13, 6, 16, dtype=dtype, requires_grad=True)
        grad = torch.randn(2, 4, 13, 16, dtype=dtype)
        heads = x.transpose(1, 2)[:, :4]
        turned = rotate(heads, sin_cos)
        (got,) = torch.autograd.grad(turned, x, grad)
        expected, pull = torch.func.vjp(lambda x: rotate(x, sin_cos), heads.detach())
        (wanted,) = pull(grad)
        assert turned.dtype == got.dtype == dtype
        with torch.no_grad():
            assert torch.equal(rotate(heads, sin_cos), turned)
        tolerance = {"rtol": 0, "atol": 2 * torch.finfo(dtype).eps * float(x.detach().abs().max())}
        torch.testing.assert_close(turned, expected, **tolerance)
        torch.testing.assert_close(got.transpose(1, 2)[:, :4], wanted, **tolerance)

    def test_derivatives_of_any_order(self):
        sin_cos = RotaryPositions(8)((2, 2)).double()
        x = torch.randn(1, 2, 5, 8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: rotate(x, sin_cos), x)
        assert torch.autograd.gradgradcheck(lambda x: rotate(x, sin_cos), x)
        sin_cos.requires_grad_()  # positions that are learned have their gradient too
        assert torch.autograd.gradcheck(rotate, (x, sin_cos))

    def test_augmentation(self):
        """Recover shift, jitter and rescale from the coordinates that they make, and compare with their ranges."""
        plain = RotaryPositions(8, normalize_coords="separate")
        rope = RotaryPositions(8, shift=0.25, jitter=1.5, rescale=2.0)
        before = plain._coordinates((4, 6))
        factors, shifts = [], []
        for seed in range(200):
            after = rope._augmented(before, seed)
            slope = (after[-1] - after[0]) / (before[-1] - before[0])
            factors.append(slope)
            shifts.append(after[0] / slope - before[0])
        factors, shifts = torch.stack(factors), torch.stack(shifts)
        assert 0.2 < shifts.abs().max() <= 0.25 + 1e-5
        assert 1 / 3 <= factors.min() < 0.45 and 2.2 < factors.max() <= 3
        ratio = factors[:, 0] / factors[:, 1]  # the rescaling of both axes is gone
        assert 1 / 2.25 <= ratio.min() < 0.6 and 1.7 < ratio.max() <= 2.25
        assert factors.log().mean().abs() < 0.1 and shifts.mean().abs() < 0.03

    def test_augmentation_is_for_training(self):
        rope = RotaryPositions(8, rescale=2.0)
        plain = RotaryPositions(8)((4, 6))
        assert torch.equal(rope.eval()((4, 6)), plain) and not torch.equal(rope.train()((4, 6)), plain)

    def test_a_model_hands_its_settings_over(self):
        settings = {"rope_shift_coords": 0.5, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0, "rope_base": 30.0}
        vit = formulas.config(**settings, rope_normalize_coords="max").instantiate()
        found = (vit.rope.shift, vit.rope.jitter, vit.rope.rescale, vit.rope.base, vit.rope.normalize_coords)
        assert found == (0.5, 1.5, 2.0, 30.0, "max")
        x = torch.randn(1, 3, 64, 96, **DOUBLE)
        formulas.fill(vit)
        first, again, other = (vit(x, rope_seed=seed).dense_features for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_a_seed_repeats(self):
        rope = RotaryPositions(8, shift=0.1)
        assert torch.equal(rope((4, 6), seed=3), rope((4, 6), seed=3))
        assert not torch.equal(rope((4, 6), seed=3), rope((4, 6), seed=4))
        assert not torch.equal(rope((4, 6)), rope((4, 6)))

    def test_rounded_periods_are_not_taken_over(self):
        rope, exact = RotaryPositions(64), RotaryPositions(64).periods
        rope.load_state_dict({"periods": exact.bfloat16()})
        assert torch.equal(rope.periods, exact)

    @pytest.mark.parametrize("other", [{"base": 50.0, "head_dim": 64}, {"head_dim": 32}])
    def test_another_encoding_does_not_load(self, other):
        with pytest.raises(RuntimeError, match="periods are of another rotary encoding: expected head_dim=64"):
            RotaryPositions(64).load_state_dict(RotaryPositions(**other).state_dict())

    def test_missing_periods(self):
        with pytest.raises(RuntimeError, match="Missing key"):
            RotaryPositions(64).load_state_dict({})

    def test_head_dim(self):
        with pytest.raises(ValueError, match="head_dim must be a multiple of 4; got 6"):
            RotaryPositions(6)


class TestLearnedPositions:
    @pytest.fixture
    def learned(self):
        return LearnedPositions(32, (6, 8), dropout=0.5, **DOUBLE)

    def test_a_fresh_one(self, learned):
        values = learned.positions
        rounding = 0.02 * torch.finfo(torch.float32).eps  # they are computed in float32
        assert abs(values.mean()) < 4 * rounding and values.std().item() == pytest.approx(0.02)
        grid = values.unflatten(0, (6, 8))
        between_neighbours = (grid[1:] - grid[:-1]).norm(dim=-1).mean()
        assert between_neighbours < (values - values[torch.randperm(48)]).norm(dim=-1).mean()

    @pytest.mark.parametrize("size", [(9, 5), (12, 16), (3, 4)])
    def test_resized(self, size, learned):
        expected = formulas.bicubic(learned.positions, (6, 8), size)
        torch.testing.assert_close(learned.eval()(size)[0], expected)

    def test_half_precision_is_resized_in_float32(self):
        half = LearnedPositions(32, (6, 8), dtype=torch.bfloat16)
        expected = formulas.bicubic(half.positions.float(), (6, 8), (9, 5))
        rounding = torch.finfo(torch.bfloat16).eps / 2
        torch.testing.assert_close(half.eval()((9, 5))[0].double(), expected, rtol=rounding, atol=1e-8)

    def test_a_volume_is_resized_linearly(self):
        volume = LearnedPositions(4, (2, 3, 4), **DOUBLE).eval()
        ramp = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in (2, 3, 4)))
        with torch.no_grad():
            volume.positions[:, :3] = ramp
        finer = volume((4, 6, 8))[0].unflatten(0, (4, 6, 8))
        torch.testing.assert_close(finer[1, 1, 1, :3], torch.full((3,), 0.25, **DOUBLE))
        torch.testing.assert_close(finer[2, 2, 2, :3], torch.full((3,), 0.75, **DOUBLE))

    def test_expanded(self):
        positions = LearnedPositions(8, (3, 4)).eval()
        expected = positions((6, 8))
        positions.expand_positions((6, 8))
        assert positions.size == (6, 8) and positions.positions.shape == (48, 8)
        assert torch.equal(positions((6, 8)), expected) and positions.positions.requires_grad

    def test_dropout_in_training(self, learned):
        dropped = (learned.train()((6, 8)) == 0).double().mean()
        assert 0.4 < dropped < 0.6


def test_fourier_positions_of_any_size():
    positions = FourierPositions(16, 3, **DOUBLE)
    expected = formulas.fourier((2, 5, 3), dict(positions.named_parameters()))
    torch.testing.assert_close(positions((2, 5, 3))[0], expected)


def test_fourier_features_are_float32_under_autocast():
    positions = FourierPositions(16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(positions((4, 4)), positions((4, 4)).float())


class TestDropPath:
    @staticmethod
    def branch(x, samples):
        return 2 * x

    @pytest.mark.parametrize(
        ("rate", "batch", "kept"), [(0.5, 6, 3), (0.1, 4, 3), (0.9, 3, 1), (0.9, 20, 2), (0.07, 100, 93)]
    )
    def test_each_sample_skips_or_is_scaled(self, rate, batch, kept):
        x = torch.rand(batch, 2, 3) + 1
        updates = (add_branch(x, self.branch, rate) - x) / (2 * x)
        factors = updates[:, 0, 0]
        torch.testing.assert_close(updates, factors[:, None, None].expand_as(updates))
        torch.testing.assert_close(factors.sort().values, torch.tensor([0.0] * (batch - kept) + [batch / kept] * kept))

    def test_the_expectation_is_that_without(self):
        x = torch.ones(5, 1, 1, dtype=torch.float64)
        torch.manual_seed(0)
        mean = torch.stack([add_branch(x, self.branch, 0.4) for _ in range(2000)]).mean(0)
        # An update is 2 * 5 / 3 with a chance of 3 / 5: its deviation is 1.63, that of the mean 0.037.
        torch.testing.assert_close(mean, 3 * x, rtol=0, atol=4 * 0.037)

    def test_the_branch_sees_the_kept_samples_alone(self):
        x = torch.arange(6.0).view(6, 1, 1)
        seen = []

        def branch(some, samples):
            seen.append((some, samples))
            return some

        add_branch(x, branch, 0.5)
        ((some, samples),) = seen
        assert some.shape[0] == 3 and torch.equal(some, x[samples])

    @pytest.mark.parametrize(("rate", "batch"), [(0.0, 4), (0.9, 1)])
    def test_none_skips(self, rate, batch):
        x = torch.rand(batch, 2, 3)
        assert torch.equal(add_branch(x, self.branch, rate), x + 2 * x)

    @pytest.mark.parametrize("kind", ["encoder", "decoder", "cross_attention"])
    def test_layers_drop_in_training_alone(self, kind):
        vit = formulas.config(drop_path_rate=0.5).instantiate()
        layer = formulas.fill(getattr(vit, f"create_{kind}_layer")())
        x, kv = torch.randn(4, 96, 64, **DOUBLE), torch.randn(4, 7, 64, **DOUBLE)
        rope = torch.stack([vit.prepare_rope((8, 12))] * 4, 1)  # (2, B, L, d): positions of each sample's own
        arguments = (x, rope) if kind == "encoder" else (x, kv, rope)
        assert torch.equal(layer.eval()(*arguments), layer(*arguments))
        layer.train()(*arguments).sum().backward()
        assert not torch.equal(layer(*arguments), layer.eval()(*arguments))


@pytest.mark.parametrize(
    ("activation", "limit", "extra_bias"),
    [("srelu", None, None), *product(("swiglu", "geglu", "openswiglu"), (None, 0.5), (None, 1.0))],
)
def test_mlp(activation, limit, extra_bias):
    config = formulas.config(activation=activation, glu_limit=limit, glu_extra_bias=extra_bias)
    mlp = NormMLP(64, 128, activation, glu_limit=limit, glu_extra_bias=extra_bias, **DOUBLE)
    formulas.fill(mlp)
    x = torch.randn(2, 5, 64, **DOUBLE)
    torch.testing.assert_close(mlp(x), formulas.mlp(config, mlp.state_dict(), x))


def test_layer_scale_applies_once():
    x = torch.randn(2, 3, 4)
    assert torch.equal(LayerScale(4, 0.5)(x), 0.5 * x)


@pytest.mark.parametrize("kind", ["decoder", "cross_attention"])
@pytest.mark.parametrize("options", [{}, {"qk_normalization": True, "layer_scale": 0.3, "norm_type": "layernorm"}])
def test_layers_with_other_tokens(kind, options):
    vit = formulas.config(**options).instantiate()
    config = vit.config
    layer = formulas.fill(getattr(vit, f"create_{kind}_layer")())
    x, kv = torch.randn(2, 6, 64, **DOUBLE), torch.randn(2, 12, 64, **DOUBLE)
    state = layer.state_dict()
    angles_q, angles_k = (formulas.rope_angles(formulas.places(size), 100.0, 16)[None] for size in ((2, 3), (3, 4)))
    expected = x
    if kind == "decoder":
        attention = formulas.below(state, "self_attention.")
        expected = x + formulas.scale(state, "attn", formulas.self_attention(config, attention, x, angles_q))
    expected = formulas.cross_attention_layer(config, state, expected, kv, angles_q, angles_k)
    found = layer(x, kv, vit.prepare_rope((2, 3)), vit.prepare_rope((3, 4)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class TestAttention:
    def test_a_mask_hides_keys(self):
        attention = formulas.fill(SelfAttention(64, 4, **DOUBLE))
        x = torch.randn(1, 5, 64, **DOUBLE)
        seen = torch.tensor([True, True, True, False, False])
        found = attention(x, attn_mask=seen.expand(1, 1, 5, 5))
        torch.testing.assert_close(found[:, :3], attention(x[:, :3]))

    def test_cross_attention_weights(self):
        attention = formulas.fill(CrossAttention(64, 4, **DOUBLE))
        x, kv = torch.randn(2, 3, 64, **DOUBLE), torch.randn(2, 5, 64, **DOUBLE)
        weights = attention.forward_weights(x, kv)
        assert weights.shape == (2, 4, 3, 5)
        value = attention.kv_proj(kv).chunk(2, -1)[1].unflatten(-1, (4, 16)).transpose(1, 2)
        torch.testing.assert_close(attention(x, kv), attention.out_proj((weights @ value).transpose(1, 2).flatten(2)))

    def test_dropout_in_training_alone(self):
        attention = SelfAttention(64, 4, attention_dropout=0.5, hidden_dropout=0.0)
        x = torch.randn(1, 5, 64)
        assert not torch.equal(attention.train()(x), attention(x))
        assert torch.equal(attention.eval()(x), attention(x))

    @pytest.mark.parametrize("num_queries", [1, 3])
    def test_pooling(self, num_queries):
        pool = formulas.fill(AttentivePool(64, 4, num_queries, **DOUBLE))
        x = torch.randn(2, 7, 64, **DOUBLE)
        state = formulas.below(pool.state_dict(), "cross_attention.")
        expected = formulas.cross_attention(formulas.config(), state, pool.query.expand(2, -1, -1), x)
        torch.testing.assert_close(pool(x), expected[:, 0] if num_queries == 1 else expected)
        weights = pool.forward_weights(x)
        assert weights.shape == (2, 4, num_queries, 7)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, num_queries, **DOUBLE))


class Copies(TorchDispatchMode):
    """Names what copies tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("cat", "stack", "clone", "copy_"):
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


def test_gradients_of_heads_are_copied_once():
    attention, x = SelfAttention(32, 4), torch.randn(2, 5, 32, requires_grad=True)
    with Copies() as forward:
        output = attention(x)
    with Copies() as backward:
        output.backward(torch.ones_like(output))
    assert forward.seen == [] and backward.seen == ["cat"]


class TestHeads:
    config = formulas.config(
        qk_normalization=True,
        attention_bias=False,
        heads={
            "linear": HeadConfig(out_features=5, bias=False),
            "pool": AttentivePoolHeadConfig(out_features=5, num_queries=2),
            "twice": TransposedConv2dHeadConfig(out_features=3),
            "pixels": UpsampleHeadConfig(out_features=2, num_upsample_stages=3, hidden_features=(8, 4)),
        },
    )
    vit = formulas.fill(config.instantiate()).eval()

    def test_shapes(self):
        features = self.vit(torch.randn(2, 3, 64, 96))
        grid = features.visual_tokens_as_grid.movedim(-1, 1)
        assert self.vit.heads["linear"](features.visual_tokens).shape == (2, 96, 5)
        assert self.vit.heads["pool"](features.visual_tokens).shape == (2, 2, 5)
        assert self.vit.heads["twice"](grid).shape == (2, 3, 16, 24)
        assert self.vit.heads["pixels"](grid).shape == (2, 2, 64, 96)

    def test_pooling_inherits_the_backbone(self):
        names = self.vit.heads["pool"].state_dict()
        assert "pool.cross_attention.q_norm.weight" in names and "pool.cross_attention.q_proj.bias" not in names

    def test_upsampling(self):
        head = self.vit.heads["pixels"]
        x = torch.randn(1, 64, 2, 3, **DOUBLE)
        expected = x
        for up, smooth in zip(head.upsample_layers, head.smooth_layers):
            # A transposed convolution whose stride is its kernel puts a small image in the place of each pixel.
            blocks = torch.einsum("bcij,cduv->bdiujv", expected, up.weight)
            expected = blocks.flatten(4).flatten(2, 3) + up.bias[:, None, None]
            inner = F.gelu(F.conv2d(expected, smooth[0].weight, smooth[0].bias, padding=1))
            expected = expected + F.conv2d(inner, smooth[2].weight, smooth[2].bias, padding=1)
        torch.testing.assert_close(head(x), expected)

    def test_no_smoothing(self):
        head = UpsampleHeadConfig(num_smooth_layers=0, num_upsample_stages=1).instantiate(self.config, None, None)
        x = torch.randn(1, 64, 2, 3)
        assert torch.equal(head(x), head.upsample_layers[0](x))

    def test_dropout(self):
        head = HeadConfig(dropout=0.5).instantiate(self.config, None, None)
        x = torch.randn(2, 64)
        assert not torch.equal(head.train()(x), head(x))


def test_modules_say_what_they_are():
    assert "head_dim=16, base=100, normalize_coords=separate" in repr(RotaryPositions(16))
    assert re.search(r"NormMLP\(\s+\(norm\): RMSNorm", repr(NormMLP(8, 16)))
