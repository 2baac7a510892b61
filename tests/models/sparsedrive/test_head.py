"""The heads against the decoder written out sample by sample, with PyTorch's own attention, in float64."""

import dataclasses

import pytest
import torch
from torch import nn

from reimplementation import ops
from reimplementation.models.sparsedrive.config import BankConfig
from reimplementation.models.sparsedrive.head import box_head, line_head, operations
from tests.models.sparsedrive.small import CONFIG, MAP_HEAD, NUM_CAMS, NUM_LINES, frame, pose

REMEMBERING = BankConfig(num_anchors=NUM_LINES, num_temp_instances=2)  # lines do in SparseDrive's second stage
LEVELS = ((8, 12), (4, 6), (2, 3), (1, 2))


def scene(batch_size: int, times: list[float], seed: int = 0):
    """Feature maps and metas of a batch, in float64."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(batch_size, NUM_CAMS, 32, *shape, generator=generator).double() for shape in LEVELS]
    _, metas = frame(batch_size)
    metas = {name: tensor.double() for name, tensor in metas.items()}
    metas["timestamp"] = torch.tensor(times, dtype=torch.float64)
    metas["T_global"] = torch.stack([pose(time) for time in times])
    return maps, metas


def randomised(head: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    head = head.double().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        head.instance_bank.instance_feature.normal_()  # zero features would hide much
    return head


def attention(layer, query, key, value):
    """PyTorch's module, with the parameters of one of ours."""
    dims = query.shape[-1]
    module = nn.MultiheadAttention(dims, CONFIG.num_heads, batch_first=True).double().eval()
    module.load_state_dict(layer.attn.state_dict())
    return module(query, key, value)[0]


def decoder(head, maps, metas, recalled=None, interval=0.5):
    """One sample's predictions, layer by layer; ``recalled``: features and anchors (k, …) of the last frame."""
    decoupled = hasattr(head, "fc_before")
    feature, anchor = head.instance_bank.instance_feature[None], head.instance_bank.anchor[None]
    embed = head.anchor_encoder(anchor)
    recalled_embed = None if recalled is None else head.anchor_encoder(recalled[1][None])
    predictions, count = [], head.instance_bank.config.num_anchors
    for operation, layer in zip(head.operations, head.layers):
        if operation in ("gnn", "temp_gnn"):
            query = torch.cat([feature, embed], -1) if decoupled else feature + embed
            residual = query if decoupled else feature
            if operation == "gnn":
                key, value = query, head.fc_before(feature) if decoupled else feature
            elif recalled is None:
                key, value = query, residual
            else:
                old = recalled[0][None]
                key = torch.cat([old, recalled_embed], -1) if decoupled else old + recalled_embed
                value = head.fc_before(old) if decoupled else old
            feature = residual + attention(layer, query, key, value)
            feature = head.fc_after(feature) if decoupled else feature
        elif operation == "deformable":
            feature = layer(feature, anchor, embed, maps, metas)
        elif operation in ("ffn", "norm"):
            feature = layer(feature)
        else:
            anchor, logits, quality = layer(feature, anchor, embed, interval)
            predictions.append((logits, anchor, quality))
            if recalled is not None and len(predictions) == 1:
                best = sorted(range(count), key=lambda i: -logits[0, i].max().item())[: count - len(recalled[0])]
                feature = torch.cat([recalled[0], feature[0, best]])[None]
                anchor = torch.cat([recalled[1], anchor[0, best]])[None]
            embed = head.anchor_encoder(anchor)
            if recalled is not None and len(predictions) > 1:
                recalled_embed = embed[:, : len(recalled[0])]
    return predictions, feature


def assert_layers(outputs, expected, sample=0):
    for depth, parts in enumerate(expected):
        for name, wanted in zip(("classification", "prediction", "quality"), parts):
            got = outputs[name][depth]
            assert (got is None) == (wanted is None)
            if got is not None:
                torch.testing.assert_close(got[sample], wanted[0], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("make", [box_head, line_head])
def test_a_frame_alone(make):
    head = randomised(make(CONFIG))
    maps, metas = scene(1, [0.0])
    outputs, _ = head(ops.feature_maps_format(maps), metas)
    assert_layers(outputs, decoder(head, maps, metas)[0])


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [
        lambda: box_head(CONFIG),
        lambda: box_head(dataclasses.replace(CONFIG, family="sparse4d", map=None)),
        lambda: line_head(dataclasses.replace(CONFIG, map=dataclasses.replace(MAP_HEAD, bank=REMEMBERING))),
    ],
    ids=["boxes", "boxes of sparse4d", "lines"],
)
def test_three_frames(make):
    """The second sample's third frame comes after a gap: it starts anew in the midst of the batch."""
    head = randomised(make())
    state = None
    for index, times in enumerate([[0.0, 0.0], [0.5, 0.75], [1.0, 9.0]]):
        maps, metas = scene(2, times, seed=index)
        last = state
        outputs, state = head(ops.feature_maps_format(maps), metas, state)
        for sample in range(2):
            recalled, interval = None, 0.5
            if last is not None and not (index == 2 and sample == 1):
                moved = head.instance_bank.recall(last, metas["timestamp"], metas["T_global"])
                recalled = last.feature[sample], moved.anchor[sample]
                interval = (metas["timestamp"] - last.timestamp)[sample].item()
            one = {name: tensor[sample : sample + 1] for name, tensor in metas.items()}
            expected, feature = decoder(head, [level[sample : sample + 1] for level in maps], one, recalled, interval)
            assert_layers(outputs, expected, sample)
            kept = {tuple(row) for row in state.feature[sample].tolist()}
            rows = [tuple(row) for row in feature[0].tolist()]
            assert all(min(distance(row, other) for other in rows) < 1e-9 for row in kept)


def distance(row, other):
    return max(abs(a - b) for a, b in zip(row, other))


def test_operations():
    """SparseDrive's order: 39 layers for boxes, 41 for lines."""
    boxes, lines = operations(6, 1, first_gnn=False), operations(6, 1, first_gnn=True)
    assert (len(boxes), len(lines)) == (39, 41)
    assert boxes[:5] == ["deformable", "ffn", "norm", "refine", "temp_gnn"]
    assert boxes[4::7] == ["temp_gnn"] * 5 and lines[6::7] == ["temp_gnn"] * 5
    assert boxes[-1] == lines[-1] == "refine"


@torch.no_grad()
def test_layers_that_nobody_reads():
    head = randomised(box_head(CONFIG))
    maps, metas = scene(1, [0.0])
    rows = ops.feature_maps_format(maps)
    outputs, state = head(rows, metas)
    later = {**metas, "timestamp": metas["timestamp"] + 0.5}
    every, _ = head(rows, later, state)
    few, _ = head(rows, later, state, every_layer=False)
    assert [logits is None for logits in few["classification"]] == [False, True, False]  # the first chooses who stays
    assert [quality is None for quality in few["quality"]] == [False, True, False]
    for depth in (0, 2):
        assert torch.equal(few["classification"][depth], every["classification"][depth])
    for got, wanted in zip(few["prediction"], every["prediction"]):
        assert torch.equal(got, wanted)


def test_no_map_head_to_build():
    with pytest.raises(ValueError, match="no map head"):
        line_head(dataclasses.replace(CONFIG, map=None))
