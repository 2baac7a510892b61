"""Inputs of the sizes that people run, for benchmarks and tests.

Deformable aggregation as in SparseDrive: its cameras, pyramid and queries; the op alone, and its whole module.
Multi-scale deformable attention as in Deformable DETR's encoder and decoder; the op alone, and its layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reimplementation import ops
from reimplementation.bench.key_points import GEOMETRIES, key_points
from reimplementation.data.rig import Rig, nuscenes_like_rig
from reimplementation.data.scene import FIXED_KEY_POINTS, FREE_KEY_POINTS, IMAGE_HEIGHT, IMAGE_WIDTH
from reimplementation.models.deformable import DeformableFeatureAggregation
from reimplementation.models.ms_deform_attn import MSDeformAttn, initial_offsets
from reimplementation.ops.dtypes import at_least_float32

if TYPE_CHECKING:
    from typing_extensions import Self

STRIDES = (4, 8, 16, 32)
EMBED_DIMS, NUM_GROUPS = 256, 8
DENSE_CAMERAS = 6


@dataclass(frozen=True)
class OpInputs:
    """The operands of an op, in its order: features, shapes and starts of levels; mostly then locations and weights."""

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Everything on ``device``, in the dtypes that go with ``dtype``."""
        moved: dict[str, Any] = {
            field.name: None if tensor is None else tensor.to(device, wanted or tensor.dtype)
            for field, tensor, wanted in zip(fields(self), self, self.dtypes(dtype), strict=True)
        }
        return replace(self, **moved)

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype | None, ...]:
        """Features and weights in ``dtype``, locations in float32 or wider; None: an operand keeps its own."""
        return dtype, None, None, torch.promote_types(dtype, torch.float32), dtype


@dataclass(frozen=True)
class AggregationInputs(OpInputs):
    """The arguments of `reimplementation.ops.deformable_aggregation_function`, in its order."""

    feature_maps: Tensor
    spatial_shape: Tensor
    scale_start_index: Tensor
    sampling_location: Tensor
    weights: Tensor


