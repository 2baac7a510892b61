// Key points of boxes on CUDA.
//
// Forward: one thread per key point. A block is (points, boxes): consecutive threads have consecutive key points of a box, then
// those of the next box, so that they write memory from end to end, and nobody divides to find its place. Each works out its
// box's sizes for itself, three exponentials, rather than wait for somebody who does.
//
// Backward: one warp per box, whose lanes take the points in turn and write the gradients of their logits. Each adds up in
// registers what the anchor gets from its points, eight numbers; these are then summed over the lanes in a fixed order, and the
// lanes write one column of the anchor each. No atomics: the same bits every time.
//
// Everything is read and written once, 0.4 MB for 900 boxes of 13 points: what takes the time is the launch and a round trip to
// memory. In PyTorch the same is eleven kernels, each with its own.
#include "points/box_key_points.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"

namespace reimplementation::points {

using namespace cuda;

namespace {

constexpr int THREADS = 128;

template <typename T>
__global__ void __launch_bounds__(THREADS) box_key_points_forward(BoxKeyPoints<T> op, T* key_points) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= op.sizes.boxes()) {
    return;
  }
  const int64_t num_points = op.sizes.num_points();
  const Box<T> box(op.anchor(i));
  for (int64_t point = threadIdx.x; point < num_points; point += blockDim.x) {
    box.put(place_of(op, i, point), key_points + (i * num_points + point) * 3);
  }
}

// Blocks of (WARP, boxes): a whole warp leaves together where there is no box for it.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    box_key_points_backward_kernel(BoxKeyPoints<T> op, const T* grad_key_points, T* grad_anchors, T* grad_logits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (i >= op.sizes.boxes()) {
    return;
  }
  const int lane = threadIdx.x;
  const int64_t num_points = op.sizes.num_points();
  const Box<T> box(op.anchor(i));
  BoxGradient<T> gradient;
  for (int64_t point = lane; point < num_points; point += WARP) {
    const Place<T> place = place_of(op, i, point);
    T grad_scale[3];
    box.add_gradient(place, grad_key_points + (i * num_points + point) * 3, gradient, grad_scale);
    if (op.is_learned(point)) {
      for (int axis = 0; axis < 3; ++axis) {
        grad_logits[op.logit(i, point) + axis] = logit_gradient(grad_scale[axis], place.sigmoid[axis]);
      }
    }
  }
  __syncwarp();  // lanes may have taken a different number of points

#pragma unroll
  for (int column = 0; column < BOX_COLUMNS; ++column) {
    gradient.sums[column] = sum_of_lanes(gradient.sums[column]);
  }
  box.end(gradient);
  T own = 0;  // of the velocity
#pragma unroll
  for (int column = 0; column < BOX_COLUMNS; ++column) {  // an index known to the compiler keeps the sums in registers
    own = lane == column ? gradient.sums[column] : own;
  }
  if (lane < op.sizes.columns) {
    grad_anchors[i * op.sizes.columns + lane] = own;
  }
}

// Blocks that take `block_boxes` boxes each.
unsigned grid_of(const BoxKeyPointsSizes& sizes, int64_t block_boxes) {
  return static_cast<unsigned>((sizes.boxes() + block_boxes - 1) / block_boxes);
}

}  // namespace

Tensor box_key_points_cuda(const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits) {
  return run_box_key_points(anchor, fix_scale, logits, [&](const auto& op, auto* key_points) {
    const torch::stable::accelerator::DeviceGuard guard(anchor.get_device_index());
    const int block_points = static_cast<int>(std::min<int64_t>(op.sizes.num_points(), WARP));
    const dim3 block(block_points, THREADS / block_points);
    box_key_points_forward<<<grid_of(op.sizes, block.y), block, 0, current_stream(anchor.get_device_index())>>>(
        op, key_points);
    check_launch("box_key_points");
  });
}

std::tuple<Tensor, Tensor> box_key_points_backward_cuda(
    const Tensor& grad_output, const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits) {
  return run_box_key_points_backward(
      grad_output, anchor, fix_scale, logits,
      [&](const auto& op, const auto* grad_key_points, auto* grad_anchors, auto* grad_logits) {
        const torch::stable::accelerator::DeviceGuard guard(anchor.get_device_index());
        const dim3 block(WARP, THREADS / WARP);
        box_key_points_backward_kernel<<<
            grid_of(op.sizes, block.y), block, 0, current_stream(anchor.get_device_index())>>>(
            op, grad_key_points, grad_anchors, grad_logits);
        check_launch("box_key_points_backward");
      });
}

}  // namespace reimplementation::points
