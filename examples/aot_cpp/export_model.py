"""Writes what run_package takes: a module as a package, inputs for it, and what it makes of them."""

from __future__ import annotations

import torch
from torch.export import Dim
from torch.utils._pytree import tree_leaves

from reimplementation.models import DeformableFeatureAggregation

CHANNELS, CAMERAS, LEVELS = 64, 2, ((16, 44), (8, 22))


def inputs(batch: int, queries: int) -> dict:
    """Random numbers, as the module takes them; two cameras at the origin that look ahead."""
    projection = torch.tensor([[22.0, 0, 22, 0], [0, 22, 8, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    return {
        "instance_feature": torch.randn(batch, queries, CHANNELS),
        "anchor": torch.randn(batch, queries, 11) + torch.tensor([0, 0, 10.0] + [0] * 8),
        "anchor_embed": torch.randn(batch, queries, CHANNELS),
        "feature_maps": [torch.randn(batch, CAMERAS, CHANNELS, *level) for level in LEVELS],
        "metas": {
            "projection_mat": projection.repeat(batch, CAMERAS, 1, 1),
            "image_wh": torch.tensor([44.0, 16.0]).repeat(batch, CAMERAS, 1),
        },
    }


module = DeformableFeatureAggregation(
    CHANNELS, num_levels=len(LEVELS), num_cams=CAMERAS, use_deformable_func=True, use_camera_embed=True
).eval()
any_batch, any_size = {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
dynamic_shapes = {
    "instance_feature": any_size,
    "anchor": any_size,
    "anchor_embed": any_size,
    "feature_maps": [any_batch] * len(LEVELS),
    "metas": {"projection_mat": any_batch, "image_wh": any_batch},
}
program = torch.export.export(module, (), inputs(2, 50), dynamic_shapes=dynamic_shapes)
torch._inductor.aoti_compile_and_package(
    program,
    package_path="model.pt2",
    # Without this a package that checks the sizes of its inputs refuses a batch of 1.
    inductor_configs={"aot_inductor.check_lowerbound": False},
)
# The tensors in the order of the module's arguments, without the lists and dicts around them.
arguments = inputs(1, 900)
torch.save(tree_leaves(arguments), "inputs.pt")
with torch.no_grad():
    torch.save(module(**arguments), "expected.pt")