@dataclass(frozen=True)
class AttentionInputs(OpInputs):
    """The arguments of `reimplementation.ops.ms_deform_attn`, in its order, less ``im2col_step``."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor


@dataclass(frozen=True)
class DiscreteAttentionInputs(AttentionInputs):
    """The same for ``method="discrete"``, which takes one pixel for each location."""


def aggregation_inputs(
    geometry: str = "rig",
    batch_size: int = 1,
    *,
    num_queries: int = 900,
    num_points: int = 13,
    channels: int = EMBED_DIMS,
    num_groups: int = NUM_GROUPS,
    strides: tuple[int, ...] = STRIDES,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AggregationInputs:
    """Random features and softmax weights, sampled where a geometry says.

    Args:
        geometry: "rig", key points of random boxes around the car as six cameras see them (a point is in about 1.1
            of them); "map" and "planner", see `key_points.key_points`; "dense", random points, each in every camera.
        batch_size, num_queries, num_points, channels, num_groups: sizes.
        strides: of the pyramid's levels, on 704 x 256 images.
        dtype: of features and weights; locations are float32, or float64 with float64.
        device: of everything; the numbers do not depend on it.
        seed: of the random generator.

    Raises:
        ValueError: no geometry has that name.
    """
    generator = torch.Generator().manual_seed(seed)
    if geometry == "dense":
        location = torch.rand(batch_size, num_queries, num_points, DENSE_CAMERAS, 2, generator=generator)
    elif geometry in GEOMETRIES:
        rig, points = key_points(geometry, batch_size, num_queries, num_points, seed)
        pixels, _ = rig.project(points)
        # Points behind a camera are divided by the least depth, as SparseDrive does: they land far outside.
        location = torch.from_numpy(np.clip(pixels / rig.image_wh, -1e6, 1e6)).float()
    else:
        raise ValueError(f"geometry must be 'dense' or one of {', '.join(GEOMETRIES)}; got {geometry!r}")

    num_cams = location.shape[3]
    spatial_shape, scale_start_index, num_rows = pyramid(num_cams, strides)
    features = torch.randn(batch_size, num_rows, channels, generator=generator)
    logits = torch.randn(batch_size, num_queries, num_points, num_cams, len(strides), num_groups, generator=generator)
    weights = logits.flatten(2, 4).softmax(2).view_as(logits)
    return AggregationInputs(features, spatial_shape, scale_start_index, location, weights).to(device, dtype)


def pyramid(num_cams: int, strides: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Shapes and first rows of the levels of 704 x 256 images, (num_cams, num_levels, ...), and their rows."""
    shapes = torch.tensor([[(IMAGE_HEIGHT // stride, IMAGE_WIDTH // stride) for stride in strides]] * num_cams)
    rows = shapes.prod(-1).flatten()
    return shapes, (rows.cumsum(0) - rows).view(num_cams, len(strides)), int(rows.sum())


@dataclass(frozen=True, eq=False)
class AggregationProblem:
    """The module around deformable aggregation, and one batch of inputs for it, on one device."""

    module: DeformableFeatureAggregation
    instance_feature: Tensor
    anchor: Tensor
    anchor_embed: Tensor
    feature_maps: list[Tensor]  # col_feats, spatial_shape, scale_start_index
    metas: dict[str, Tensor]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs whose gradients are taken."""
        return self.feature_maps[0], self.instance_feature

    def at(self, col_feats: Tensor, instance_feature: Tensor) -> AggregationProblem:
        """The same module with other leaves."""
        return replace(self, feature_maps=[col_feats, *self.feature_maps[1:]], instance_feature=instance_feature)

    def to(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> AggregationProblem:
        """The same elsewhere. Only the feature maps go to half precision; integers keep their dtype.

        Gradients of the result do not reach this problem's tensors.
        """
        col_feats, *levels = (tensor.detach().to(device) for tensor in self.feature_maps)
        wide = dtype if dtype == torch.float64 else None
        return replace(
            self,
            module=copy.deepcopy(self.module).to(device, wide),
            instance_feature=self.instance_feature.detach().to(device, wide),
            anchor=self.anchor.to(device, wide),
            anchor_embed=self.anchor_embed.to(device, wide),
            feature_maps=[col_feats.to(dtype), *levels],
            metas={key: value.to(device, wide) for key, value in self.metas.items()},
        )

    def forward(self) -> Tensor:
        return self.module(self.instance_feature, self.anchor, self.anchor_embed, self.feature_maps, self.metas)


def aggregation_problem(
    rig: Rig | None = None, num_queries: int = 900, batch_size: int = 1, seed: int = 0
) -> AggregationProblem:
    """SparseDrive's module in eval mode: 256 channels, 8 groups, 4 levels, 13 key points a query; random features.

    The anchors are the rig's boxes, then random ones around the car. There is no residual connection, which
    would only hide errors of the aggregated features behind the exact instance feature.

    Args:
        rig: the cameras, at the size of their images; None stands for six around a car at 704 x 256.
        num_queries, batch_size: sizes.
        seed: of parameters, features and anchors; the global generator is left alone.

    Returns:
        float32, on the CPU; features formatted by `reimplementation.ops.feature_maps_format`.
    """
    if rig is None:
        rig = nuscenes_like_rig().scaled_to(IMAGE_WIDTH, IMAGE_HEIGHT)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = DeformableFeatureAggregation(
            embed_dims=EMBED_DIMS,
            num_groups=NUM_GROUPS,
            num_levels=len(STRIDES),
            num_cams=len(rig.cameras),
            kps_generator={
                "type": "SparseBox3DKeyPointsGenerator",
                "num_learnable_pts": len(FREE_KEY_POINTS),
                "fix_scale": FIXED_KEY_POINTS,
            },
            use_deformable_func=True,
            use_camera_embed=True,
            residual_mode=None,
        ).eval()

    width, height = rig.image_wh[0].astype(int)
    maps = [
        torch.randn(batch_size, len(rig.cameras), EMBED_DIMS, height // stride, width // stride, generator=generator)
        for stride in STRIDES
    ]
    anchors = np.stack([_anchors(rig, num_queries, seed + i) for i in range(batch_size)])
    return AggregationProblem(
        module=module,
        instance_feature=torch.randn(batch_size, num_queries, EMBED_DIMS, generator=generator),
        anchor=torch.from_numpy(anchors).float(),
        anchor_embed=torch.randn(batch_size, num_queries, EMBED_DIMS, generator=generator),
        feature_maps=ops.feature_maps_format(maps),
        metas={
            "projection_mat": torch.from_numpy(rig.projection_mat).float().repeat(batch_size, 1, 1, 1),
            "image_wh": torch.from_numpy(rig.image_wh).float().repeat(batch_size, 1, 1),
        },
    )


@dataclass(frozen=True)
class AttentionSizes:
    """How large a case of multi-scale deformable attention is.

    shapes: (H, W) of each level. num_queries: None stands for one query per pixel of every level, as in an encoder.
    """

    batch_size: int
    shapes: tuple[tuple[int, int], ...]
    num_queries: int | None
    num_heads: int
    channels: int  # of a head
    num_points: int

    @property
    def num_values(self) -> int:
        return sum(height * width for height, width in self.shapes)


_DETR_SHAPES = ((100, 152), (50, 76), (25, 38), (13, 19))
_PAPER_SHAPES = ((92, 160), (46, 80), (23, 40), (12, 20))
ATTENTION_CASES = {
    "encoder": AttentionSizes(2, _DETR_SHAPES, None, num_heads=8, channels=32, num_points=4),
    "decoder": AttentionSizes(2, _DETR_SHAPES, 900, num_heads=8, channels=32, num_points=4),
    "paper": AttentionSizes(48, _PAPER_SHAPES, 15422, num_heads=1, channels=32, num_points=8),
    "small-encoder": AttentionSizes(1, ((16, 20), (8, 10)), None, num_heads=4, channels=16, num_points=4),
    "small-decoder": AttentionSizes(1, ((16, 20), (8, 10)), 50, num_heads=4, channels=16, num_points=4),
    "one-query": AttentionSizes(1, ((8, 10),), 1, num_heads=1, channels=8, num_points=1),
}


def discrete_attention_inputs(case: str = "decoder", **settings: Any) -> DiscreteAttentionInputs:
    """`attention_inputs` whose samples are single pixels."""
    return DiscreteAttentionInputs(*attention_inputs(case, **settings))


def attention_inputs(
    case: str = "encoder",
    batch_size: int | None = None,
    *,
    geometry: str = "around",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> AttentionInputs:
    """Random values and softmax weights of a case's sizes, sampled where a geometry says.

    Args:
        case: a name in `ATTENTION_CASES`.
        batch_size: instead of the case's own.
        geometry: "around", each query samples around a place of its own, as `reimplementation.models.MSDeformAttn`
            does when it is new, give or take a pixel: an encoder's query around its own pixel, any other around a
            random place; "uniform", anywhere in the unit square.
        dtype: of value and weights; locations are float32, or float64 with float64.
        device: of everything; the numbers do not depend on it.
        seed: of the random generator.

    Raises:
        ValueError: no case or geometry has that name.
    """
    if case not in ATTENTION_CASES:
        raise ValueError(f"case must be one of {', '.join(ATTENTION_CASES)}; got {case!r}")
    sizes = ATTENTION_CASES[case]
    batch_size = sizes.batch_size if batch_size is None else batch_size
    num_queries = sizes.num_values if sizes.num_queries is None else sizes.num_queries
    num_levels = len(sizes.shapes)
    generator = torch.Generator().manual_seed(seed)

    spatial_shapes = torch.tensor(sizes.shapes)
    rows = spatial_shapes.prod(-1)
    samples = (batch_size, num_queries, sizes.num_heads, num_levels, sizes.num_points)
    if geometry == "around":
        if sizes.num_queries is None:
            places = pixel_centres(sizes.shapes).expand(batch_size, -1, 2)
        else:
            places = torch.rand(batch_size, num_queries, 2, generator=generator)
        offsets = initial_offsets(sizes.num_heads, sizes.num_points)[:, None]  # pixels of each level
        offsets = offsets + torch.randn(*samples, 2, generator=generator)
        locations = places[:, :, None, None, None] + offsets / spatial_shapes.flip(-1)[:, None]
    elif geometry == "uniform":
        locations = torch.rand(*samples, 2, generator=generator)
    else:
        raise ValueError(f"geometry must be 'around' or 'uniform'; got {geometry!r}")

    value = torch.randn(batch_size, int(rows.sum()), sizes.num_heads, sizes.channels, generator=generator)
    logits = torch.randn(*samples, generator=generator)
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    return AttentionInputs(value, spatial_shapes, rows.cumsum(0) - rows, locations, weights).to(device, dtype)


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """The layer of multi-scale deformable attention, and one batch of inputs for it, on one device."""

    module: MSDeformAttn
    query: Tensor
    reference_points: Tensor
    input_flatten: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs whose gradients are taken."""
        return self.query, self.input_flatten

    def at(self, query: Tensor, input_flatten: Tensor) -> Self:
        """The same module with other leaves."""
        return replace(self, query=query, input_flatten=input_flatten)

    def to(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """The same elsewhere. Half precision is for autocast, whose LayerNorms give a layer float32: so inputs stay.

        Gradients of the result do not reach this problem's tensors.
        """
        wide = dtype if dtype == torch.float64 else None
        return replace(
            self,
            module=copy.deepcopy(self.module).to(device, wide),
            query=self.query.detach().to(device, wide),
            reference_points=self.reference_points.to(device, wide),
            input_flatten=self.input_flatten.detach().to(device, wide),
            spatial_shapes=self.spatial_shapes.to(device),
            level_start_index=self.level_start_index.to(device),
        )

    def forward(self) -> Tensor:
        return self.module(
            self.query, self.reference_points, self.input_flatten, self.spatial_shapes, self.level_start_index
        )


class UnfusedAttentionProblem(AttentionProblem):
    """The same with locations and softmax in plain PyTorch, before the op that takes these."""

    def forward(self) -> Tensor:
        module, shapes = self.module, self.spatial_shapes
        samples = (module.n_heads, module.n_levels, module.n_points)
        value = module.value_proj(self.input_flatten).unflatten(-1, (module.n_heads, -1))
        offsets = at_least_float32(module.sampling_offsets(self.query)).unflatten(-1, (*samples, 2))
        weights = module.attention_weights(self.query).unflatten(-1, (module.n_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, samples[1:])
        locations = self.reference_points[:, :, None, :, None] + offsets / shapes.flip(-1)[:, None]
        return module.output_proj(ops.ms_deform_attn(value, shapes, self.level_start_index, locations, weights))


def attention_problem(
    case: str = "encoder", kind: type[AttentionProblem] = AttentionProblem, seed: int = 0
) -> AttentionProblem:
    """`MSDeformAttn` in eval mode at a case's sizes, whose offsets and logits depend on the query; random inputs.

    Args:
        case: a name in `ATTENTION_CASES`, with a query a pixel; the reference points are the pixels' centres.
        kind: how the layer is computed.
        seed: of parameters and inputs; the global generator is left alone.

    Returns:
        float32, on the CPU.
    """
    sizes = ATTENTION_CASES[case]
    channels = sizes.num_heads * sizes.channels
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = MSDeformAttn(channels, len(sizes.shapes), sizes.num_heads, sizes.num_points).eval()
        for layer in (module.sampling_offsets, module.attention_weights):
            layer.weight.normal_(std=channels**-0.5)
    shapes = torch.tensor(sizes.shapes)
    rows = shapes.prod(-1)
    inputs = (sizes.batch_size, sizes.num_values, channels)
    points = pixel_centres(sizes.shapes)[None, :, None].expand(sizes.batch_size, -1, len(sizes.shapes), -1)
    return kind(
        module,
        query=torch.randn(inputs, generator=generator),
        reference_points=points.contiguous(),
        input_flatten=torch.randn(inputs, generator=generator),
        spatial_shapes=shapes,
        level_start_index=rows.cumsum(0) - rows,
    )


def pixel_centres(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(S, 2): normalised (x, y) of every pixel of every level, in the order of the value's rows."""
    levels = []
    for height, width in shapes:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        levels.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(levels)


def _anchors(rig: Rig, count: int, seed: int) -> np.ndarray:
    """(count, 11): the rig's boxes, then boxes the size of cars, 2 to 55 m away, standing on the ground."""
    random = np.random.default_rng(seed)
    camera_height = np.mean([camera.position[2] for camera in rig.cameras])
    distance, bearing = random.uniform(2, 55, count), random.uniform(-np.pi, np.pi, count)
    yaw = random.uniform(-np.pi, np.pi, count)
    sizes = np.array([4.5, 1.9, 1.6]) * random.uniform(0.3, 1.4, (count, 3))
    velocity = random.normal(0, 3, (count, 2))
    position = np.stack([distance * np.cos(bearing), distance * np.sin(bearing)], axis=1)
    elevation = np.full((count, 1), camera_height - 0.7)
    heading = np.stack([np.sin(yaw), np.cos(yaw)], axis=1)
    around = np.concatenate([position, elevation, np.log(sizes), heading, velocity, np.zeros((count, 1))], axis=1)
    return np.concatenate([rig.anchors, around])[:count]
