"""Multi-scale deformable attention from offsets and logits in Triton: locations and softmax within the kernel.

A program, which owns one head of a block of queries, first reads all their logits, in a tile queries x samples, for the
largest one and the sum of the exponentials. Then it walks through levels and points (attention_samples.py), where it
makes a location of reference point and offset, and a weight of logit and those two numbers.

The backward does the same, and leaves the gradients u of the weights w, as many as there are logits. A second kernel
makes those of logits of them, w * (u - mean), where the mean is the sum of w * u. Reference points belong to all heads
of a query: each head leaves its part, and PyTorch sums them.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .attention_samples import (
    SIZES,
    TOUCHES,
    add_to_corners,
    channels_of_head,
    differentiate,
    footprint_of,
    interpolate,
    length_of_row,
    place_of_program,
    tile,
    unrolled,
)
from .footprint import (
    beside,
    bounded_level,
    check_rows,
    divide,
    empty_like,
    in_layout_of,
    padded,
    refuse_determinism,
    sums_like,
)

SAMPLES_TILE = 1024  # elements, queries x samples


@triton.jit
def softmax_of_queries(own_logits, exists, num_samples, BLOCK_S: tl.constexpr, wide: tl.constexpr):
    """The logits of a block of queries (queries, samples), the largest ones, and what takes the exponential of what a
    logit has above them to its weight."""
    sample = tl.arange(0, BLOCK_S)
    is_logit = exists[:, None] & (sample < num_samples)[None, :]
    logit = tl.load(own_logits[:, None] + sample[None, :], mask=is_logit, other=0).to(wide)
    logit = tl.where((sample < num_samples)[None, :], logit, float("-inf"))
    largest = tl.max(logit, axis=1)
    return logit, largest, 1 / tl.sum(tl.exp(logit - largest[:, None]), axis=1)


@triton.jit
def moved(offset, size, unit, BOXES: tl.constexpr):
    """How far an offset moves a sample along an axis, normalised: it counts pixels of a level, or units of a box."""
    if BOXES:
        return offset * unit
    return divide(offset, tl.maximum(size, 1))


@triton.jit
def footprint_at(centre, offset, unit, level, exists, BOXES: tl.constexpr):
    """The footprint of each query's sample in a level, which is height, width and first row: where its offset moves it
    from its centre. Of centres, offsets and units these are x and y."""
    height, width, start = level
    x = centre[0] + moved(offset[0], width, unit[0], BOXES)
    y = centre[1] + moved(offset[1], height, unit[1], BOXES)
    return footprint_of(x, y, height, width, start, exists)


@triton.jit
def product(factor, gradient):
    """A gradient times a factor; nothing where there is no gradient, whatever the factor is."""
    return tl.where(gradient == 0, 0, factor * gradient)


@triton.jit(do_not_specialize=[*SIZES, "offsets_of_query", "logits_of_query"])
def forward_kernel(
    value,
    shapes,
    starts,
    references,
    offsets,
    logits,
    scales,
    output,
    num_rows,
    num_queries,
    num_heads,
    num_levels,
    num_points,
    offsets_of_query,
    logits_of_query,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    UNROLLED: tl.constexpr,
    BOXES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    wide = references.dtype.element_ty
    COORDINATES: tl.constexpr = 4 if BOXES else 2
    batch, head, query = place_of_program(num_queries, num_heads, BLOCK_Q)
    channel, is_channel = channels_of_head(CHANNELS, BLOCK_D)
    exists = query < num_queries
    row = batch * num_queries + query
    num_samples = num_levels * num_points
    first_channel = value + (batch * num_rows * num_heads + head) * CHANNELS + channel
    row_length = length_of_row(num_heads, CHANNELS)
    own_offsets = offsets + row * offsets_of_query + head * (num_samples * 2)
    own_logits = logits + row * logits_of_query + head * num_samples
    _, largest, scale = softmax_of_queries(own_logits, exists, num_samples, BLOCK_S, wide)
    half = tl.full([], 0.5, dtype=wide) / num_points

    total = tl.zeros([BLOCK_Q, BLOCK_D], dtype=wide)
    for level in range(num_levels):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1), tl.load(starts + level), num_rows
        )
        if HAS_SCALES:
            half = 0.5 * tl.load(scales + level)
        reference = row if SHARED else row * num_levels + level
        centre_x = tl.load(references + reference * COORDINATES, mask=exists, other=0)
        centre_y = tl.load(references + reference * COORDINATES + 1, mask=exists, other=0)
        unit_x = centre_x
        unit_y = centre_y
        if BOXES:
            unit_x = tl.load(references + reference * COORDINATES + 2, mask=exists, other=0) * half
            unit_y = tl.load(references + reference * COORDINATES + 3, mask=exists, other=0) * half
        for first in range(0, num_points, UNROLLED):
            sample = level * num_points + first
            for point in tl.static_range(UNROLLED):
                offset_x = tl.load(own_offsets + 2 * sample + 2 * point, mask=exists, other=0).to(wide)
                offset_y = tl.load(own_offsets + 2 * sample + 2 * point + 1, mask=exists, other=0).to(wide)
                logit = tl.load(own_logits + sample + point, mask=exists, other=0).to(wide)
                centre, offset, unit = (centre_x, centre_y), (offset_x, offset_y), (unit_x, unit_y)
                footprint = footprint_at(centre, offset, unit, (height, width, start), exists, BOXES)
                touches = footprint[TOUCHES]
                weight = tl.exp(logit - largest) * scale
                sampled = interpolate(first_channel, footprint, row_length, is_channel, wide)
                total += tl.where(touches[:, None], weight[:, None] * sampled, 0)
    output_at = (row * num_heads + head)[:, None] * CHANNELS + channel[None, :]
    tl.store(output + output_at, total, mask=exists[:, None] & is_channel[None, :])


@triton.jit(do_not_specialize=[*SIZES, "offsets_of_query", "logits_of_query"])
def backward_kernel(
    grad_output,
    value,
    shapes,
    starts,
    references,
    offsets,
    logits,
    scales,
    grad_value,
    grad_references,
    grad_offsets,
    grad_weights,
    num_rows,
    num_queries,
    num_heads,
    num_levels,
    num_points,
    offsets_of_query,
    logits_of_query,
    CHANNELS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BOXES: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_REFERENCES: tl.constexpr,
    NEEDS_OFFSETS: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
):
    wide = references.dtype.element_ty
    COORDINATES: tl.constexpr = 4 if BOXES else 2
    batch, head, query = place_of_program(num_queries, num_heads, BLOCK_Q)
    channel, is_channel = channels_of_head(CHANNELS, BLOCK_D)
    exists = query < num_queries
    row = batch * num_queries + query
    item = row * num_heads + head
    num_samples = num_levels * num_points
    first_element = (batch * num_rows * num_heads + head) * CHANNELS + channel
    row_length = length_of_row(num_heads, CHANNELS)
    own_offsets = offsets + row * offsets_of_query + head * (num_samples * 2)
    own_logits = logits + row * logits_of_query + head * num_samples
    output_at = item[:, None] * CHANNELS + channel[None, :]
    is_output = exists[:, None] & is_channel[None, :]
    toward = tl.load(grad_output + output_at, mask=is_output, other=0).to(wide)
    _, largest, scale = softmax_of_queries(own_logits, exists, num_samples, BLOCK_S, wide)
    half = tl.full([], 0.5, dtype=wide) / num_points

    of_x = tl.zeros([BLOCK_Q], dtype=wide)  # of reference points, and of their boxes' sizes
    of_y = of_x
    of_width = of_x
    of_height = of_x
    for level in range(num_levels):
        height, width, start = bounded_level(
            tl.load(shapes + 2 * level), tl.load(shapes + 2 * level + 1), tl.load(starts + level), num_rows
        )
        if HAS_SCALES:
            half = 0.5 * tl.load(scales + level)
        reference = row if SHARED else row * num_levels + level
        centre_x = tl.load(references + reference * COORDINATES, mask=exists, other=0)
        centre_y = tl.load(references + reference * COORDINATES + 1, mask=exists, other=0)
        unit_x = centre_x
        unit_y = centre_y
        if BOXES:
            unit_x = tl.load(references + reference * COORDINATES + 2, mask=exists, other=0) * half
            unit_y = tl.load(references + reference * COORDINATES + 3, mask=exists, other=0) * half
        for point in range(num_points):
            sample = level * num_points + point
            offset_x = tl.load(own_offsets + 2 * sample, mask=exists, other=0).to(wide)
            offset_y = tl.load(own_offsets + 2 * sample + 1, mask=exists, other=0).to(wide)
            logit = tl.load(own_logits + sample, mask=exists, other=0).to(wide)
            centre, offset, unit = (centre_x, centre_y), (offset_x, offset_y), (unit_x, unit_y)
            footprint = footprint_at(centre, offset, unit, (height, width, start), exists, BOXES)
            touches = footprint[TOUCHES]
            weight = tl.exp(logit - largest) * scale
            if NEEDS_REFERENCES or NEEDS_OFFSETS or NEEDS_WEIGHTS:
                average, slope_x, slope_y = differentiate(
                    value + first_element, toward, footprint, row_length, is_channel
                )
                slope_x = tl.where(touches, weight * slope_x, 0)
                slope_y = tl.where(touches, weight * slope_y, 0)
                if NEEDS_WEIGHTS:
                    tl.store(grad_weights + item * num_samples + sample, average, mask=exists)
                if NEEDS_OFFSETS:
                    at = grad_offsets + 2 * (item * num_samples + sample)
                    if BOXES:
                        tl.store(at, product(unit_x, slope_x), mask=exists)
                        tl.store(at + 1, product(unit_y, slope_y), mask=exists)
                    else:
                        tl.store(at, tl.where(touches, slope_x / width, 0), mask=exists)
                        tl.store(at + 1, tl.where(touches, slope_y / height, 0), mask=exists)
                if NEEDS_REFERENCES:
                    of_x += slope_x
                    of_y += slope_y
                    of_width += product(offset_x * half, slope_x)
                    of_height += product(offset_y * half, slope_y)
            if NEEDS_VALUE:  # when everything has been loaded: no load is moved ahead of an atomic
                added = toward * weight[:, None]
                add_to_corners(grad_value + first_element, added, footprint, row_length, is_channel)
        if NEEDS_REFERENCES:  # where levels share them, the last level's sums are those of all
            at = grad_references + (item if SHARED else item * num_levels + level) * COORDINATES
            tl.store(at, of_x, mask=exists)
            tl.store(at + 1, of_y, mask=exists)
            if BOXES:
                tl.store(at + 2, of_width, mask=exists)
                tl.store(at + 3, of_height, mask=exists)
            if not SHARED:
                of_x = tl.zeros([BLOCK_Q], dtype=wide)
                of_y = of_x
                of_width = of_x
                of_height = of_x


@triton.jit(do_not_specialize=["num_items", "num_heads", "num_samples", "logits_of_query"])
def logits_gradient_kernel(
    logits,
    grad_weights,
    grad_logits,
    num_items,
    num_heads,
    num_samples,
    logits_of_query,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A program owns some items, heads of queries: a tile items x samples."""
    wide = grad_weights.dtype.element_ty
    item = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = item < num_items
    own_logits = logits + item // num_heads * logits_of_query + item % num_heads * num_samples
    logit, largest, scale = softmax_of_queries(own_logits, exists, num_samples, BLOCK_S, wide)
    weight = tl.exp(logit - largest[:, None]) * scale[:, None]
    sample = tl.arange(0, BLOCK_S)
    is_logit = exists[:, None] & (sample < num_samples)[None, :]
    at = (item * num_samples)[:, None] + sample[None, :]
    of_weight = tl.load(grad_weights + at, mask=is_logit, other=0)
    mean = tl.sum(weight * of_weight, axis=1)
    tl.store(grad_logits + at, weight * (of_weight - mean[:, None]), mask=is_logit)


def forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    offset_scale: Tensor | None,
) -> Tensor:
    """The output, of operands that were checked."""
    batch_size, num_rows, num_heads, channels = value.shape
    num_queries = attention_logits.shape[1]
    check_rows("S", num_rows)
    output = value.new_empty(batch_size, num_queries, num_heads * channels)
    if min(output.numel(), attention_logits.numel()) == 0:
        return output.zero_()
    shared = shared_arguments(
        value.element_size(),
        value,
        spatial_shapes,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        offset_scale,
    )
    block_q = shared["BLOCK_Q"]
    wrap_triton(forward_kernel)[(batch_size * -(-num_queries // block_q) * num_heads,)](
        **shared,
        output=output,
        UNROLLED=unrolled(shared["num_points"]),
    )
    return output


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    offset_scale: Tensor | None,
    needs_value: bool,
    needs_reference_points: bool,
    needs_sampling_offsets: bool,
    needs_attention_logits: bool,
    deterministic: bool = False,
    half_sums: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of value, reference points, offsets and logits, of operands that were checked.

    ``half_sums`` allows sums in half precision; there are none here.
    """
    batch_size, num_rows, num_heads, channels = value.shape
    num_queries = attention_logits.shape[1]
    check_rows("S", num_rows)
    refuse_determinism(deterministic and needs_value, "value")
    grad_value = sums_like(value, needs_value)
    by_head = (batch_size, num_queries, num_heads, *reference_points.shape[2:])
    grad_references = reference_points.new_zeros(by_head if needs_reference_points else (0, 0, 0))
    grad_offsets = empty_like(sampling_offsets, needs_sampling_offsets)
    grad_logits = empty_like(attention_logits, needs_attention_logits)
    if min(grad_output.numel(), attention_logits.numel()) == 0:
        grad_offsets, grad_logits = grad_offsets.zero_(), grad_logits.zero_()
    else:
        shared = shared_arguments(
            grad_value.element_size(),
            value,
            spatial_shapes,
            level_start_index,
            reference_points,
            sampling_offsets,
            attention_logits,
            offset_scale,
        )
        block_q = shared["BLOCK_Q"]
        grad_weights = reference_points.new_empty(grad_logits.shape)
        wrap_triton(backward_kernel)[(batch_size * -(-num_queries // block_q) * num_heads,)](
            **shared,
            grad_output=grad_output.contiguous(),
            grad_value=grad_value,
            grad_references=grad_references,
            grad_offsets=grad_offsets,
            grad_weights=grad_weights,
            NEEDS_VALUE=needs_value,
            NEEDS_REFERENCES=needs_reference_points,
            NEEDS_OFFSETS=needs_sampling_offsets,
            NEEDS_WEIGHTS=needs_attention_logits,
        )
        if needs_attention_logits:
            num_items, block_i = batch_size * num_queries * num_heads, max(SAMPLES_TILE // shared["BLOCK_S"], 1)
            wrap_triton(logits_gradient_kernel)[(-(-num_items // block_i),)](
                shared["logits"],
                grad_weights,
                grad_logits,
                num_items,
                num_heads,
                shared["num_levels"] * shared["num_points"],
                shared["logits_of_query"],
                BLOCK_Q=block_i,
                BLOCK_S=shared["BLOCK_S"],
            )
    return (
        grad_value.to(value.dtype),
        grad_references.sum(2) if needs_reference_points else reference_points.new_empty(0),
        in_layout_of(sampling_offsets, grad_offsets),
        in_layout_of(attention_logits, grad_logits),
    )


def shared_arguments(
    element_bytes: int,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    offset_scale: Tensor | None,
) -> dict:
    """What both kernels take. Scales that are left out are another tensor, which none of them reads."""
    num_queries, num_heads, num_levels, num_points = attention_logits.shape[1:]
    block_s = padded(num_levels * num_points)
    block_q, block_d, num_warps = tile(int(value.shape[3]), element_bytes)
    offsets, offsets_of_query = by_query(sampling_offsets)
    logits, logits_of_query = by_query(attention_logits)
    return {
        "value": value.contiguous(),
        "shapes": beside(spatial_shapes, value),
        "starts": beside(level_start_index, value),
        "references": reference_points.contiguous(),
        "offsets": offsets,
        "logits": logits,
        "scales": reference_points if offset_scale is None else offset_scale.contiguous(),
        "num_rows": value.shape[1],
        "num_queries": num_queries,
        "num_heads": num_heads,
        "num_levels": num_levels,
        "num_points": num_points,
        "offsets_of_query": offsets_of_query,
        "logits_of_query": logits_of_query,
        "CHANNELS": int(value.shape[3]),
        "BLOCK_Q": max(min(block_q, SAMPLES_TILE // block_s), 1),
        "BLOCK_D": block_d,
        "BLOCK_S": block_s,
        "BOXES": bool(reference_points.shape[3] == 4),
        "SHARED": bool(reference_points.shape[2] == 1),
        "HAS_SCALES": offset_scale is not None,
        "num_warps": num_warps,
    }


def by_query(operand: Tensor) -> tuple[Tensor, int]:
    """An operand, and how far its queries lie apart; copied where one's numbers do not lie side by side.

    A slice of what a linear layer predicts for a query is read where it lies.
    """
    apart = operand.stride(1)
    if operand[0, 0].is_contiguous() and operand.stride(0) == operand.shape[1] * apart:
        return operand, apart
    operand = operand.contiguous()
    return operand, operand.stride(1)
