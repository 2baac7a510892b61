"""The ops once more, from their formulas, in float64: what every test compares with.

Nothing is shared with the package. Gradients are autograd's; for random calls `tests.fuzz.rules` forms them by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """What sampling comes down to: K samples a query in one image each, G weights a sample, each for C / G channels.

    features (B, R, C), location (B, Q, K, 2), weights (B, Q, K, G), all float64; levels: for each of the K its
    (height, width, first row), which are zero where the metadata reaches beyond the R rows.
    """

    features: Tensor
    location: Tensor
    weights: Tensor
    levels: Tensor
    unit_square_only: bool

    def pixel(self) -> tuple[Tensor, Tensor]:
        """(B, Q, K, 2) positions in pixels, and (B, Q, K) which of the samples count; the others are at a pixel 0."""
        height, width, _ = self.levels.unbind(-1)
        size = torch.stack([width, height], -1).double()
        pixel = self.location * size - 0.5
        if self.unit_square_only:
            live = ((self.location > 0) & (self.location < 1)).all(-1)
        else:
            live = ((pixel > -1) & (pixel < size)).all(-1)
        live = live & (height > 0)
        return torch.where(live[..., None], pixel, 0.0), live

    def corners(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the four corners of each sample, (B, Q, K, 4, ...): row, weight, slopes (x and y), whether they exist."""
        height, width, start = self.levels.unbind(-1)
        pixel, live = self.pixel()
        low = pixel.detach().floor()
        (x, y), (fraction_x, fraction_y) = low.unbind(-1), (pixel - low).unbind(-1)
        rows, weights, slopes, inside = [], [], [], []
        for down in (0, 1):
            for right in (0, 1):
                column, line = (x + right).long(), (y + down).long()
                inside.append(live & (column >= 0) & (column < width) & (line >= 0) & (line < height))
                rows.append(start + line * width + column)
                along_x, along_y = (fraction_x if right else 1 - fraction_x), (fraction_y if down else 1 - fraction_y)
                weights.append(along_x * along_y)
                slope_x, slope_y = (2 * right - 1) * width * along_y, (2 * down - 1) * height * along_x
                slopes.append(torch.stack([slope_x, slope_y], -1))
        exists = torch.stack(inside, -1)
        # What does not exist reads a row of zeros behind the last one.
        row = torch.where(exists, torch.stack(rows, -1), self.features.shape[1])
        return row, torch.stack(weights, -1), torch.stack(slopes, -2), exists

    def pixels(self, features: Tensor, row: Tensor) -> Tensor:
        """(B, Q, K, 4, C): the features in these rows of the corners."""
        batch, _, channels = features.shape
        padded = torch.cat([features, features.new_zeros(batch, 1, channels)], 1)
        index = row.flatten(1)[..., None].expand(-1, -1, channels)
        return padded.gather(1, index).view(*row.shape, channels)

    def output(self) -> Tensor:
        """(B, Q, C); differentiable in features, location and weights."""
        row, corner_weight, _, exists = self.corners()
        num_groups = self.weights.shape[-1]
        weights = torch.where(exists.any(-1)[..., None], self.weights, 0.0)  # may be anything where nothing is read
        scale = torch.where(exists, corner_weight, 0.0)[..., None] * weights[..., None, :]
        pixels = self.pixels(self.features, row)
        pixels = pixels.view(*row.shape, num_groups, pixels.shape[-1] // max(num_groups, 1))
        return torch.einsum("bqkfgc,bqkfg->bqgc", pixels, scale).flatten(2)


def fits(height: int, width: int, start: int, num_rows: int) -> bool:
    """Whether a level lies within its features' rows; of Python's integers, which do not overflow."""
    return height >= 0 and width >= 0 and start >= 0 and start + height * width <= num_rows


def fitting_levels(shapes: Tensor, starts: Tensor, num_rows: int) -> Tensor:
    """(levels, 3) height, width and first row; all zero for a level that is empty or does not fit."""
    rows = [
        (height, width, start) if fits(height, width, start, num_rows) and height * width > 0 else (0, 0, 0)
        for (height, width), start in zip(shapes.reshape(-1, 2).tolist(), starts.reshape(-1).tolist())
    ]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def samples_of_aggregation(features, shapes, starts, location, weights) -> Samples:
    """The samples of a query are its points, times cameras, times levels."""
    batch, num_queries, num_points, num_cams, num_levels, num_groups = weights.shape
    levels = fitting_levels(shapes, starts, features.shape[1]).view(num_cams, num_levels, 3)
    every_level = location.double()[:, :, :, :, None].expand(-1, -1, -1, -1, num_levels, -1)
    samples = (batch, num_queries, num_points * num_cams * num_levels)
    return Samples(
        features.double(),
        every_level.reshape(*samples, 2),
        weights.double().reshape(*samples, num_groups),
        levels.expand(num_points, -1, -1, -1).reshape(-1, 3),
        unit_square_only=True,
    )


def samples_of_attention(value, shapes, starts, locations, weights) -> Samples:
    """Every head is an image of its own: the batch of samples is that of (N, M)."""
    batch, num_values, num_heads, channels = value.shape
    num_queries, num_levels, num_points = locations.shape[1], locations.shape[3], locations.shape[4]
    samples = (batch * num_heads, num_queries, num_levels * num_points)
    return Samples(
        value.double().transpose(1, 2).reshape(batch * num_heads, num_values, channels),
        locations.double().transpose(1, 2).reshape(*samples, 2),
        weights.double().transpose(1, 2).reshape(*samples, 1),
        fitting_levels(shapes, starts, num_values).repeat_interleave(num_points, 0),
        unit_square_only=False,
    )


def deformable_aggregation(features, spatial_shape, scale_start_index, location, weights) -> Tensor:
    """(bs, num_queries, C) float64; differentiable in features, location and weights."""
    return samples_of_aggregation(features, spatial_shape, scale_start_index, location, weights).output()


def ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights) -> Tensor:
    """(N, Lq, M * D) float64; differentiable in value, locations and weights."""
    batch, _, num_heads, channels = value.shape
    output = samples_of_attention(value, spatial_shapes, level_start_index, locations, weights).output()
    return output.view(batch, num_heads, locations.shape[1], channels).transpose(1, 2).flatten(2)


