"""Deformable feature aggregation in Triton: projection, softmax, culling and sampling in one kernel.

A program owns one query and, in the forward, some of its groups. First it goes through the query's logits, and has the
largest one and the sum of the exponentials of each group, the two numbers that are kept for the backward. Then it
projects key points into cameras, a pair of these a thread, and takes the pairs that are seen one after the other, as
deformable aggregation does (aggregation_samples.py); their weights are made of logits and those two numbers where they
are needed. Neither locations nor weights are ever in memory. With ``visible_only`` a kernel before this one marks what
the softmax leaves out (visibility.py).

The backward projects again and makes the weights again. It takes the gradients of locations back to the key points,
camera by camera, and leaves to feature_softmax.py what the logits get. Atomics add up the features' gradient, and the
terms of logits that cameras or queries share, in float32 at least.
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
    next_number,
)
from .feature_softmax import gradient_kernel, share, softmax_of_query
from .footprint import (
    beside,
    bounded_level,
    check_rows,
    padded,
    refuse_determinism,
    sums_like,
    warps,
    zeros_like,
)
from .projection import load_camera, locate, point_gradient
from .visibility import find_hidden

SOFTMAX_TILE = 256  # elements, samples x groups
GRADIENT_TILE = 1024  # elements, logits of a row x cameras
QUERIES = 16  # of a program that takes their means from logits


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    features,
    shapes,
    starts,
    key_points,
    projection,
    image_wh,
    logits,
    camera_logits,
    hidden,
    keep,
    output,
    statistics,
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
    BLOCK_S: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_CAMERA_LOGITS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    VISIBLE_ONLY: tl.constexpr,
):
    wide = key_points.dtype.element_ty
    CHANNELS: tl.constexpr = GROUPS * GROUP_CHANNELS
    group_blocks: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    query = (tl.program_id(0) // group_blocks).to(tl.int64)
    batch = query // num_queries
    group = tl.program_id(0) % group_blocks * BLOCK_G + tl.arange(0, BLOCK_G)
    is_group = group < GROUPS
    within = tl.arange(0, BLOCK_C)
    level = tl.arange(0, BLOCK_L)
    channel = group[:, None] * GROUP_CHANNELS + within[None, :]
    is_channel = is_group[:, None] & (within[None, :] < GROUP_CHANNELS)
    first_row = features + batch * num_rows * CHANNELS
    row = num_levels * num_points * GROUPS
    query_logits = logits + query * (row if HAS_CAMERA_LOGITS else num_cams * row)
    of_cameras = camera_logits + batch * num_cams * row
    num_pairs = num_points * num_cams

    largest, sum_of_shares = softmax_of_query(
        query_logits,
        of_cameras,
        hidden + query * num_pairs,
        group,
        num_points,
        num_cams,
        num_levels,
        GROUPS,
        BLOCK_S,
        HAS_CAMERA_LOGITS,
        VISIBLE_ONLY,
        wide,
    )
    tl.store(statistics + 2 * (query * GROUPS + group), largest, mask=is_group)
    tl.store(statistics + 2 * (query * GROUPS + group) + 1, sum_of_shares, mask=is_group)
    scale = KEPT_SCALE / sum_of_shares

    total = tl.zeros([BLOCK_L, BLOCK_G, BLOCK_C], dtype=wide)
    for first in range(0, num_pairs, PAIRS):
        number = first + tl.arange(0, PAIRS)  # also the place of a pair among the query's flags
        cam = number // num_points
        is_seen = number < num_pairs
        point = key_points + 3 * (query * num_points + number % num_points)
        across, down, _ = locate(
            tl.load(point, mask=is_seen, other=0),
            tl.load(point + 1, mask=is_seen, other=0),
            tl.load(point + 2, mask=is_seen, other=0),
            load_camera(projection, image_wh, batch * num_cams + cam, is_seen, HAS_SIZES),
        )
        is_seen = is_seen & is_inside(across, down)
        if VISIBLE_ONLY:
            is_seen = is_seen & (tl.load(hidden + query * num_pairs + number, mask=is_seen, other=1) == 0)
        if HAS_KEEP:
            is_seen = is_seen & (tl.load(keep + query * num_pairs + number, mask=is_seen, other=0) != 0)
        found = next_number(is_seen, number, first - 1)
        for _ in range(tl.sum(is_seen.to(tl.int32))):
            x = tl.sum(tl.where(number == found, across, 0))
            y = tl.sum(tl.where(number == found, down, 0))
            of_level = found // num_points * num_levels + level
            height, width, start = bounded_level(
                tl.load(shapes + 2 * of_level, mask=level < num_levels, other=0),
                tl.load(shapes + 2 * of_level + 1, mask=level < num_levels, other=0),
                tl.load(starts + of_level, mask=level < num_levels, other=0),
                num_rows,
            )
            logit_at = (level * num_points + found % num_points)[:, None] * GROUPS + group[None, :]
            in_camera = found // num_points * row + logit_at
            counts = (height > 0)[:, None] & is_group[None, :]
            logit = tl.load(query_logits + (logit_at if HAS_CAMERA_LOGITS else in_camera), mask=counts, other=0)
            logit = logit.to(wide)
            if HAS_CAMERA_LOGITS:
                logit += tl.load(of_cameras + in_camera, mask=counts, other=0).to(wide)
            weight = tl.where(counts, share(logit, largest[None, :]) * scale[None, :], 0)
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
    key_points,
    projection,
    image_wh,
    logits,
    camera_logits,
    hidden,
    keep,
    statistics,
    grad_features,
    grad_key_points,
    terms,
    camera_sums,
    means,
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
    BLOCK_P: tl.constexpr,
    KEPT_SCALE: tl.constexpr,
    HAS_SIZES: tl.constexpr,
    HAS_CAMERA_LOGITS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    VISIBLE_ONLY: tl.constexpr,
    NEEDS_FEATURES: tl.constexpr,
    NEEDS_POINTS: tl.constexpr,
    NEEDS_LOGITS: tl.constexpr,
    NEEDS_CAMERAS: tl.constexpr,
):
    wide = key_points.dtype.element_ty
    CHANNELS: tl.constexpr = GROUPS * GROUP_CHANNELS
    query = tl.program_id(0).to(tl.int64)
    batch = query // num_queries
    group = tl.arange(0, BLOCK_G)
    is_group = group < GROUPS
    within = tl.arange(0, BLOCK_C)
    level = tl.arange(0, BLOCK_L)
    channel = group[:, None] * GROUP_CHANNELS + within[None, :]
    is_channel = is_group[:, None] & (within[None, :] < GROUP_CHANNELS)
    first_element = batch * num_rows * CHANNELS
    row = num_levels * num_points * GROUPS
    first_logit = query * (row if HAS_CAMERA_LOGITS else num_cams * row)
    first_of_cameras = batch * num_cams * row
    toward = tl.load(grad_output + query * CHANNELS + channel, mask=is_channel, other=0).to(wide)
    toward = tl.broadcast_to(toward[None, :, :], [BLOCK_L, BLOCK_G, BLOCK_C])
    largest = tl.load(statistics + 2 * (query * GROUPS + group), mask=is_group, other=0)
    scale = KEPT_SCALE / tl.load(statistics + 2 * (query * GROUPS + group) + 1, mask=is_group, other=1)

    all_terms = tl.zeros([BLOCK_L, BLOCK_G], dtype=wide)
    for cam in range(num_cams):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * (cam * num_levels + level), mask=level < num_levels, other=0),
            tl.load(shapes + 2 * (cam * num_levels + level) + 1, mask=level < num_levels, other=0),
            tl.load(starts + cam * num_levels + level, mask=level < num_levels, other=0),
            num_rows,
        )
        matrix = projection + 16 * (batch * num_cams + cam)
        image_width = tl.full([], 1, dtype=wide)
        image_height = image_width
        if HAS_SIZES:
            image_width = tl.load(image_wh + 2 * (batch * num_cams + cam))
            image_height = tl.load(image_wh + 2 * (batch * num_cams + cam) + 1)
        camera = (
            tl.load(matrix),
            tl.load(matrix + 1),
            tl.load(matrix + 2),
            tl.load(matrix + 3),
            tl.load(matrix + 4),
            tl.load(matrix + 5),
            tl.load(matrix + 6),
            tl.load(matrix + 7),
            tl.load(matrix + 8),
            tl.load(matrix + 9),
            tl.load(matrix + 10),
            tl.load(matrix + 11),
            image_width,
            image_height,
        )
        for first in range(0, num_points, BLOCK_P):
            number = first + tl.arange(0, BLOCK_P)
            is_seen = number < num_points
            point = 3 * (query * num_points + number)
            across, down, depth = locate(
                tl.load(key_points + point, mask=is_seen, other=0),
                tl.load(key_points + point + 1, mask=is_seen, other=0),
                tl.load(key_points + point + 2, mask=is_seen, other=0),
                camera,
            )
            is_seen = is_seen & is_inside(across, down)
            flag = (query * num_cams + cam) * num_points + number
            if VISIBLE_ONLY:
                is_seen = is_seen & (tl.load(hidden + flag, mask=is_seen, other=1) == 0)
            if HAS_KEEP:
                is_seen = is_seen & (tl.load(keep + flag, mask=is_seen, other=0) != 0)
            of_x = tl.zeros([BLOCK_P], dtype=wide)
            of_y = of_x
            found = next_number(is_seen, number, first - 1)
            for _ in range(tl.sum(is_seen.to(tl.int32))):
                x = tl.sum(tl.where(number == found, across, 0))
                y = tl.sum(tl.where(number == found, down, 0))
                logit_at = (level * num_points + found)[:, None] * GROUPS + group[None, :]
                in_camera = cam * row + logit_at
                own_at = first_logit + (logit_at if HAS_CAMERA_LOGITS else in_camera)
                counts = (height > 0)[:, None] & is_group[None, :]
                logit = tl.load(logits + own_at, mask=counts, other=0).to(wide)
                if HAS_CAMERA_LOGITS:
                    logit += tl.load(camera_logits + first_of_cameras + in_camera, mask=counts, other=0).to(wide)
                weight = tl.where(counts, share(logit, largest[None, :]) * scale[None, :], 0)
                footprint = footprint_of(x, y, height, width, start)
                if NEEDS_POINTS or NEEDS_LOGITS or NEEDS_CAMERAS:
                    average, slope_x, slope_y = differentiate(
                        features + first_element, toward, footprint, channel, is_channel, CHANNELS
                    )
                    term = weight * average
                    all_terms += term
                    if NEEDS_POINTS:
                        of_x = tl.where(number == found, tl.sum(weight * slope_x), of_x)
                        of_y = tl.where(number == found, tl.sum(weight * slope_y), of_y)
                    if NEEDS_LOGITS:
                        tl.atomic_add(terms + own_at, term, mask=counts, sem="relaxed")
                    if NEEDS_CAMERAS:
                        tl.atomic_add(camera_sums + first_of_cameras + in_camera, term, mask=counts, sem="relaxed")
                if NEEDS_FEATURES:  # when everything has been loaded: no load is moved ahead of an atomic
                    add_to_corners(
                        grad_features + first_element,
                        toward * weight[:, :, None],
                        footprint,
                        channel,
                        is_channel,
                        CHANNELS,
                    )
                found = next_number(is_seen, number, found)
            if NEEDS_POINTS:  # the program's own, to which it adds camera by camera
                of_point = point_gradient(of_x, of_y, across, down, depth, camera)
                for axis in tl.static_range(3):
                    tl.atomic_add(grad_key_points + point + axis, of_point[axis], mask=is_seen, sem="relaxed")
    if NEEDS_LOGITS or NEEDS_CAMERAS:
        tl.store(means + query * GROUPS + group, tl.sum(all_terms, axis=0), mask=is_group)


def forward(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    key_points: Tensor,
    projection_mat: Tensor,
    image_wh: Tensor | None,
    logits: Tensor,
    camera_logits: Tensor | None,
    keep: Tensor | None,
    attn_drop: float,
    visible_only: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the two numbers of each softmax, of operands that were checked."""
    batch_size, num_rows, channels = feature_maps.shape
    num_queries, num_points = key_points.shape[1:3]
    num_cams, num_levels = scale_start_index.shape
    num_groups = count_groups(scale_start_index, key_points, logits, camera_logits)
    check_rows("num_feat", num_rows)
    output = feature_maps.new_empty(batch_size, num_queries, channels)
    statistics = key_points.new_empty(batch_size, num_queries, num_groups, 2)
    if min(output.numel(), num_rows, num_cams, num_levels, num_points) == 0:
        return output.zero_(), statistics.zero_()
    block_l, block_g, block_c = padded(num_levels), padded(num_groups), padded(channels // num_groups)
    while block_g > 1 and block_l * block_g * block_c > FORWARD_TILE:
        block_g //= 2
    wrap_triton(forward_kernel)[(batch_size * num_queries * -(-num_groups // block_g),)](
        **operands_of_features(
            feature_maps, spatial_shape, scale_start_index, projection_mat, image_wh, keep, attn_drop
        ),
        **operands_of_weights(key_points, projection_mat, image_wh, logits, camera_logits, visible_only),
        key_points=key_points.contiguous(),
        output=output,
        statistics=statistics,
        num_levels=num_levels,
        GROUPS=num_groups,
        GROUP_CHANNELS=int(channels // num_groups),
        BLOCK_L=block_l,
        BLOCK_G=block_g,
        BLOCK_C=block_c,
        PAIRS=PAIRS,
        BLOCK_S=min(padded(num_levels * num_points), max(SOFTMAX_TILE // block_g, 1)),
        num_warps=warps(block_l * block_g * block_c),
    )
    return output, statistics


def backward(
    grad_output: Tensor,
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    key_points: Tensor,
    projection_mat: Tensor,
    image_wh: Tensor | None,
    logits: Tensor,
    camera_logits: Tensor | None,
    keep: Tensor | None,
    statistics: Tensor,
    attn_drop: float,
    visible_only: bool,
    needs_feature_maps: bool,
    needs_key_points: bool,
    needs_logits: bool,
    needs_camera_logits: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of features, key points, logits and cameras' logits, of operands that were checked."""
    batch_size, num_rows, channels = feature_maps.shape
    num_queries, num_points = key_points.shape[1:3]
    num_cams, num_levels = scale_start_index.shape
    num_groups = count_groups(scale_start_index, key_points, logits, camera_logits)
    needs_camera_logits = needs_camera_logits and camera_logits is not None
    check_rows("num_feat", num_rows)
    refuse_determinism(deterministic and needs_feature_maps, "feature_maps")
    refuse_determinism(deterministic and needs_camera_logits, "camera_logits")
    grad_features = sums_like(feature_maps, needs_feature_maps)
    grad_key_points = zeros_like(key_points, needs_key_points)
    terms = sums_like(logits, needs_logits)
    camera_sums = sums_like(logits if camera_logits is None else camera_logits, needs_camera_logits)
    if min(grad_output.numel(), num_rows, num_cams, num_levels, num_points) > 0:
        block_l, block_g, block_c = padded(num_levels), padded(num_groups), padded(channels // num_groups)
        means = statistics.new_empty(batch_size, num_queries, num_groups)
        of_weights = operands_of_weights(key_points, projection_mat, image_wh, logits, camera_logits, visible_only)
        wrap_triton(backward_kernel)[(batch_size * num_queries,)](
            **operands_of_features(
                feature_maps, spatial_shape, scale_start_index, projection_mat, image_wh, keep, attn_drop
            ),
            **of_weights,
            key_points=key_points.contiguous(),
            grad_output=grad_output.contiguous(),
            statistics=statistics.contiguous(),
            grad_features=grad_features,
            grad_key_points=grad_key_points,
            terms=terms,
            camera_sums=camera_sums,
            means=means,
            num_levels=num_levels,
            GROUPS=num_groups,
            GROUP_CHANNELS=int(channels // num_groups),
            BLOCK_L=block_l,
            BLOCK_G=block_g,
            BLOCK_C=block_c,
            BLOCK_P=min(padded(num_points), PAIRS),
            NEEDS_FEATURES=needs_feature_maps,
            NEEDS_POINTS=needs_key_points,
            NEEDS_LOGITS=needs_logits,
            NEEDS_CAMERAS=needs_camera_logits,
            num_warps=warps(block_l * block_g * block_c),
        )
        if needs_logits or needs_camera_logits:
            row = num_levels * num_points * num_groups
            block_r = min(padded(row), max(GRADIENT_TILE // padded(num_cams), 1))
            programs = batch_size * -(-num_queries // QUERIES) * -(-row // block_r)
            wrap_triton(gradient_kernel)[(programs,)](
                **of_weights,
                statistics=statistics.contiguous(),
                means=means,
                terms=terms,
                camera_sums=camera_sums,
                row=row,
                GROUPS=num_groups,
                BLOCK_CAM=padded(num_cams),
                BLOCK_R=block_r,
                BLOCK_Q=QUERIES,
                NEEDS_LOGITS=needs_logits,
                NEEDS_CAMERAS=needs_camera_logits,
            )
    return (
        grad_features.to(feature_maps.dtype),
        grad_key_points,
        terms.to(logits.dtype),
        camera_sums.to(logits.dtype),
    )


def count_groups(scale_start_index: Tensor, key_points: Tensor, logits: Tensor, camera_logits: Tensor | None) -> int:
    """How many groups the logits have: as a number, for which alone kernels are compiled."""
    num_cams, num_levels = scale_start_index.shape
    samples = num_levels * key_points.shape[2] * (num_cams if camera_logits is None else 1)
    return int(logits.shape[2] // max(samples, 1)) or 1


def operands_of_features(
    feature_maps: Tensor,
    spatial_shape: Tensor,
    scale_start_index: Tensor,
    projection_mat: Tensor,
    image_wh: Tensor | None,
    keep: Tensor | None,
    attn_drop: float,
) -> dict:
    """Arguments by which both kernels know the features, and what places them; what is left out is another tensor,
    which nobody reads."""
    return {
        "features": feature_maps.contiguous(),
        "shapes": beside(spatial_shape, feature_maps),
        "starts": beside(scale_start_index, feature_maps),
        "projection": projection_mat.contiguous(),
        "image_wh": projection_mat if image_wh is None else image_wh.contiguous(),
        "keep": projection_mat if keep is None else keep.contiguous(),
        "num_rows": feature_maps.shape[1],
        "KEPT_SCALE": 1.0 if keep is None else 1 / (1 - float(attn_drop)),
        "HAS_SIZES": image_wh is not None,
        "HAS_KEEP": keep is not None,
    }


def operands_of_weights(
    key_points: Tensor,
    projection_mat: Tensor,
    image_wh: Tensor | None,
    logits: Tensor,
    camera_logits: Tensor | None,
    visible_only: bool,
) -> dict:
    """Arguments by which all kernels know the softmax; likewise."""
    return {
        "logits": logits.contiguous(),
        "camera_logits": logits if camera_logits is None else camera_logits.contiguous(),
        "hidden": find_hidden(key_points, projection_mat, image_wh) if visible_only else logits,
        "num_queries": key_points.shape[1],
        "num_points": key_points.shape[2],
        "num_cams": projection_mat.shape[1],
        "HAS_CAMERA_LOGITS": camera_logits is not None,
        "VISIBLE_ONLY": visible_only,
    }
