"""The nearest box on each ray, in Triton: a ray a thread.

A program owns a block of a view's rays. It keeps the nearest box so far in registers and walks through the view's
boxes, whose numbers all its threads read together; so a ray is read once and an answer written once, where PyTorch's
operators would read and write every ray some forty times a box.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # rays a program


@triton.jit
def slab(origin, half, inverse):
    """Where rays enter and leave -half <= origin + t * direction <= half, given 1 / direction."""
    middle = -origin * inverse
    reach = half * tl.abs(inverse)
    return middle - reach, middle + reach


@triton.jit(do_not_specialize=["num_rays", "num_boxes", "num_views", "batch_stride", "view_stride"])
def trace_kernel(
    origin,
    direction,
    center,
    half,
    cos_sin,
    distance,
    nearest,
    num_rays,
    num_boxes,
    num_views,
    batch_stride,
    view_stride,
    near,
    BLOCK: tl.constexpr,
):
    view = tl.program_id(1).to(tl.int64)
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = ray < num_rays
    rays = direction + (view // num_views) * batch_stride + (view % num_views) * view_stride + 3 * ray
    dx = tl.load(rays, mask=exists, other=1.0)
    dy = tl.load(rays + 1, mask=exists, other=1.0)
    dz = tl.load(rays + 2, mask=exists, other=1.0)
    inverse_z = 1.0 / dz
    first = tl.full((BLOCK,), float("inf"), tl.float32)
    which = tl.full((BLOCK,), -1, tl.int64)
    for k in range(num_boxes):
        box = view * num_boxes + k
        cos = tl.load(cos_sin + 2 * box)
        sin = tl.load(cos_sin + 2 * box + 1)
        x = tl.load(origin + 3 * view) - tl.load(center + 3 * box)
        y = tl.load(origin + 3 * view + 1) - tl.load(center + 3 * box + 1)
        z = tl.load(origin + 3 * view + 2) - tl.load(center + 3 * box + 2)
        begins, ends = slab(cos * x + sin * y, tl.load(half + 3 * box), 1.0 / (cos * dx + sin * dy))
        enters, leaves = slab(cos * y - sin * x, tl.load(half + 3 * box + 1), 1.0 / (cos * dy - sin * dx))
        begins, ends = tl.maximum(begins, enters), tl.minimum(ends, leaves)
        enters, leaves = slab(z, tl.load(half + 3 * box + 2), inverse_z)
        begins, ends = tl.maximum(begins, enters), tl.minimum(ends, leaves)
        is_nearer = (begins < ends) & (begins > near) & (begins < first)
        first = tl.where(is_nearer, begins, first)
        which = tl.where(is_nearer, k, which)
    place = view * num_rays + ray
    tl.store(distance + place, first, mask=exists)
    tl.store(nearest + place, which, mask=exists)


def trace(
    origin: Tensor, direction: Tensor, center: Tensor, half: Tensor, cos_sin: Tensor, near: float
) -> tuple[Tensor, Tensor]:
    """The first box on each ray.

    Args:
        origin: (bs, v, 3), where a view's rays begin; all tensors are float32, on one GPU.
        direction: (bs, v, r, 3), of any strides between views.
        center, half: (bs, v, k, 3) and cos_sin: (bs, v, k, 2), the boxes that each view may see. A box without extent
            is met by no ray.
        near: what begins no farther than this is not seen.

    Returns:
        How far along each ray the first box begins (bs, v, r), infinite: none; and which one, int64, -1: none.
    """
    bs, views, rays = direction.shape[:3]
    distance = torch.empty(bs, views, rays, device=direction.device)
    nearest = torch.empty(bs, views, rays, dtype=torch.int64, device=direction.device)
    if direction.stride()[2:] != (3, 1):
        direction = direction.contiguous()
    boxes = (part.contiguous() for part in (center, half, cos_sin))
    trace_kernel[(triton.cdiv(rays, BLOCK), bs * views)](
        origin.contiguous(),
        direction,
        *boxes,
        distance,
        nearest,
        rays,
        center.shape[2],
        views,
        direction.stride(0),
        direction.stride(1),
        near,
        BLOCK=BLOCK,
    )
    return distance, nearest
