"""Inputs for deformable feature aggregation, at sizes that a test can afford.

Depths, scales and image sizes are powers of two and key points multiples of 2^-13, so that locations and pixel
positions are exact in float32 too: a position that rounds across a pixel's edge would have another gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from tests.ops.inputs import quantized

SHAPES = (((9, 14), (5, 7)), ((9, 14), (5, 7)), ((6, 4), (1, 3)))  # cameras of different shapes
ATTN_DROP = 0.25  # of the pairs in `random_feature_aggregation`
LEAVES = ("feature_maps", "key_points", "logits", "camera_logits")


@dataclass(frozen=True)
class FeatureAggregationInputs:
    """The arguments of the op, by their names and in its order."""

    feature_maps: Tensor
    spatial_shape: Tensor
    scale_start_index: Tensor
    key_points: Tensor
    projection_mat: Tensor
    image_wh: Tensor | None
    logits: Tensor
    camera_logits: Tensor | None = None
    keep: Tensor | None = None
    attn_drop: float = 0.0
    visible_only: bool = False

    def __iter__(self):
        return (getattr(self, field.name) for field in fields(self))

    def to(self, device, dtype) -> FeatureAggregationInputs:
        """On a device; features and logits in the dtype, the cameras' arithmetic at least in float32."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {"feature_maps": dtype, "logits": dtype, "camera_logits": dtype}
        dtypes |= {"key_points": wide, "projection_mat": wide, "image_wh": wide}
        changed = {
            field.name: tensor.to(device, dtypes.get(field.name, tensor.dtype))
            for field in fields(self)
            if isinstance(tensor := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)

    def leaves(self) -> dict[str, Tensor]:
        """What the kernels have gradients of."""
        return {name: getattr(self, name) for name in LEAVES if getattr(self, name) is not None}


def feature_aggregation_inputs(
    seed: int = 0,
    *,
    batch_size: int = 2,
    num_queries: int = 7,
    num_points: int = 3,
    channels: int = 32,
    num_groups: int = 4,
    shapes=SHAPES,
    by_camera: bool = True,
    attn_drop: float | None = None,
    visible_only: bool = False,
) -> FeatureAggregationInputs:
    """Cameras that look along z from places side by side, the last one the other way; float64, on the CPU.

    ``by_camera``: the logits are a query's term and a camera's. ``attn_drop``: with pairs left out.
    """
    generator = torch.Generator().manual_seed(seed)
    spatial_shape = torch.as_tensor(shapes)
    num_cams, num_levels = spatial_shape.shape[:2]
    rows = spatial_shape.prod(-1).flatten()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    points = (batch_size, num_queries, num_points)
    depth = 2.0 ** torch.randint(-1, 3, points, generator=generator) * torch.where(normal(*points) < -0.5, -1, 1)
    across = quantized(torch.rand(*points, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.6)
    camera = torch.arange(num_cams)
    looks = torch.where(camera == num_cams - 1, -1.0, 1.0).double()
    projection = torch.zeros(batch_size, num_cams, 4, 4, dtype=torch.float64)
    projection[:, :, 0, 0], projection[:, :, 1, 1], projection[:, :, 3, 3] = 16, 8, 1
    projection[:, :, 0, 2], projection[:, :, 1, 2] = looks * (8 + camera), looks * 4
    projection[:, :, 2, 2] = looks
    width = num_levels * num_points * num_groups
    pairs = (batch_size, num_queries, num_cams, num_points)
    return FeatureAggregationInputs(
        normal(batch_size, int(rows.sum()), channels),
        spatial_shape,
        (rows.cumsum(0) - rows).view(num_cams, num_levels),
        torch.cat([across * depth[..., None], depth[..., None]], dim=-1),
        projection,
        torch.tensor([16.0, 8.0], dtype=torch.float64).repeat(batch_size, num_cams, 1),
        normal(batch_size, num_queries, width if by_camera else num_cams * width),
        normal(batch_size, num_cams, width) if by_camera else None,
        None if attn_drop is None else torch.rand(pairs, generator=generator) > attn_drop,
        attn_drop or 0.0,
        visible_only,
    )


def random_feature_aggregation(
    seed: int = 0, *, num_groups: int = 6, channels: int = 24, spare_rows: int = 0, **sizes
) -> list[Tensor | None]:
    """The op's operands, none left out, with as many groups as leave a choice.

    They are a multiple of the usual number of cameras: without the cameras' logits those of the queries are then one
    for each pair, of fewer groups. ``spare_rows`` of the features belong to no level.
    """
    made = feature_aggregation_inputs(seed, num_groups=num_groups, channels=channels, attn_drop=ATTN_DROP, **sizes)
    features, *others, _, _ = made
    return [torch.nn.functional.pad(features, (0, 0, 0, spare_rows)), *others]
