"""The softmax of deformable feature aggregation's logits in Triton: over cameras, levels and points, for each group.

A query's logits are rows (levels, points, groups): one a camera, or one that all cameras share, to which every camera
adds a row of its own. Sums over a softmax are taken in tiles, and numbers that are as small as -inf count for nothing.

With w the weights, and u their gradients, a logit has the gradient w * (u - mean), where the mean is the sum of w * u
over the group. The backward of the op leaves the terms w * u, which only visible pairs have, and the means;
`gradient_kernel` takes from each logit's terms what the mean takes. A program owns some of a row's logits, in all
cameras, of some queries: so it knows what the cameras' rows lose.
"""

import triton
import triton.language as tl


@triton.jit
def share(logit, largest):
    """The exponential of what a logit has above the largest; nothing of -inf, whatever the largest is.

    It has no name, since Inductor would write a constant of this module into its own source as `-inf`, which is none.
    """
    return tl.where(logit == float("-inf"), 0, tl.exp(logit - largest))


@triton.jit
def softmax_of_query(
    query_logits,
    camera_logits,
    query_hidden,
    group,
    num_points,
    num_cams,
    num_levels,
    GROUPS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    HAS_CAMERA_LOGITS: tl.constexpr,
    VISIBLE_ONLY: tl.constexpr,
    wide: tl.constexpr,
):
    """The largest logit of each of the groups, and the sum of the exponentials of what the others have above it.

    The pointers are to what is the query's, and the cameras'. Each element of a tile, samples x groups, has a softmax
    of its own until all logits have been seen.
    """
    num_samples = num_levels * num_points
    largest = tl.full([BLOCK_S, group.shape[0]], float("-inf"), dtype=wide)
    total = tl.zeros([BLOCK_S, group.shape[0]], dtype=wide)
    for first in range(0, num_samples, BLOCK_S):
        sample = first + tl.arange(0, BLOCK_S)
        at = sample[:, None] * GROUPS + group[None, :]
        exists = (sample < num_samples)[:, None] & (group < GROUPS)[None, :]
        for cam in range(num_cams):
            in_camera = cam * (num_samples * GROUPS) + at
            counts = exists
            if VISIBLE_ONLY:
                flag = query_hidden + cam * num_points + sample % num_points
                counts = exists & (tl.load(flag, mask=sample < num_samples, other=1) == 0)[:, None]
            if HAS_CAMERA_LOGITS:
                logit = tl.load(query_logits + at, mask=counts, other=float("-inf")).to(wide)
                logit += tl.load(camera_logits + in_camera, mask=counts, other=0).to(wide)
            else:
                logit = tl.load(query_logits + in_camera, mask=counts, other=float("-inf")).to(wide)
            top = tl.maximum(largest, logit)
            total = total * tl.where(largest == top, 1, tl.exp(largest - top)) + share(logit, top)
            largest = top
    top = tl.max(largest, axis=0)
    return top, tl.sum(total * share(largest, top[None, :]), axis=0)


@triton.jit(do_not_specialize=["num_queries", "num_points", "num_cams", "row"])
def gradient_kernel(
    logits,
    camera_logits,
    statistics,
    means,
    terms,
    camera_sums,
    hidden,
    num_queries,
    num_points,
    num_cams,
    row,
    GROUPS: tl.constexpr,
    BLOCK_CAM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    HAS_CAMERA_LOGITS: tl.constexpr,
    VISIBLE_ONLY: tl.constexpr,
    NEEDS_LOGITS: tl.constexpr,
    NEEDS_CAMERAS: tl.constexpr,
):
    wide = statistics.dtype.element_ty
    row_blocks = tl.cdiv(row, BLOCK_R)
    query_blocks = tl.cdiv(num_queries, BLOCK_Q)
    place = tl.program_id(0) % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(0) // row_blocks
    batch = (block // query_blocks).to(tl.int64)
    first = block % query_blocks * BLOCK_Q
    cam = tl.arange(0, BLOCK_CAM)
    group = place % GROUPS
    point = place // GROUPS % num_points
    is_place = place < row
    exists = is_place[:, None] & (cam < num_cams)[None, :]
    in_camera = cam[None, :] * row + place[:, None]
    first_cam = batch * num_cams
    own_rows = 1 if HAS_CAMERA_LOGITS else num_cams

    if HAS_CAMERA_LOGITS:
        of_camera = tl.load(camera_logits + first_cam * row + in_camera, mask=exists, other=0).to(wide)

    all_taken = tl.zeros([BLOCK_R, BLOCK_CAM], dtype=wide)
    for number in range(first, tl.minimum(first + BLOCK_Q, num_queries)):
        query = batch * num_queries + number
        first_logit = query * own_rows * row
        if HAS_CAMERA_LOGITS:
            logit = tl.load(logits + first_logit + place, mask=is_place, other=0).to(wide)[:, None] + of_camera
        else:
            logit = tl.load(logits + first_logit + in_camera, mask=exists, other=0).to(wide)
        counts = exists
        if VISIBLE_ONLY:
            flag = hidden + (query * num_cams + cam[None, :]) * num_points + point[:, None]
            counts = exists & (tl.load(flag, mask=exists, other=1) == 0)
        of_group = query * GROUPS + group
        largest = tl.load(statistics + 2 * of_group, mask=is_place, other=0)
        total = tl.load(statistics + 2 * of_group + 1, mask=is_place, other=1)
        mean = tl.load(means + of_group, mask=is_place, other=0)
        taken = tl.where(counts, share(logit, largest[:, None]) * (mean / total)[:, None], 0)
        if NEEDS_LOGITS:
            if HAS_CAMERA_LOGITS:
                term = tl.load(terms + first_logit + place, mask=is_place, other=0)
                tl.store(terms + first_logit + place, term - tl.sum(taken, axis=1), mask=is_place)
            else:
                term = tl.load(terms + first_logit + in_camera, mask=exists, other=0)
                tl.store(terms + first_logit + in_camera, term - taken, mask=exists)
        all_taken += taken
    if NEEDS_CAMERAS:
        tl.atomic_add(camera_sums + first_cam * row + in_camera, -all_taken, mask=exists, sem="relaxed")
