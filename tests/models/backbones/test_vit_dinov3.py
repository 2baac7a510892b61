"""DINOv3's weights under our names compute what DINOv3's formulas do."""

from __future__ import annotations

import pytest
import torch

from reimplementation.models.backbones.vit import dinov3_config, from_dinov3

from . import vit_formulas as formulas

HIDDEN, FFN = 32, 48


def state_dict(swiglu: bool, qkv_bias: bool = True, depth: int = 2) -> dict[str, torch.Tensor]:
    """Random weights with DINOv3's names."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    state = {
        "cls_token": random(1, 1, HIDDEN),
        "storage_tokens": random(1, 4, HIDDEN),
        "mask_token": random(1, HIDDEN),
        "patch_embed.proj.weight": random(HIDDEN, 3, 16, 16),
        "patch_embed.proj.bias": random(HIDDEN),
        "rope_embed.periods": 100 ** (torch.arange(4) / 4),
        "norm.weight": random(HIDDEN),
        "norm.bias": random(HIDDEN),
        "local_cls_norm.weight": random(HIDDEN),
        "local_cls_norm.bias": random(HIDDEN),
    }
    for index in range(depth):
        block = {f"{norm}.{kind}": random(HIDDEN) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        layers = {"attn.qkv": (3 * HIDDEN, HIDDEN), "attn.proj": (HIDDEN, HIDDEN)}
        if swiglu:
            layers |= {"mlp.w1": (FFN, HIDDEN), "mlp.w2": (FFN, HIDDEN), "mlp.w3": (HIDDEN, FFN)}
        else:
            layers |= {"mlp.fc1": (FFN, HIDDEN), "mlp.fc2": (HIDDEN, FFN)}
        for name, shape in layers.items():
            block |= {f"{name}.weight": random(*shape), f"{name}.bias": random(shape[0])}
        if qkv_bias:
            block["attn.qkv.bias_mask"] = torch.ones(3, HIDDEN).index_fill(0, torch.tensor(1), 0).flatten()
        else:
            del block["attn.qkv.bias"]
        block |= {"ls1.gamma": random(HIDDEN), "ls2.gamma": random(HIDDEN)}
        state |= {f"blocks.{index}.{name}": tensor for name, tensor in block.items()}
    return state


@pytest.mark.parametrize(
    ("name", "swiglu", "qkv_bias"), [("vits16", False, True), ("vits16plus", True, True), ("vit7b16", True, False)]
)
def test_formula(name, swiglu, qkv_bias):
    small = {"depth": 2, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": 2}
    config = dinov3_config(name, (48, 32)).replace(**small)
    state = state_dict(swiglu, qkv_bias)
    model = config.instantiate(dtype=torch.float64).eval()
    model.load_state_dict(from_dinov3(state, config))
    images = torch.randn(2, 3, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(images)
    expected = formulas.dinov3(state, images, num_heads=2)
    torch.testing.assert_close(found.dense_features, expected, rtol=0, atol=1e-5)
    assert found.num_cls_tokens == 1 and found.num_register_tokens == 4


def test_the_state_dict_stays_as_it_is():
    state = state_dict(swiglu=True)
    before = {name: tensor.clone() for name, tensor in state.items()}
    from_dinov3(state, dinov3_config("vits16plus"))
    assert list(state) == list(before) and all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("vits16", 21), ("vits16plus", 29), ("vitb16", 86), ("vitl16", 300), ("vith16plus", 840), ("vit7b16", 6716)],
)
def test_sizes(name, millions):
    """Near the numbers of parameters in DINOv3's README, which are rounded."""
    model = dinov3_config(name).instantiate(device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)


def test_an_unknown_model():
    with pytest.raises(ValueError, match="name must be one of vits16, .* got 'vitg14'"):
        dinov3_config("vitg14")


def test_a_norm_of_its_own_for_cls_tokens():
    state = state_dict(swiglu=False) | {"cls_norm.weight": torch.ones(HIDDEN)}
    with pytest.raises(ValueError, match="a norm of their own for cls tokens"):
        from_dinov3(state, dinov3_config("vits16"))
