"""A small detector and frames for it: the same parts as the public ones, in a second instead of minutes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import torch
from torch import Tensor

from reimplementation.models.sparsedrive import SparseDrive, SparseDriveConfig
from reimplementation.models.sparsedrive.config import BankConfig, BoxHeadConfig, DenoisingConfig, MapHeadConfig

NUM_CAMS, HEIGHT, WIDTH = 2, 64, 96
NUM_BOXES, NUM_KEPT, NUM_LINES, NUM_POINTS = 14, 8, 5, 4

BOX_HEAD = BoxHeadConfig(
    num_decoders=3,
    bank=BankConfig(num_anchors=NUM_BOXES, num_temp_instances=NUM_KEPT),
    num_learnable_pts=2,
    max_distance=20.0,
    num_outputs=6,
)
MAP_HEAD = MapHeadConfig(
    num_decoders=2,
    bank=BankConfig(num_anchors=NUM_LINES, num_temp_instances=0),
    num_points=NUM_POINTS,
    num_learnable_pts=1,
    fix_height=(0.0, 0.5),
)
CONFIG = SparseDriveConfig(
    depth=18,
    embed_dims=32,
    num_heads=4,
    num_groups=4,
    num_cams=NUM_CAMS,
    feedforward_dims=64,
    det=BOX_HEAD,
    map=MAP_HEAD,
)
DENOISING = dataclasses.replace(
    CONFIG,
    family="sparse4d",
    det=dataclasses.replace(BOX_HEAD, denoising=DenoisingConfig(num_groups=3, num_temp_groups=2, max_boxes=4)),
    map=None,
)


def trained(config: SparseDriveConfig = CONFIG, seed: int = 0) -> SparseDrive:
    """A detector in evaluation whose parameters are random enough that everything depends on everything."""
    return copy.deepcopy(_built(config, seed))


@functools.cache
def _built(config: SparseDriveConfig, seed: int) -> SparseDrive:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = SparseDrive(config)
        for name, parameter in model.named_parameters():
            if name.startswith("head") and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def frame(batch_size: int = 1, seed: int = 0, time: float | list[float] = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and metas: level cameras that look out forwards and backwards from a car that drives a curve."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch_size, NUM_CAMS, 3, HEIGHT, WIDTH, generator=generator)
    times = torch.as_tensor(time, dtype=torch.float64).expand(batch_size)
    projection = torch.stack([camera(2 * math.pi * i / NUM_CAMS) for i in range(NUM_CAMS)])
    return images, {
        "projection_mat": projection.repeat(batch_size, 1, 1, 1),
        "image_wh": torch.tensor([WIDTH, HEIGHT]).float().repeat(batch_size, NUM_CAMS, 1),
        "timestamp": times + 1.5e9,
        "T_global": torch.stack([pose(t) for t in times.tolist()]),
        "focal": torch.full((batch_size, NUM_CAMS), 50.0),
    }


def camera(bearing: float) -> Tensor:
    """(4, 4): the projection of a camera 1.5 m above the origin that looks along a bearing."""
    sin, cos = math.sin(bearing), math.cos(bearing)
    forward, right, down = torch.tensor([[cos, sin, 0, 0], [sin, -cos, 0, 0], [0, 0, -1, 1.5]])
    u, v = 50 * right + WIDTH / 2 * forward, 50 * down + HEIGHT / 2 * forward
    return torch.stack([u, v, forward, torch.tensor([0, 0, 0, 1.0])])


def pose(time: float) -> Tensor:
    """(4, 4) float64: the car's place in the world, far from its origin."""
    angle = 0.3 + 0.2 * time
    matrix = torch.eye(4, dtype=torch.float64)
    cos, sin = math.cos(angle), math.sin(angle)
    matrix[:2, :2] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    matrix[:3, 3] = torch.tensor([600.0 + 4 * time, 1600.0 - 2 * time, 0.1 * time], dtype=torch.float64)
    return matrix


def targets(batch_size: int = 1, seed: int = 0) -> dict[str, list[Tensor]]:
    """Two boxes more in each sample than in the one before, from one on; one line more."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = {"labels_3d": [], "boxes_3d": [], "instance_id": [], "map_labels": []}
    found["map_lines"] = []
    for sample in range(batch_size):
        count = 1 + 2 * sample
        boxes = torch.randn(count, 9, generator=generator)
        boxes[:, :3] *= torch.tensor([8.0, 8.0, 0.5])
        boxes[:, 3:6] = 1 + boxes[:, 3:6].abs()
        found["boxes_3d"].append(boxes)
        found["labels_3d"].append(torch.randint(10, (count,), generator=generator))
        found["instance_id"].append(torch.arange(count) + 7)
        lines = torch.rand(1 + sample, NUM_POINTS, 2, generator=generator) - 0.5
        found["map_lines"].append(lines * torch.tensor([30.0, 60.0]))
        found["map_labels"].append(torch.randint(3, (1 + sample,), generator=generator))
    return found
