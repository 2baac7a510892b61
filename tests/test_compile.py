"""torch.compile: one graph, the same numbers and gradients, new sizes without a new graph per size."""

from __future__ import annotations

import pytest
import torch

from reimplementation import ops
from reimplementation.models.deformable import DeformableFeatureAggregation
from tests.ops.inputs import random_attention_inputs, random_inputs

# The whole pipeline but code generation, which would be PyTorch's own and slow.
compile_whole = torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)


@pytest.fixture(autouse=True)
def native_backend(device):
    if device.type not in ops.available_backends(device):
        pytest.skip(f"the {device.type} kernels are not built")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(ops.deformable_aggregation_function, random_inputs), (ops.ms_deform_attn, random_attention_inputs)],
    ids=["deformable_aggregation", "ms_deform_attn"],
)
def test_ops(device, function, inputs):
    compiled = compile_whole(lambda *operands: function(*operands) * 2)
    for sizes in ({}, {"num_queries": 5}, {"num_queries": 9, "batch_size": 3}):
        operands = [
            t.requires_grad_() if t.is_floating_point() else t for t in inputs(**sizes).to(device, torch.float64)
        ]
        leaves = [t for t in operands if t.requires_grad]
        expected, actual = function(*operands) * 2, compiled(*operands)
        torch.testing.assert_close(actual, expected)
        for got, wanted in zip(
            torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("formatted", [True, False])
def test_deformable_feature_aggregation(device, formatted, training):
    torch.manual_seed(0)
    module = DeformableFeatureAggregation(
        32,
        num_cams=2,
        num_levels=2,
        kps_generator={"type": "SparseBox3DKeyPointsGenerator", "num_learnable_pts": 3},
        use_deformable_func=True,
        use_camera_embed=True,
    )
    module.train(training).to(device)
    levels = [torch.randn(1, 2, 32, 8, 12, device=device), torch.randn(1, 2, 32, 4, 6, device=device)]
    maps = ops.feature_maps_format(levels) if formatted else levels
    metas = {
        "projection_mat": torch.randn(1, 2, 4, 4, device=device),
        "image_wh": torch.tensor([[[12.0, 8.0]] * 2], device=device),
    }
    compiled = compile_whole(module)
    for num_queries in (3, 7):
        feature, embed = torch.randn(2, 1, num_queries, 32, device=device)
        anchor = torch.randn(1, num_queries, 11, device=device)
        expected, actual = (call(feature, anchor, embed, maps, metas) for call in (module, compiled))
        torch.testing.assert_close(actual, expected)
        parameters = [p for p in module.parameters() if p.requires_grad]
        for got, wanted in zip(
            torch.autograd.grad(actual.square().sum(), parameters),
            torch.autograd.grad(expected.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted)
