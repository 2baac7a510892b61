"""The whole ViT against its formulas, its names and counts, its masks and its switches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from reimplementation.models.backbones import vit as package
from reimplementation.models.backbones.vit import (
    AttentivePoolHeadConfig,
    HeadConfig,
    TransposedConv2dHeadConfig,
    UpsampleHeadConfig,
    ViT,
    ViTConfig,
    ViTFeatures,
)

from . import vit_formulas as formulas

ANGLE = 1e-5  # rotary angles, of up to 2 pi in float32, are off by half a unit of 4e-7; layers multiply that
EXACT = 1e-10  # float64
OPTIONS = {
    "default": {},
    "tokens": {"num_register_tokens": 4, "num_cls_tokens": 1, "layer_scale": 0.1, "qk_normalization": True},
    "layers": {"depth": 3, "rope_base": 30.0},
    "longer side": {"rope_normalize_coords": "max"},
    "shorter side": {"rope_normalize_coords": "min", "num_cls_tokens": 1},
    "fourier": {"pos_enc": "fourier", "activation": "swiglu"},
    "learnable": {
        "pos_enc": "learnable",
        "norm_type": "layernorm",
        "patch_embed_normalization": True,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "layernorm": {"norm_type": "layernorm", "qk_normalization": True, "layer_scale": 0.5, "pos_enc": "none"},
    "patch norm": {"patch_embed_normalization": True, "pos_enc": "none"},
    "gpt-oss": {"activation": "openswiglu", "glu_limit": 1.0, "glu_extra_bias": 1.0, "pos_enc": "none"},
    "volume": {"in_channels": 2, "patch_size": (2, 4, 8), "img_size": (4, 12, 16), "pos_enc": "fourier"},
    **{name: {"activation": name, "pos_enc": "none"} for name in ("relu", "silu", "gelu", "reglu", "geglu")},
}
STATE_DICTS = {  # the titles in vit_state_dicts.txt
    "default (srelu, rope, rmsnorm)": OPTIONS["default"],
    "num_register_tokens=4, num_cls_tokens=1, layer_scale=0.1, qk_normalization=True": OPTIONS["tokens"],
    "activation=swiglu, pos_enc=fourier": OPTIONS["fourier"],
    "pos_enc=learnable, norm_type=layernorm, patch_embed_normalization=True, no biases": OPTIONS["learnable"],
    "heads: cls=Head(out 10), pool=AttentivePoolHead(out 10), up=UpsampleHead(out 3), conv=TransposedConv2dHead(out 5)": {  # noqa: E501
        "heads": {
            "cls": HeadConfig(out_features=10),
            "pool": AttentivePoolHeadConfig(out_features=10),
            "up": UpsampleHeadConfig(out_features=3),
            "conv": TransposedConv2dHeadConfig(out_features=5),
        }
    },
}
BASE = {"in_channels": 3, "patch_size": (16, 16), "img_size": (224, 224), "depth": 12, "hidden_size": 768}
BASE |= {"ffn_hidden_size": 3072, "num_attention_heads": 12}


def model(**options) -> ViT:
    torch.manual_seed(0)
    return formulas.fill(formulas.config(**options).instantiate()).eval()


def images(config: ViTConfig, batch: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, config.in_channels, *config.img_size, dtype=torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
def test_formula(name):
    vit = model(**OPTIONS[name])
    x = images(vit.config)
    expected = formulas.vit(vit.config, vit.state_dict(), x)
    tolerance = ANGLE if vit.config.pos_enc == "rope" else EXACT
    with torch.no_grad():
        torch.testing.assert_close(vit(x).dense_features, expected, rtol=0, atol=tolerance)


def test_a_fresh_layer_is_the_identity():
    vit = formulas.config(depth=2, num_cls_tokens=1).instantiate()
    x = images(vit.config)
    with torch.no_grad():
        tokens = torch.cat([vit.cls_tokens.expand(2, -1, -1), vit.stem(x)], 1)
        assert torch.equal(vit(x, output_norm=False).dense_features, tokens)


@pytest.mark.parametrize("title", STATE_DICTS)
def test_names_and_shapes(title):
    text = (Path(__file__).parent / "vit_state_dicts.txt").read_text()
    section = text.split(f"## {title}\n")[1].split("##")[0]
    expected = {
        name: tuple(int(side) for side in re.findall(r"\d+", shape))
        for name, shape in re.findall(r"^(\S+) (\(.*\))$", section, re.MULTILINE)
    }
    state = formulas.config(**STATE_DICTS[title]).instantiate(device="meta").state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert [name for name in state if not name.startswith("heads.")] == [
        name for name in expected if not name.startswith("heads.")
    ]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 85_627_392),
        ({"activation": "swiglu"}, 113_975_808),
        ({"pos_enc": "fourier"}, 86_218_752),
        (
            {"attention_bias": False, "mlp_bias": False, "layer_scale": 0.1, "num_register_tokens": 4},
            85_565_952,
        ),
    ],
)
def test_parameters_of_vit_b(options, count):
    assert sum(p.numel() for p in ViT(ViTConfig(**BASE, **options), device="meta").parameters()) == count


class TestDtypes:
    def test_weights_are_bfloat16_by_default_and_positions_float32(self):
        vit = ViTConfig(**{**BASE, "depth": 1}).instantiate(device="meta")
        assert {p.dtype for p in vit.parameters()} == {torch.bfloat16}
        assert vit.rope.periods.dtype == vit.prepare_rope((14, 14)).dtype == torch.float32

    def test_positions_stay_float32_when_the_model_is_cast(self):
        vit = model()
        periods = vit.rope.periods.clone()
        assert torch.equal(vit.to(torch.bfloat16).rope.periods, periods)

    def test_bfloat16_is_near_float64(self):
        vit = model(num_register_tokens=2)
        x = images(vit.config)
        with torch.no_grad():
            expected = vit(x).dense_features
            found = vit.to(torch.bfloat16)(x.float()).dense_features
        assert found.dtype == torch.bfloat16
        error = (found.double() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(torch.bfloat16).eps

    def test_autocast(self):
        vit = model(dtype=torch.float32, layer_scale=0.1, num_cls_tokens=1, qk_normalization=True).train()
        x = images(vit.config).float()
        expected = vit(x).dense_features
        with torch.autocast("cpu", torch.bfloat16):
            found = vit(x).dense_features
        found.square().mean().backward()
        assert (found - expected).norm() / expected.norm() < 4 * torch.finfo(torch.bfloat16).eps
        assert all(p.grad.isfinite().all() for p in vit.parameters() if p.numel())


class TestInput:
    def test_other_sizes(self):
        vit = model()
        x = images(vit.config.replace(img_size=(40, 128)))
        with torch.no_grad():
            found = vit(x)
        assert found.tokenized_size == (5, 16) and found.visual_tokens_as_grid.shape == (2, 5, 16, 64)
        expected = formulas.vit(vit.config, vit.state_dict(), x)
        torch.testing.assert_close(found.dense_features, expected, rtol=0, atol=ANGLE)

    @pytest.mark.parametrize("size", [(70, 64), (64, 65), (4, 8), (0, 8)])
    def test_a_side_that_is_no_multiple_of_the_patch(self, size):
        with pytest.raises(ValueError, match=re.escape(f"(8, 8); got {size}: pad, crop or resize it")):
            model()(torch.zeros(1, 3, *size))

    @pytest.mark.parametrize("shape", [(3, 64, 96), (1, 4, 64, 96), (1, 3, 8, 64, 96)])
    def test_another_shape(self, shape):
        with pytest.raises(ValueError, match=re.escape(f"must be (B, C, H, W) with C=3; got {shape}")):
            model()(torch.zeros(shape))

    def test_integers(self):
        with pytest.raises(TypeError, match="floating point; got torch.uint8"):
            model()(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))


class TestMask:
    def test_formula(self):
        vit = model(num_cls_tokens=1, num_register_tokens=2)
        x = images(vit.config, batch=3)
        mask = vit.create_mask(x, 0.4, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found = vit(x, mask)
        assert found.visual_tokens.shape == (3, 38, 64)  # round(96 * 0.4)
        expected = formulas.vit(vit.config, vit.state_dict(), x, mask)
        torch.testing.assert_close(found.dense_features, expected, rtol=0, atol=ANGLE)
        with pytest.raises(ValueError, match=r"a grid of \(8, 12\) has 96 tokens; got 38"):
            found.visual_tokens_as_grid  # noqa: B018

    def test_samples_keep_equally_many(self):
        vit = model()
        mask = torch.ones(2, 96, dtype=torch.bool)
        mask[0, 5] = False
        with pytest.raises(ValueError, match=r"equally many patches .* got \[95, 96\]"):
            vit(images(vit.config), mask)


class TestAttentionWeights:
    @pytest.mark.parametrize("name", ["default", "tokens"])
    def test_formula(self, name):
        vit = model(**OPTIONS[name])
        config, x = vit.config, images(vit.config)
        weights = vit.forward_attention_weights(x)
        assert list(weights) == ["layer_0"]
        state = {name: tensor.double() for name, tensor in vit.state_dict().items()}
        tokens = torch.cat([vit.cls_tokens.expand(2, -1, -1), vit.register_tokens.expand(2, -1, -1), vit.stem(x)], 1)
        angles = formulas.rope_angles(formulas.places((8, 12)), 100.0, 16)[None]
        attention = formulas.below(state, "blocks.0.self_attention.")
        _, expected = formulas.self_attention_and_weights(config, attention, tokens, angles)
        torch.testing.assert_close(weights["layer_0"], expected, rtol=0, atol=ANGLE)

    def test_it_is_what_the_forward_uses(self):
        vit = model(depth=2, num_cls_tokens=1)
        x = images(vit.config)
        attention = vit.blocks[1].self_attention
        seen = {}
        hook = attention.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0], rope=inputs[1]))
        with torch.no_grad():
            vit(x)
        hook.remove()
        expected = attention.forward_weights(seen["tokens"], seen["rope"])
        torch.testing.assert_close(vit.forward_attention_weights(x)["layer_1"], expected)


class TestFreezing:
    def test_from_the_settings(self):
        vit = formulas.config(depth=2, mlp_requires_grad=False, self_attention_requires_grad=False).instantiate()
        trained = {name for name, p in vit.named_parameters() if p.requires_grad}
        assert trained == {"stem.patch.weight", "stem.patch.bias", "output_norm.weight"}

    def test_the_backbone(self):
        vit = formulas.config(num_cls_tokens=1, num_register_tokens=1, heads={"a": HeadConfig()}).instantiate()
        vit.backbone_requires_grad_(False)
        assert {name for name, p in vit.named_parameters() if p.requires_grad} == {
            "heads.a.proj.weight",
            "heads.a.proj.bias",
        }
        vit.backbone_requires_grad_(True)
        assert all(p.requires_grad for p in vit.parameters())

    def test_no_tokens_are_never_trained(self):
        vit = formulas.config().instantiate()
        assert not vit.backbone_requires_grad_(True).cls_tokens.requires_grad


def test_checkpointing_computes_the_same():
    vit = model(depth=2, hidden_dropout=0.2, attention_dropout=0.2).train()
    kept = ViT(vit.config.replace(activation_checkpointing=True))
    kept.load_state_dict(vit.state_dict())
    x = images(vit.config)
    outputs = []
    for each in (vit, kept):
        torch.manual_seed(2)
        outputs.append(each(x).dense_features)
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for one, other in zip(vit.parameters(), kept.parameters()):
        assert one.numel() == 0 or torch.equal(one.grad, other.grad)


def test_checkpointing_keeps_less():
    def bytes_kept(vit: ViT) -> int:
        kept = 0

        def pack(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            vit.train()(images(vit.config))
        return kept

    assert bytes_kept(model(depth=4, activation_checkpointing=True)) < bytes_kept(model(depth=4)) / 2


class TestFeatures:
    features = ViTFeatures(torch.arange(2 * 9 * 4.0).view(2, 9, 4), 2, 1, (2, 3))

    def test_views(self):
        cls_tokens, register_tokens, visual_tokens = self.features
        assert torch.equal(cls_tokens, self.features.dense_features[:, :1])
        assert torch.equal(register_tokens, self.features.dense_features[:, 1:3])
        assert torch.equal(visual_tokens, self.features.dense_features[:, 3:])
        assert torch.equal(self.features.visual_tokens_as_grid[:, 1, 2], self.features.dense_features[:, 8])

    def test_joined(self):
        joined = ViTFeatures.from_separate_features(*self.features, (2, 3))
        assert torch.equal(joined.dense_features, self.features.dense_features)
        assert (joined.num_cls_tokens, joined.num_register_tokens) == (1, 2)

    def test_apply(self):
        doubled = self.features.apply(lambda tokens: 2 * tokens)
        assert torch.equal(doubled.visual_tokens, 2 * self.features.visual_tokens)
        assert doubled.tokenized_size == (2, 3)

    def test_a_volume(self):
        features = ViTFeatures(torch.zeros(1, 24, 4), 0, 0, (2, 3, 4))
        assert features.visual_tokens_as_grid.shape == (1, 2, 3, 4, 4)

    def test_no_grid(self):
        with pytest.raises(ValueError, match="none is known"):
            ViTFeatures(torch.zeros(1, 24, 4), 0, 0).visual_tokens_as_grid  # noqa: B018


def test_get_block():
    vit = formulas.config(depth=2).instantiate()
    assert vit.get_block(1) is vit.get_block(-1) is vit.blocks[1]
    with pytest.raises(IndexError):
        vit.get_block(2)


def test_get_head():
    vit = formulas.config(heads={"a": HeadConfig()}).instantiate()
    assert vit.get_head("a") is vit.heads["a"]
    with pytest.raises(ValueError, match="the model has the heads a; got 'b'"):
        vit.get_head("b")


def test_public_names():
    assert sorted(package.__all__, key=str) == sorted(set(package.__all__)) and all(
        hasattr(package, name) for name in package.__all__
    )
