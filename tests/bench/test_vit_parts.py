"""The parts of a ViT that its benchmark times alone."""

from __future__ import annotations

import pytest
import torch

from reimplementation.bench import vit
from reimplementation.bench.vit_parts import PARTS, part_candidate
from reimplementation.models.backbones.vit import ViTConfig

CPU = torch.device("cpu")
CONFIG = ViTConfig(3, (8, 8), (16, 24), 2, 16, 32, 2, num_cls_tokens=1, activation="swiglu", dtype=torch.float32)
TOKENS, CHANNELS, FFN = 7, 16, 32


@pytest.mark.parametrize("part", PARTS[1:])
def test_a_part_multiplies_what_its_products_do(part):
    """Operations are those of the linear layers, and of attention where there is one; a GLU's first layer is twice."""
    mlp = 2 * TOKENS * 3 * CHANNELS * FFN
    attention = 2 * TOKENS * 4 * CHANNELS**2 + 4 * TOKENS**2 * CHANNELS
    wanted = mlp if part.startswith("mlp") else mlp + attention
    candidate = part_candidate("vit", CONFIG, part)
    assert vit.count_flops(candidate, (16, 24)) == wanted
    assert vit.count_flops(candidate, (16, 24), "backward") >= 2 * wanted  # the input has a gradient too


def test_a_layer_is_the_models():
    """With the positions that the model hands it."""
    torch.manual_seed(0)
    layer = part_candidate("vit", CONFIG, "layer").build((16, 24)).eval()
    torch.nn.init.normal_(layer.layer.self_attention.out_proj.weight)
    model = CONFIG.replace(depth=1).instantiate().eval()
    model.blocks[0].load_state_dict(layer.layer.state_dict())
    tokens, rope, _ = model._embed(torch.randn(2, 3, 16, 24), None, None)
    assert torch.equal(layer(tokens), model.blocks[0](tokens, rope))


@pytest.mark.parametrize("passed", ["forward", "forward_backward"])
def test_a_part_is_timed(passed):
    candidate = part_candidate("vit", CONFIG, "mlp")
    figure = vit.measure_candidate(candidate, (16, 24), 3, passed, "eager", CPU, repeats=1)
    assert figure.config == "vit mlp" and figure.timing.median_us > 0
    parameters = CHANNELS + (CHANNELS + 1) * 2 * FFN + (FFN + 1) * CHANNELS
    least = 4 * (parameters + 2 * 3 * TOKENS * CHANNELS)
    assert figure.least_bytes == (least if passed == "forward" else None)


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="the mode graph replays a CUDA graph, and needs a GPU; got cpu"):
        vit.measure_candidate(vit.vit_candidate("vit", CONFIG), (16, 24), 1, "forward", "graph", CPU, 1)
