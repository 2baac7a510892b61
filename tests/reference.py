"""The ops once more, from their formula: float64, one gather per corner, nothing shared with the package."""

from __future__ import annotations

import torch
from torch import Tensor


def bilinear(rows: Tensor, height: int, width: int, x: Tensor, y: Tensor) -> Tensor:
    """Sample ``rows`` (height * width, C) of an image at pixel positions (x, y) of any one shape; zero outside."""
    left, top = x.floor(), y.floor()
    sampled = 0
    for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
        for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = torch.where(inside, row * width + column, 0).long()
            sampled = sampled + torch.where(inside, row_weight * column_weight, 0)[..., None] * rows[index]
    return sampled


def deformable_aggregation(features, spatial_shape, scale_start_index, location, weights) -> Tensor:
    """(bs, num_queries, C) float64; differentiable in features, location and weights."""
    features, location, weights = features.double(), location.double(), weights.double()
    channels, num_groups = features.shape[-1], weights.shape[-1]
    inside = ((location > 0) & (location < 1)).all(-1)
    location = torch.where(inside[..., None], location, 0.5)
    weights = torch.where(inside[..., None, None], weights, 0)
    output = features.new_zeros(features.shape[0], location.shape[1], channels)
    for cam, shapes in enumerate(spatial_shape.tolist()):
        for level, (height, width) in enumerate(shapes):
            start = int(scale_start_index[cam, level])
            if height * width == 0:
                continue
            x, y = (location[:, :, :, cam] * location.new_tensor([width, height]) - 0.5).unbind(-1)
            sampled = torch.stack(
                [
                    bilinear(rows[start : start + height * width], height, width, x[b], y[b])
                    for b, rows in enumerate(features)
                ]
            )
            weight = weights[:, :, :, cam, level].repeat_interleave(channels // num_groups, dim=-1)
            output = output + (sampled * weight).sum(2)
    return output


def ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights) -> Tensor:
    """(N, Lq, M * D) float64; differentiable in value, locations and weights."""
    value, locations, weights = value.double(), locations.double(), weights.double()
    output = value.new_zeros(value.shape[0], locations.shape[1], *value.shape[2:])
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        start = int(level_start_index[level])
        size = locations.new_tensor([width, height])
        pixel = locations[:, :, :, level] * size - 0.5
        touches = ((pixel > -1) & (pixel < size)).all(-1)
        x, y = torch.where(touches[..., None], pixel, 0.0).unbind(-1)
        weight = torch.where(touches, weights[:, :, :, level], 0)
        if height * width == 0:
            continue
        rows = value[:, start : start + height * width]
        sampled = [
            torch.stack([bilinear(head, height, width, x[n, :, m], y[n, :, m]) for m, head in enumerate(heads)], 1)
            for n, heads in enumerate(rows.transpose(1, 2))
        ]
        output = output + (torch.stack(sampled) * weight[..., None]).sum(-2)
    return output.flatten(2)


def project_points(key_points, projection_mat, image_wh=None) -> Tensor:
    """(bs, num_anchor, num_pts, num_cams, 2) float64; differentiable in all three."""
    points, matrices = key_points.double(), projection_mat.double()
    points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    x, y, depth = torch.einsum("bcij,bnpj->bnpci", matrices[:, :, :3], points).unbind(-1)
    pixels = torch.stack([x, y], dim=-1) / torch.where(depth < 1e-5, 1e-5, depth)[..., None]
    return pixels if image_wh is None else pixels / image_wh.double()[:, None, None]


def box_key_points(anchor, fix_scale, logits=None) -> Tensor:
    """(bs, num_anchor, num_fixed + num_learnable, 3) float64; differentiable in all three."""
    anchor = anchor.double()
    places = fix_scale.double().expand(*anchor.shape[:2], -1, -1)
    if logits is not None:
        learned = 1 / (1 + torch.exp(-logits.double())) - 0.5
        places = torch.cat([places, learned.reshape(*anchor.shape[:2], -1, 3)], dim=2)
    sin, cos = anchor[..., 6], anchor[..., 7]
    zero, one = torch.zeros_like(sin), torch.ones_like(sin)
    turn = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=-1).unflatten(-1, (3, 3))
    return torch.einsum("bnij,bnpj->bnpi", turn, places * anchor[:, :, None, 3:6].exp()) + anchor[:, :, None, :3]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error; NaN anywhere in ``actual`` is an infinite error, as is any error of an expected zero."""
    difference = (actual.double() - expected.double()).norm().item()
    if difference == 0:
        return 0.0
    error = difference / max(expected.double().norm().item(), torch.finfo(torch.float64).tiny)
    return error if error == error else float("inf")


TOLERANCE = {  # relative L2: some hundred roundings of sums in float32, or one of the result in half precision
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}
