"""Both modules, small, and calls of them: float32, with sizes that a test chooses."""

from __future__ import annotations

import torch

from reimplementation import ops
from reimplementation.models import MSDeformAttn
from reimplementation.models.deformable import DeformableFeatureAggregation

SHAPES = ((8, 12), (4, 6))
CHANNELS, NUM_CAMS = 32, 2


def aggregation_module(*, fused: bool = True, **settings) -> DeformableFeatureAggregation:
    torch.manual_seed(0)
    return DeformableFeatureAggregation(
        CHANNELS,
        num_cams=NUM_CAMS,
        num_levels=len(SHAPES),
        kps_generator={"type": "SparseBox3DKeyPointsGenerator", "num_learnable_pts": 3},
        use_deformable_func=fused,
        use_camera_embed=True,
        residual_mode=None,
        **settings,
    )


def aggregation_call(batch: int, queries: int, *, formatted: bool = False, device="cpu") -> tuple:
    """Arguments of the aggregation: two cameras that look ahead, small boxes before them, some beside the images."""
    generator = torch.Generator().manual_seed(queries)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    levels = [normal(batch, NUM_CAMS, CHANNELS, *shape) for shape in SHAPES]
    projection = torch.tensor([[6.0, 0, 6, 0], [0, 4, 4, 0], [0, 0, 1, 0], [0, 0, 0, 1]], device=device)
    anchor = torch.cat([normal(batch, queries, 2) * 4, normal(batch, queries, 1) + 8, normal(batch, queries, 8)], -1)
    metas = {
        "projection_mat": projection + 0.01 * normal(batch, NUM_CAMS, 4, 4),
        "image_wh": torch.tensor([12.0, 8.0], device=device).repeat(batch, NUM_CAMS, 1),
    }
    feature, embed = normal(2, batch, queries, CHANNELS)
    return feature, anchor, embed, ops.feature_maps_format(levels) if formatted else levels, metas


def attention_module() -> MSDeformAttn:
    torch.manual_seed(0)
    module = MSDeformAttn(CHANNELS, len(SHAPES), n_heads=4, n_points=3)
    torch.nn.init.normal_(module.attention_weights.weight)  # new, it weighs all samples alike
    return module


def attention_call(batch: int, queries: int, device="cpu") -> tuple:
    """Arguments of the attention; some samples fall outside."""
    generator = torch.Generator().manual_seed(queries)
    shapes = torch.tensor(SHAPES)
    rows = shapes.prod(-1)
    arguments = (
        torch.randn(batch, queries, CHANNELS, generator=generator),
        torch.rand(batch, queries, len(SHAPES), 2, generator=generator),
        torch.randn(batch, int(rows.sum()), CHANNELS, generator=generator),
        shapes,
        rows.cumsum(0) - rows,
    )
    return tuple(argument.to(device) for argument in arguments)