def locations_from_offsets(shapes, references, offsets, offset_scale=None) -> Tensor:
    """(N, Lq, M, L, P, 2) float64: one level after the other, with its points' offsets in pixels, or in boxes."""
    locations = []
    for level, (height, width) in enumerate(shapes.tolist()):
        of_level = 0 if references.shape[2] == 1 else level
        points, moves = references.double()[:, :, of_level, None, None], offsets.double()[:, :, :, level]
        if references.shape[-1] == 2:
            moves = moves / torch.tensor([max(width, 1), max(height, 1)], dtype=torch.float64)
        else:
            scale = 1 / max(offsets.shape[4], 1) if offset_scale is None else offset_scale.double()[level]
            known = moves.isfinite()  # others lie nowhere, and say nothing of a box's size
            moves = torch.where(known, torch.where(known, moves, 0.0) * points[..., 2:] * (scale / 2), torch.nan)
        locations.append(points[..., :2] + moves)
    return torch.stack(locations, dim=3) if locations else offsets.double() + 0 * references.sum()


def ms_deform_attn_from_offsets(
    value, spatial_shapes, level_start_index, references, offsets, logits, offset_scale=None
) -> Tensor:
    """(N, Lq, M * D) float64; differentiable in all operands that are numbers."""
    locations = locations_from_offsets(spatial_shapes, references, offsets, offset_scale)
    weights = torch.softmax(logits.double().flatten(3), dim=-1).view(logits.shape)
    return ms_deform_attn(value, spatial_shapes, level_start_index, locations, weights)


