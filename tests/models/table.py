"""The table of modules: one row a module, and every test that holds for all of them runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reimplementation import ops
from reimplementation.data.rig import Rig, nuscenes_like_rig
from reimplementation.models import MSDeformAttn
from reimplementation.models.deformable import DeformableFeatureAggregation

CHANNELS = 32
LEVELS = ((8, 16), (4, 8))
NUM_CAMS = 2


@dataclass(frozen=True)
class ModuleCase:
    """A row: how to build a module, operands of a batch, and how a call of it takes them.

    ``operands(seed, batch_size=2, num_queries=12)`` are float32 on the CPU. The first ``num_leaves`` are those that a
    network would backpropagate to. Floating operands have the batch as their first dimension.
    """

    name: str
    op: str  # the op that the module hands its key points or locations to, by its function's name
    build: Callable[..., nn.Module]
    operands: Callable[..., list[Tensor]]
    arguments: Callable[..., tuple]
    num_leaves: int

    def __str__(self) -> str:
        return self.name

    def trained(self, device: torch.device | str = "cpu", seed: int = 0, **settings) -> nn.Module:
        """The module with random parameters, so that locations and weights depend on the query."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            module = self.build(**settings)
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


def _aggregation(**settings) -> DeformableFeatureAggregation:
    """Without the residual connection, which would hide errors behind the exact query."""
    generator = {
        "type": "SparseBox3DKeyPointsGenerator",
        "num_learnable_pts": 2,
        "fix_scale": ((0.0, 0.0, 0.0), (0.45, 0.0, 0.0), (0.0, -0.45, 0.0)),
    }
    defaults = {"use_deformable_func": True, "use_camera_embed": True, "residual_mode": None}
    return DeformableFeatureAggregation(
        CHANNELS,
        num_groups=4,
        num_levels=len(LEVELS),
        num_cams=NUM_CAMS,
        **{"kps_generator": generator, **defaults, **settings},
    )


def _operands_with_maps(seed: int = 0, batch_size: int = 2, num_queries: int = 12) -> list[Tensor]:
    """Instance feature and embedding, boxes before two cameras of a car, a map a level, and the cameras."""
    generator = torch.Generator().manual_seed(seed)
    rig = Rig(nuscenes_like_rig().cameras[:NUM_CAMS])
    feature, embed = torch.randn(2, batch_size, num_queries, CHANNELS, generator=generator)
    maps = [torch.randn(batch_size, NUM_CAMS, CHANNELS, *shape, generator=generator) for shape in LEVELS]
    anchor = torch.randn(batch_size, num_queries, 11, generator=generator)
    place = torch.rand(batch_size, num_queries, 3, generator=generator) - torch.tensor([0.5, 0.0, 0.5])
    anchor[..., :3] = place * torch.tensor([40, 25, 2])  # metres; the first camera looks along y
    projection_mat = torch.from_numpy(rig.projection_mat).float().repeat(batch_size, 1, 1, 1)
    image_wh = torch.from_numpy(rig.image_wh).float().repeat(batch_size, 1, 1)
    return [feature, embed, anchor, *maps, projection_mat, image_wh]


def _arguments_with_maps(feature, embed, anchor, *others) -> tuple:
    *maps, projection_mat, image_wh = others
    return feature, anchor, embed, maps, {"projection_mat": projection_mat, "image_wh": image_wh}


def _operands_with_rows(seed: int = 0, **sizes: int) -> list[Tensor]:
    """The same with the maps as rows, and the shapes and first rows of their levels at the end."""
    feature, embed, anchor, *maps, projection_mat, image_wh = _operands_with_maps(seed, **sizes)
    rows, *levels = ops.feature_maps_format(maps)
    return [feature, embed, anchor, rows, projection_mat, image_wh, *levels]


def _arguments_with_rows(feature, embed, anchor, rows, projection_mat, image_wh, *levels) -> tuple:
    return feature, anchor, embed, [rows, *levels], {"projection_mat": projection_mat, "image_wh": image_wh}


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


AGGREGATION = ModuleCase(
    "DeformableFeatureAggregation",
    "deformable_feature_aggregation",
    _aggregation,
    _operands_with_rows,
    _arguments_with_rows,
    num_leaves=4,
)
AGGREGATION_OF_MAPS = replace(
    AGGREGATION,
    name="DeformableFeatureAggregation-of-maps",
    operands=_operands_with_maps,
    arguments=_arguments_with_maps,
    num_leaves=3 + len(LEVELS),
)
ATTENTION = ModuleCase(
    "MSDeformAttn",
    "ms_deform_attn_from_offsets",
    lambda: MSDeformAttn(CHANNELS, n_levels=len(LEVELS), n_heads=4, n_points=2),
    _attention_operands,
    _attention_arguments,
    num_leaves=2,
)

MODULES = (AGGREGATION, ATTENTION)
CALLS = (AGGREGATION, AGGREGATION_OF_MAPS, ATTENTION)  # every form of arguments, as what traces a call sees it
