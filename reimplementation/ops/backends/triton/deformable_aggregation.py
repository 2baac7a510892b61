"""Deformable aggregation in Triton.

A program owns one query and, in the forward, some of its groups. It walks through the query's pairs of camera and
point, and passes over those outside the image: on a rig five in six. Of any other it takes all levels at once, in tiles

    levels x groups x channels of a group        4 x 4 x 32 in the forward, 4 x 8 x 32 in the backward of SparseDrive

so that the four loads of a footprint bring 64 KB a query on their way, lanes read neighbouring channels in vectors, and
a weight is loaded once for the channels that share it. The forward adds up a tile without ever summing over levels
until it has seen everything; only then do threads exchange anything.

The backward reads the same rows. It multiplies them with the output's gradient, sums over the channels of a group, and
has the gradients of weights; these, times the slopes, summed over levels and groups, are those of the location. Both
are the program's own. The features' gradient is everybody's: it is added up with atomics, in float32 at least.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .footprint import (
    beside,
    bounded_level,
    check_rows,
    corner_pixel,
    corner_signs,
    corner_weights,
    empty_like,
    first_pixel,
    in_layout_of,
    padded,
    refuse_determinism,
    sums_like,
    warps,
)

SIZES = ["num_rows", "num_queries", "num_points", "num_cams", "num_levels"]
"""Arguments for whose values Triton must not compile anew, as it would for 1 and for multiples of 16."""
FORWARD_TILE = 512  # elements; with fewer groups a program there are more programs to share out among multiprocessors


@triton.jit
def is_seen(x, y):
    """Whether a location lies in the open unit square, which NaN does not."""
    return (x > 0) & (x < 1) & (y > 0) & (y < 1)


@triton.jit
def pixel_positions(x, y, height, width):
    """The pixel before a location in each level, and how far behind it the location lies: left, top, right, down."""
    left, right = first_pixel(x * width - 0.5)
    top, down = first_pixel(y * height - 0.5)
    return left, top, right, down


@triton.jit
def corner_channels(corner: tl.constexpr, left, top, height, width, start, channel, is_channel, CHANNELS: tl.constexpr):
    """Of a corner in each level: where its channels lie behind the first row, which of them exist, and the pixel."""
    row, inside = corner_pixel(corner, left, top, height, width, start)
    place = row.to(tl.int64)[:, None, None] * CHANNELS + channel[None, :, :]
    return place, inside[:, None, None] & is_channel[None, :, :], inside


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

    total = tl.zeros([BLOCK_L, BLOCK_G, BLOCK_C], dtype=wide)
    for cam in range(num_cams):
        first_level = cam * num_levels
        height, width, start = bounded_level(
            tl.load(shapes + 2 * (first_level + level), mask=level < num_levels, other=0),
            tl.load(shapes + 2 * (first_level + level) + 1, mask=level < num_levels, other=0),
            tl.load(starts + first_level + level, mask=level < num_levels, other=0),
            num_rows,
        )
        for point in range(num_points):
            pair = (query * num_points + point) * num_cams + cam
            x, y = tl.load(locations + 2 * pair), tl.load(locations + 2 * pair + 1)
            if is_seen(x, y):
                weight_at = (pair * num_levels + level[:, None]) * GROUPS + group[None, :]
                counts = (height > 0)[:, None] & (group < GROUPS)[None, :]
                weight = tl.load(weights + weight_at, mask=counts, other=0).to(wide)
                left, top, right, down = pixel_positions(x, y, height, width)
                sample = tl.zeros([BLOCK_L, BLOCK_G, BLOCK_C], dtype=wide)
                for corner in tl.static_range(4):
                    place, is_read, _ = corner_channels(
                        corner, left, top, height, width, start, channel, is_channel, CHANNELS
                    )
                    along_x, along_y = corner_weights(corner, right, down)
                    pixel = tl.load(first_row + place, mask=is_read, other=0).to(wide)
                    sample += (along_x * along_y)[:, None, None] * pixel
                total += weight[:, :, None] * sample
    tl.store(output + query * CHANNELS + channel, tl.sum(total, axis=0), mask=is_channel)


@triton.jit
def differentiate(
    first_row, toward, left, top, right, down, height, width, start, channel, is_channel, CHANNELS: tl.constexpr
):
    """Of the samples of a pair, each (levels, groups): what the output's gradient has in common with the average of
    the four pixels, and with its slopes along x and along y."""
    average = tl.zeros([toward.shape[0], toward.shape[1]], dtype=toward.dtype)
    slope_x = average
    slope_y = average
    for corner in tl.static_range(4):
        place, is_read, inside = corner_channels(corner, left, top, height, width, start, channel, is_channel, CHANNELS)
        along_x, along_y = corner_weights(corner, right, down)
        pixel = tl.load(first_row + place, mask=is_read, other=0).to(toward.dtype)
        product = tl.where(inside[:, None], tl.sum(pixel * toward, axis=2), 0)
        sign_x, sign_y = corner_signs(corner)
        average += (along_x * along_y)[:, None] * product
        slope_x += (sign_x * along_y)[:, None] * product
        slope_y += (sign_y * along_x)[:, None] * product
    return average, slope_x * width[:, None], slope_y * height[:, None]


@triton.jit
def add_to_corners(
    first_row, added, left, top, right, down, height, width, start, channel, is_channel, CHANNELS: tl.constexpr
):
    """Add a tile to the four corners' rows, times what each weighs."""
    for corner in tl.static_range(4):
        place, is_read, _ = corner_channels(corner, left, top, height, width, start, channel, is_channel, CHANNELS)
        along_x, along_y = corner_weights(corner, right, down)
        tl.atomic_add(first_row + place, added * (along_x * along_y)[:, None, None], mask=is_read, sem="relaxed")


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
    toward = tl.load(grad_output + query * CHANNELS + channel, mask=is_channel, other=0).to(wide)
    toward = tl.broadcast_to(toward[None, :, :], [BLOCK_L, BLOCK_G, BLOCK_C])

    for cam in range(num_cams):
        first_level = cam * num_levels
        height, width, start = bounded_level(
            tl.load(shapes + 2 * (first_level + level), mask=level < num_levels, other=0),
            tl.load(shapes + 2 * (first_level + level) + 1, mask=level < num_levels, other=0),
            tl.load(starts + first_level + level, mask=level < num_levels, other=0),
            num_rows,
        )
        for point in range(num_points):
            pair = (query * num_points + point) * num_cams + cam
            weight_at = (pair * num_levels + level[:, None]) * GROUPS + group[None, :]
            x, y = tl.load(locations + 2 * pair), tl.load(locations + 2 * pair + 1)
            if is_seen(x, y):
                weight = tl.load(weights + weight_at, mask=is_weight & (height > 0)[:, None], other=0).to(wide)
                left, top, right, down = pixel_positions(x, y, height, width)
                if NEEDS_LOCATIONS or NEEDS_WEIGHTS:
                    average, slope_x, slope_y = differentiate(
                        features + first_element,
                        toward,
                        left,
                        top,
                        right,
                        down,
                        height,
                        width,
                        start,
                        channel,
                        is_channel,
                        CHANNELS,
                    )
                    if NEEDS_WEIGHTS:
                        tl.store(grad_weights + weight_at, average, mask=is_weight)
                    if NEEDS_LOCATIONS:
                        slopes = tl.reshape(tl.join(weight * slope_x, weight * slope_y), [BLOCK_L * BLOCK_G, 2])
                        tl.store(grad_locations + 2 * pair + axis, tl.sum(slopes, axis=0))
                if NEEDS_FEATURES:  # when everything has been loaded: no load is moved ahead of an atomic
                    add_to_corners(
                        grad_features + first_element,
                        toward * weight[:, :, None],
                        left,
                        top,
                        right,
                        down,
                        height,
                        width,
                        start,
                        channel,
                        is_channel,
                        CHANNELS,
                    )
            else:
                if NEEDS_WEIGHTS:
                    tl.store(grad_weights + weight_at, tl.zeros([BLOCK_L, BLOCK_G], dtype=wide), mask=is_weight)
                if NEEDS_LOCATIONS:
                    tl.store(grad_locations + 2 * pair + axis, tl.zeros([2], dtype=wide))


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
    grad_locations = empty_like(sampling_location, needs_sampling_location)
    grad_weights = empty_like(weights, needs_weights)
    if grad_output.numel() == 0:
        grad_locations, grad_weights = grad_locations.zero_(), grad_weights.zero_()
    else:
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
            NEEDS_FEATURES=needs_feature_maps,
            NEEDS_LOCATIONS=needs_sampling_location,
            NEEDS_WEIGHTS=needs_weights,
            num_warps=warps(block_l * block_g * block_c),
        )
    return (
        grad_features.to(feature_maps.dtype),
        in_layout_of(sampling_location, grad_locations),
        in_layout_of(weights, grad_weights),
    )