def project_points(key_points, projection_mat, image_wh=None) -> Tensor:
    """(bs, num_anchor, num_pts, num_cams, 2) float64; differentiable in all three."""
    points, matrices = key_points.double(), projection_mat.double()
    points = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    x, y, depth = torch.einsum("bcij,bnpj->bnpci", matrices[:, :, :3], points).unbind(-1)
    pixels = torch.stack([x, y], dim=-1) / torch.where(depth < 1e-5, 1e-5, depth)[..., None]
    return pixels if image_wh is None else pixels / image_wh.double()[:, None, None]


def feature_aggregation_weights(
    key_points, projection_mat, image_wh, logits, camera_logits, keep, attn_drop, visible_only, num_levels
) -> Tensor:
    """(bs, num_queries, num_pts, num_cams, num_levels, num_groups) float64: exponentials over their sum."""
    bs, num_queries, num_pts = key_points.shape[:3]
    num_cams = projection_mat.shape[1]
    own_cams = num_cams if camera_logits is None else 1
    num_groups = logits.shape[2] // max(own_cams * num_levels * num_pts, 1) or 1
    terms = logits.double().reshape(bs, num_queries, own_cams, num_levels, num_pts, num_groups)
    if camera_logits is not None:
        terms = terms + camera_logits.double().reshape(bs, 1, num_cams, num_levels, num_pts, num_groups)
    terms = terms.permute(0, 1, 4, 2, 3, 5)
    if visible_only:
        location = project_points(key_points, projection_mat, image_wh)
        depth = torch.einsum("bcj,bnpj->bnpc", projection_mat.double()[:, :, 2, :3], key_points.double())
        depth = depth + projection_mat.double()[:, None, None, :, 2, 3]
        seen = (depth > 1e-5) & (location > 0).all(-1) & (location < 1).all(-1)
        left_out = ~seen & seen.any(-1, keepdim=True)
        terms = torch.where(left_out[..., None, None], -torch.inf, terms)
    if terms.numel() == 0:  # which has no largest
        return terms
    powers = (terms - terms.detach().amax(dim=(2, 3, 4), keepdim=True)).exp()
    weights = powers / powers.sum(dim=(2, 3, 4), keepdim=True)
    if keep is None:
        return weights
    return weights * keep.transpose(2, 3)[..., None, None] / (1 - attn_drop)


def deformable_feature_aggregation(
    features,
    spatial_shape,
    scale_start_index,
    key_points,
    projection_mat,
    image_wh,
    logits,
    camera_logits=None,
    keep=None,
    attn_drop=0.0,
    visible_only=False,
) -> Tensor:
    """(bs, num_queries, C) float64; differentiable in all operands that are numbers."""
    cameras = key_points, projection_mat, image_wh
    weights = feature_aggregation_weights(
        *cameras, logits, camera_logits, keep, attn_drop, visible_only, spatial_shape.shape[1]
    )
    return deformable_aggregation(features, spatial_shape, scale_start_index, project_points(*cameras), weights)


def box_key_points(anchor, fix_scale, logits=None) -> Tensor:
    """(bs, num_anchor, num_fixed + num_learnable, 3) float64; differentiable in all three."""
    anchor = anchor.double()
    places = fix_scale.double().expand(*anchor.shape[:2], -1, -1)
    if logits is not None:
        learned = torch.sigmoid(logits.double()) - 0.5
        places = torch.cat([places, learned.unflatten(-1, (learned.shape[-1] // 3, 3))], dim=2)
    x, y, z = (places * anchor[:, :, None, 3:6].exp()).unbind(-1)
    sin, cos = anchor[..., 6:7], anchor[..., 7:8]
    return torch.stack([cos * x - sin * y, sin * x + cos * y, z], dim=-1) + anchor[:, :, None, :3]


def linear_relu_norm(feature, weight, bias, norm_weight, norm_bias, eps=1e-5) -> Tensor:
    """(bs, num_queries, out_features) float64; differentiable in all five."""
    feature, weight, bias, norm_weight, norm_bias = (
        t.double() for t in (feature, weight, bias, norm_weight, norm_bias)
    )
    linear = torch.einsum("bqi,oi->bqo", feature, weight) + bias
    activated = linear.where(~(linear < 0), 0.0)
    centred = activated - activated.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm_weight + norm_bias


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
