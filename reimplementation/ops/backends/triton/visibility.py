"""Which pairs of key point and camera a softmax over visible pairs leaves out, in Triton.

A program owns a block of key points, and looks through all cameras twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from .projection import is_clear, load_camera, locate

BLOCK = 128


@triton.jit(do_not_specialize=["num_all_points", "num_queries", "num_points", "num_cams"])
def hidden_kernel(
    key_points,
    projection,
    image_wh,
    hidden,
    num_all_points,
    num_queries,
    num_points,
    num_cams,
    HAS_SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = number < num_all_points
    query = number // num_points
    first_cam = query // num_queries * num_cams
    x = tl.load(key_points + 3 * number, mask=exists, other=0)
    y = tl.load(key_points + 3 * number + 1, mask=exists, other=0)
    z = tl.load(key_points + 3 * number + 2, mask=exists, other=0)
    is_seen = number < 0
    for cam in range(num_cams):
        camera = load_camera(projection, image_wh, first_cam + cam, exists, HAS_SIZES)
        across, down, depth = locate(x, y, z, camera)
        is_seen = is_seen | is_clear(across, down, depth)
    for cam in range(num_cams):
        camera = load_camera(projection, image_wh, first_cam + cam, exists, HAS_SIZES)
        across, down, depth = locate(x, y, z, camera)
        is_hidden = is_seen & (is_clear(across, down, depth) == 0)
        at = (query * num_cams + cam) * num_points + number % num_points
        tl.store(hidden + at, is_hidden.to(tl.uint8), mask=exists)


def find_hidden(key_points: Tensor, projection_mat: Tensor, image_wh: Tensor | None) -> Tensor:
    """(bs, num_queries, num_cams, num_pts) uint8: the camera does not see the point, and another one does."""
    batch_size, num_queries, num_points = key_points.shape[:3]
    num_cams = projection_mat.shape[1]
    num_all_points = batch_size * num_queries * num_points
    hidden = key_points.new_empty(batch_size, num_queries, num_cams, num_points, dtype=torch.uint8)
    wrap_triton(hidden_kernel)[(-(-num_all_points // BLOCK),)](
        key_points.contiguous(),
        projection_mat.contiguous(),
        key_points if image_wh is None else image_wh.contiguous(),
        hidden,
        num_all_points,
        num_queries,
        num_points,
        num_cams,
        HAS_SIZES=image_wh is not None,
        BLOCK=BLOCK,
    )
    return hidden
