"""Deformable aggregation in Triton.

A program owns one query and, in the forward, some of its groups. It looks at the locations of 32 pairs of point and
camera at once, and then takes those inside the image one after the other: on a rig that is one in six. The forward adds
up the tiles of samples (aggregation_samples.py) without ever summing over levels until it has seen everything; only
then do threads exchange anything of them.

The backward reads the same rows. It multiplies them with the output's gradient, sums over the channels of a group, and
has the gradients of weights; these, times the slopes, summed over levels and groups, are those of the location. Both
are the program's own. The features' gradient is everybody's: it is added up with atomics, in float32 at least.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .aggregation_samples import (
    FORWARD_TILE,
    PAIRS,
    SIZES,
    add_to_corners,
    differentiate,
    footprint_of,
    interpolate,
    is_inside,
    location_gradient,
    next_number,
)
from .footprint import (
    beside,
    bounded_level,
    check_rows,
    in_layout_of,
    padded,
    refuse_determinism,
    sums_like,
    warps,
    zeros_like,
)

BACKWARD_ELEMENTS_OF_A_THREAD = 4


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    features,
    shapes,
    starts,
    locations,
    weights,
    output,
    num_rows,
    num_queries,
    num_points,
    num_cams,
    num_levels,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRS: tl.constexpr,
):
    wide = locations.dtype.element_ty
    CHANNELS: tl.constexpr = GROUPS * GROUP_CHANNELS
    group_blocks: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    query = (tl.program_id(0) // group_blocks).to(tl.int64)
    group = tl.program_id(0) % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    within = tl.arange(0, BLOCK_C)
    level = tl.arange(0, BLOCK_L)
    channel = group[:, None] * GROUP_CHANNELS + within[None, :]
    is_channel = (group[:, None] < GROUPS) & (within[None, :] < GROUP_CHANNELS)
    first_row = features + query // num_queries * num_rows * CHANNELS
    num_pairs = num_points * num_cams
    first_pair = query * num_pairs

    total = tl.zeros([BLOCK_L, BLOCK_G, BLOCK_C], dtype=wide)
    for first in range(0, num_pairs, PAIRS):
        number = first + tl.arange(0, PAIRS)
        location = 2 * (first_pair + number % num_points * num_cams + number // num_points)
        all_x = tl.load(locations + location, mask=number < num_pairs, other=0)
        all_y = tl.load(locations + location + 1, mask=number < num_pairs, other=0)
        is_seen = is_inside(all_x, all_y)
        found = next_number(is_seen, number, first - 1)
        for _ in range(tl.sum(is_seen.to(tl.int32))):
            pair = first_pair + found % num_points * num_cams + found // num_points
            x, y = tl.load(locations + 2 * pair), tl.load(locations + 2 * pair + 1)
            of_level = found // num_points * num_levels + level
            height, width, start = bounded_level(
                tl.load(shapes + 2 * of_level, mask=level < num_levels, other=0),
                tl.load(shapes + 2 * of_level + 1, mask=level < num_levels, other=0),
                tl.load(starts + of_level, mask=level < num_levels, other=0),
                num_rows,
            )
            weight_at = (pair * num_levels + level[:, None]) * GROUPS + group[None, :]
            counts = (height > 0)[:, None] & (group < GROUPS)[None, :]
            weight = tl.load(weights + weight_at, mask=counts, other=0).to(wide)
            footprint = footprint_of(x, y, height, width, start)
            total += weight[:, :, None] * interpolate(first_row, footprint, channel, is_channel, CHANNELS, wide)
            found = next_number(is_seen, number, found)
    tl.store(output + query * CHANNELS + channel, tl.sum(total, axis=0), mask=is_channel)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_output,
    features,
    shapes,
    starts,
    locations,
    weights,
    grad_features,
    grad_locations,
    grad_weights,
    num_rows,
    num_queries,
    num_points,
    num_cams,
    num_levels,
    GROUPS: tl.constexpr,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PAIRS: tl.constexpr,
    NEEDS_FEATURES: tl.constexpr,
    NEEDS_LOCATIONS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):
    wide = locations.dtype.element_ty
    CHANNELS: tl.constexpr = GROUPS * GROUP_CHANNELS
    query = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_G)
    within = tl.arange(0, BLOCK_C)
    level = tl.arange(0, BLOCK_L)
    axis = tl.arange(0, 2)
    channel = group[:, None] * GROUP_CHANNELS + within[None, :]
    is_channel = (group[:, None] < GROUPS) & (within[None, :] < GROUP_CHANNELS)
    is_weight = (level < num_levels)[:, None] & (group < GROUPS)[None, :]
    first_element = query // num_queries * num_rows * CHANNELS
    num_pairs = num_points * num_cams
    first_pair = query * num_pairs
    toward = tl.load(grad_output + query * CHANNELS + channel, mask=is_channel, other=0).to(wide)
    toward = tl.broadcast_to(toward[None, :, :], [BLOCK_L, BLOCK_G, BLOCK_C])

    for first in range(0, num_pairs, PAIRS):
        number = first + tl.arange(0, PAIRS)
        location = 2 * (first_pair + number % num_points * num_cams + number // num_points)
        all_x = tl.load(locations + location, mask=number < num_pairs, other=0)
        all_y = tl.load(locations + location + 1, mask=number < num_pairs, other=0)
        is_seen = is_inside(all_x, all_y)
        found = next_number(is_seen, number, first - 1)
        for _ in range(tl.sum(is_seen.to(tl.int32))):
            pair = first_pair + found % num_points * num_cams + found // num_points
            x, y = tl.load(locations + 2 * pair), tl.load(locations + 2 * pair + 1)
            of_level = found // num_points * num_levels + level
            height, width, start = bounded_level(
                tl.load(shapes + 2 * of_level, mask=level < num_levels, other=0),
                tl.load(shapes + 2 * of_level + 1, mask=level < num_levels, other=0),
                tl.load(starts + of_level, mask=level < num_levels, other=0),
                num_rows,
            )
            weight_at = (pair * num_levels + level[:, None]) * GROUPS + group[None, :]
            weight = tl.load(weights + weight_at, mask=is_weight & (height > 0)[:, None], other=0).to(wide)
            footprint = footprint_of(x, y, height, width, start)
            if NEEDS_LOCATIONS or NEEDS_WEIGHTS:
                average, slope_x, slope_y = differentiate(
                    features + first_element, toward, footprint, channel, is_channel, CHANNELS
                )
                if NEEDS_WEIGHTS:
                    tl.store(grad_weights + weight_at, average, mask=is_weight)
                if NEEDS_LOCATIONS:
                    of_pair = location_gradient(weight, slope_x, slope_y)
                    tl.store(grad_locations + 2 * pair + axis, of_pair)
            if NEEDS_FEATURES:  # when everything has been loaded: no load is moved ahead of an atomic
                add_to_corners(
                    grad_features + first_element, toward * weight[:, :, None], footprint, channel, is_channel, CHANNELS
                )
            found = next_number(is_seen, number, found)


def forward(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
) -> Tensor:
    """The output, of operands that were checked."""
    batch_size, num_rows, channels = feature_maps.shape
    num_queries, num_points, num_cams, num_levels, num_groups = weights.shape[1:]
    check_rows("num_feat", num_rows)
    output = feature_maps.new_empty(batch_size, num_queries, channels)
    if output.numel() == 0:
        return output
    block_l, block_g, block_c = padded(num_levels), padded(num_groups), padded(channels // num_groups)
    while block_g > 1 and block_l * block_g * block_c > FORWARD_TILE:
        block_g //= 2
    wrap_triton(forward_kernel)[(batch_size * num_queries * -(-int(num_groups) // block_g),)](
        feature_maps.contiguous(),
        beside(spatial_shape, feature_maps),
        beside(scale_start_index, feature_maps),
        sampling_location.contiguous(),
        weights.contiguous(),
        output,
        num_rows,
        num_queries,
        num_points,
        num_cams,
        num_levels,
        GROUPS=int(num_groups),
        GROUP_CHANNELS=int(channels // num_groups),
        BLOCK_L=block_l,
        BLOCK_G=block_g,
        BLOCK_C=block_c,
        PAIRS=PAIRS,
        num_warps=warps(block_l * block_g * block_c),
    )
    return output


def backward(
    grad_output: Tensor,
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    sampling_location: Tensor,
    weights: Tensor,
    needs_feature_maps: bool,
    needs_sampling_location: bool,
    needs_weights: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of features, locations and weights, of operands that were checked."""
    batch_size, num_rows, channels = feature_maps.shape
    num_queries, num_points, num_cams, num_levels, num_groups = weights.shape[1:]
    check_rows("num_feat", num_rows)
    refuse_determinism(deterministic and needs_feature_maps, "feature_maps")
    grad_features = sums_like(feature_maps, needs_feature_maps)
    grad_locations = zeros_like(sampling_location, needs_sampling_location)  # pairs that are not seen get nothing
    grad_weights = zeros_like(weights, needs_weights)
    if grad_output.numel() > 0:
        block_l, block_g, block_c = padded(num_levels), padded(num_groups), padded(channels // num_groups)
        wrap_triton(backward_kernel)[(batch_size * num_queries,)](
            grad_output.contiguous(),
            feature_maps.contiguous(),
            beside(spatial_shape, feature_maps),
            beside(scale_start_index, feature_maps),
            sampling_location.contiguous(),
            weights.contiguous(),
            grad_features,
            grad_locations,
            grad_weights,
            num_rows,
            num_queries,
            num_points,
            num_cams,
            num_levels,
            GROUPS=int(num_groups),
            GROUP_CHANNELS=int(channels // num_groups),
            BLOCK_L=block_l,
            BLOCK_G=block_g,
            BLOCK_C=block_c,
            PAIRS=PAIRS,
            NEEDS_FEATURES=needs_feature_maps,
            NEEDS_LOCATIONS=needs_sampling_location,
            NEEDS_WEIGHTS=needs_weights,
            num_warps=warps(block_l * block_g * block_c, BACKWARD_ELEMENTS_OF_A_THREAD),
        )
    return (
        grad_features.to(feature_maps.dtype),
        in_layout_of(sampling_location, grad_locations),
        in_layout_of(weights, grad_weights),
    )
