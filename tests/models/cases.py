"""Both modules, small, as tests that hold for either take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.data.rig import nuscenes_like_rig
from reimplementation.models import MSDeformAttn
from reimplementation.models.deformable import DeformableFeatureAggregation

CHANNELS = 32
LEVELS = ((8, 16), (4, 8))


@dataclass(frozen=True)
class ModuleCase:
    """A module: how to build it, operands of a batch, and how a call of it takes them.

    The first `num_leaves` operands are those that a network would backpropagate to. Floating operands have the batch
    as their first dimension.
    """

    name: str
    build: Callable[[], nn.Module]
    operands: Callable[..., list[Tensor]]
    arguments: Callable[..., tuple]
    num_leaves: int

    def trained(self, device: torch.device | str = "cpu", seed: int = 0) -> nn.Module:
        """The module with random parameters, so that locations and weights depend on the query."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            module = self.build()
            for parameter in trainable(module):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return module.to(device)

    def operands_on(self, device: torch.device | str, seed: int = 0, **sizes: int) -> list[Tensor]:
        """The operands on a device, the leaves among them requiring a gradient."""
        operands = [tensor.to(device) for tensor in self.operands(seed, **sizes)]
        for tensor in operands[: self.num_leaves]:
            tensor.requires_grad_()
        return operands

    def call(self, module: nn.Module, operands: list[Tensor]) -> Tensor:
        return module(*self.arguments(*operands))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _aggregation() -> DeformableFeatureAggregation:
    """Without the residual connection, which would hide errors behind the exact query."""
    return DeformableFeatureAggregation(
        CHANNELS,
        num_groups=4,
        num_levels=len(LEVELS),
        num_cams=len(nuscenes_like_rig().cameras),
        kps_generator={
            "type": "SparseBox3DKeyPointsGenerator",
            "num_learnable_pts": 2,
            "fix_scale": ((0.0, 0.0, 0.0), (0.45, 0.0, 0.0), (0.0, -0.45, 0.0)),
        },
        use_deformable_func=True,
        use_camera_embed=True,
        residual_mode=None,
    )


def _aggregation_operands(seed: int = 0, batch_size: int = 2, num_queries: int = 12) -> list[Tensor]:
    """Instance feature and embedding, rows of all maps, boxes within 20 m around the car, cameras, levels."""
    generator = torch.Generator().manual_seed(seed)
    rig = nuscenes_like_rig()
    num_cams = len(rig.cameras)
    feature, embed = torch.randn(2, batch_size, num_queries, CHANNELS, generator=generator)
    maps = [torch.randn(batch_size, num_cams, CHANNELS, *shape, generator=generator) for shape in LEVELS]
    col_feats, *levels = ops.feature_maps_format(maps)
    anchor = torch.randn(batch_size, num_queries, 11, generator=generator)
    anchor[..., :3] = (torch.rand(batch_size, num_queries, 3, generator=generator) - 0.5) * torch.tensor([40, 40, 2])
    projection_mat = torch.from_numpy(rig.projection_mat).float().repeat(batch_size, 1, 1, 1)
    image_wh = torch.from_numpy(rig.image_wh).float().repeat(batch_size, 1, 1)
    return [feature, embed, col_feats, anchor, projection_mat, image_wh, *levels]


def _aggregation_arguments(feature, embed, col_feats, anchor, projection_mat, image_wh, *levels) -> tuple:
    metas = {"projection_mat": projection_mat, "image_wh": image_wh}
    return feature, anchor, embed, [col_feats, *levels], metas


def _attention_operands(seed: int = 0, batch_size: int = 2, num_queries: int = 12) -> list[Tensor]:
    """Queries, the rows of all levels, reference points, shapes and first rows of the levels."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.tensor(LEVELS)
    rows = shapes.prod(-1)
    return [
        torch.randn(batch_size, num_queries, CHANNELS, generator=generator),
        torch.randn(batch_size, int(rows.sum()), CHANNELS, generator=generator),
        torch.rand(batch_size, num_queries, len(LEVELS), 2, generator=generator),
        shapes,
        rows.cumsum(0) - rows,
    ]


def _attention_arguments(query, source, points, shapes, starts) -> tuple:
    return query, points, source, shapes, starts


MODULES = [
    ModuleCase(
        "DeformableFeatureAggregation", _aggregation, _aggregation_operands, _aggregation_arguments, 2 + len(LEVELS)
    ),
    ModuleCase(
        "MSDeformAttn",
        lambda: MSDeformAttn(CHANNELS, n_levels=len(LEVELS), n_heads=4, n_points=2),
        _attention_operands,
        _attention_arguments,
        2,
    ),
]
