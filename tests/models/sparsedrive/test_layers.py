"""Encoders, attention, feed-forward network and refinement against their formulas in float64."""

import math

import pytest
import torch
from torch import nn

from reimplementation import ops
from reimplementation.models.sparsedrive.anchor_encoder import BoxAnchorEncoder, LineAnchorEncoder
from reimplementation.models.sparsedrive.attention import InstanceAttention, MultiheadAttention
from reimplementation.models.sparsedrive.ffn import AsymmetricFFN
from reimplementation.models.sparsedrive.layers import CoordinateMLP
from reimplementation.models.sparsedrive.refinement import BoxRefinement, LineRefinement

DIMS, HEADS = 16, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with norms, scales and biases that are not 1 and 0."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def mlp(state, prefix, steps, x):
    """Steps by letter: a linear layer, a ReLU, a norm; the index of each is its place."""
    for index, step in enumerate(steps):
        if step == "R":
            x = x.clamp(min=0)
        else:
            x = {"L": linear, "N": norm}[step](state, f"{prefix}.{index}", x)
    return x


def test_box_anchor_encoder():
    encoder = randomised(BoxAnchorEncoder(DIMS))
    anchor, state = randn(2, 3, 11), encoder.state_dict()
    parts = {
        "pos_fc": anchor[..., :3],
        "size_fc": anchor[..., 3:6],
        "yaw_fc": anchor[..., 6:8],
        "vel_fc": anchor[..., 8:],
    }
    expected = torch.cat([mlp(state, name, "LRN" * 4, part) for name, part in parts.items()], dim=-1)
    torch.testing.assert_close(encoder(anchor), expected)
    assert [linear.out_features for linear in encoder.pos_fc if isinstance(linear, nn.Linear)] == [DIMS // 2] * 4


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_blocks_of_an_encoder_are_one_operator_each(dtype, monkeypatch):
    """With the gradients of the layers, which are called where a hook looks on."""
    encoder, called = randomised(BoxAnchorEncoder(DIMS)).float(), []
    original = ops.linear_relu_norm
    monkeypatch.setattr(ops, "linear_relu_norm", lambda *a: called.append(1) or original(*a))
    anchor, grad = torch.randn(2, 3, 11, requires_grad=True), torch.randn(2, 3, DIMS)
    leaves = [anchor, *encoder.parameters()]
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        embedded = encoder(anchor)
    assert len(called) == 16 and embedded.dtype == torch.float32
    for name in ("pos_fc", "size_fc", "yaw_fc", "vel_fc"):
        getattr(encoder, name)[0].register_forward_hook(lambda *_: None)
    expected = encoder(anchor)
    assert len(called) == 16
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)
    for got, wanted in zip(*(torch.autograd.grad(x, leaves, grad) for x in (embedded, expected)), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_line_anchor_encoder():
    encoder = randomised(LineAnchorEncoder(num_points=5, embed_dims=DIMS))
    anchor = randn(2, 3, 10)
    torch.testing.assert_close(encoder(anchor), mlp(encoder.state_dict(), "pos_fc", "LRN" * 2, anchor))


def test_half_precision_tells_near_positions_apart():
    """bfloat16 itself would make the two anchors one: its numbers near 50 are a quarter apart."""
    encoder = CoordinateMLP(nn.Linear(1, 1), nn.ReLU())
    nn.init.ones_(encoder[0].weight)
    nn.init.constant_(encoder[0].bias, -50.0)
    with torch.autocast("cpu", torch.bfloat16):
        near, nearer = encoder(torch.tensor([[50.1], [50.05]])).flatten().tolist()
    assert near == pytest.approx(0.1, abs=1e-3) and nearer == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize("same", ["query, key and value", "query and key", "nothing"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(same, masked):
    ours, theirs = randomised(MultiheadAttention(DIMS, HEADS)), nn.MultiheadAttention(DIMS, HEADS, batch_first=True)
    theirs.double().load_state_dict(ours.state_dict())
    query = randn(2, 5, DIMS)
    key = query if same != "nothing" else randn(2, 7, DIMS)
    value = query if same.startswith("query, key") else randn(2, key.shape[1], DIMS)
    allowed = None
    if masked:
        allowed = torch.rand(5, key.shape[1]) < 0.5
        allowed[:, 0] = True
    expected, _ = theirs(query, key, value, attn_mask=None if allowed is None else ~allowed)
    torch.testing.assert_close(ours(query, key, value, allowed), expected)
    loops = torch.zeros_like(query)
    state = ours.state_dict()
    weights, biases = state["in_proj_weight"].split(DIMS), state["in_proj_bias"].split(DIMS)
    q, k, v = (x @ weight.T + bias for x, weight, bias in zip((query, key, value), weights, biases))
    for head in range(HEADS):
        part = slice(head * DIMS // HEADS, (head + 1) * DIMS // HEADS)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(DIMS // HEADS)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        loops[..., part] = scores.softmax(-1) @ v[..., part]
    torch.testing.assert_close(ours(query, key, value, allowed), linear(state, "out_proj", loops))


def test_attention_adds_its_residual():
    attention = randomised(InstanceAttention(DIMS, HEADS))
    residual, query = randn(2, 5, DIMS), randn(2, 5, DIMS)
    expected = residual + attention.attn(query, query, query)
    torch.testing.assert_close(attention(residual, query, query, query), expected)


def test_attention_drops_in_training_alone():
    attention = InstanceAttention(DIMS, HEADS, dropout=0.5)
    query = torch.randn(1, 50, DIMS)
    kept = attention.eval()(query, query, query, query)
    assert torch.equal(attention(query, query, query, query), kept)
    assert not torch.equal(attention.train()(query, query, query, query), kept)


def test_ffn():
    ffn = randomised(AsymmetricFFN(2 * DIMS, DIMS, feedforward_dims=24))
    x, state = randn(2, 5, 2 * DIMS), ffn.state_dict()
    normalised = norm(state, "pre_norm", x)
    hidden = linear(state, "layers.0.0", normalised).clamp(min=0)
    torch.testing.assert_close(ffn(x), linear(state, "identity_fc", normalised) + linear(state, "layers.1", hidden))


@pytest.mark.parametrize("interval", [0.5, torch.tensor([0.5, 0.25], dtype=torch.float64)])
def test_box_refinement(interval):
    refinement = randomised(BoxRefinement(DIMS, num_classes=3))
    state = refinement.state_dict()
    feature, embed, anchor = randn(2, 5, DIMS), randn(2, 5, DIMS), randn(2, 5, 11)
    refined, logits, quality = refinement(feature, anchor, embed, interval)

    change = mlp(state, "layers", "LRLRNLRLRNL", feature + embed) * state["layers.11.scale"]
    seconds = torch.as_tensor(interval, dtype=torch.float64).expand(2)
    expected = anchor.clone()
    for sample in range(2):
        expected[sample, :, :8] += change[sample, :, :8]
        expected[sample, :, 8:] += change[sample, :, 8:] / seconds[sample]
    torch.testing.assert_close(refined, expected)
    torch.testing.assert_close(logits, mlp(state, "cls_layers", "LRNLRNL", feature))
    torch.testing.assert_close(quality, mlp(state, "quality_layers", "LRNLRNL", feature + embed))
    assert refinement(feature, anchor, embed, interval, classify=False)[1:] == (None, None)


def test_line_refinement():
    refinement = randomised(LineRefinement(DIMS, anchor_dims=6, num_classes=3))
    state = refinement.state_dict()
    feature, embed, anchor = randn(2, 5, DIMS), randn(2, 5, DIMS), randn(2, 5, 6)
    refined, logits, quality = refinement(feature, anchor, embed, 0.5)
    change = mlp(state, "layers", "LRLRNLRLRNL", feature + embed) * state["layers.11.scale"]
    torch.testing.assert_close(refined, anchor + change)
    torch.testing.assert_close(logits, mlp(state, "cls_layers", "LRNLRNL", feature))
    assert quality is None


def test_scores_start_low():
    refinement = BoxRefinement(DIMS, num_classes=3)
    assert refinement.cls_layers[-1].bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    assert refinement.cls_layers[-1].bias[0].item() == pytest.approx(-4.595, abs=1e-3)
