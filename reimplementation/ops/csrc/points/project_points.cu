// Key points projected into every camera, on CUDA.
//
// Forward: one thread per (key point, camera). A block is (cameras, points) of one sample,
//
//        threadIdx.x   camera  0 1 2 3 4 5
//   threadIdx.y = 0    point   a a a a a a
//               = 1            b b b b b b       in memory: a0 a1 ... a5 b0 b1 ... b5
//
// so that consecutive threads write consecutive locations, one vector each, and nobody divides to find its place. More
// cameras than a row of the block has threads are taken in turns; so are more samples than a grid has rows.
//
// Backward: one thread per key point, which goes through the cameras and adds its gradient up in registers. Neighbours read
// the same matrix at the same time: one broadcast. No atomics: the same bits every time.
//
// A key point and its locations are read and written once; matrices come from the L1 cache. At 900 queries of 13 points and 6
// cameras that is 0.7 MB, less than a microsecond of an H200's bandwidth: what remains is the launch and one round trip to
// memory. In PyTorch the same is six kernels, each with its own.
#include "points/project_points.h"

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"

namespace reimplementation::points {

using namespace cuda;

namespace {

constexpr int THREADS = 128;

template <typename T>
__global__ void __launch_bounds__(THREADS)
    project_points_forward(ProjectPointsSizes sizes, Cameras<T> cameras, const T* key_points, Location<T>* locations) {
  const int64_t point_of_sample = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (point_of_sample >= sizes.sample_points()) {
    return;
  }
  for (int64_t sample = blockIdx.y; sample < sizes.batch; sample += gridDim.y) {
    const Cameras<T> own = cameras.of_sample(sample, sizes.num_cams);
    const int64_t i = sample * sizes.sample_points() + point_of_sample;
    const T point[3] = {key_points[3 * i], key_points[3 * i + 1], key_points[3 * i + 2]};
    for (int64_t camera = threadIdx.x; camera < sizes.num_cams; camera += blockDim.x) {
      locations[i * sizes.num_cams + camera] = own.locate(camera, point);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) project_points_backward_kernel(
    ProjectPointsSizes sizes, Cameras<T> cameras, const T* key_points, const T* grad_locations, T* grad_points) {
  const int64_t point_of_sample = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (point_of_sample >= sizes.sample_points()) {
    return;
  }
  for (int64_t sample = blockIdx.y; sample < sizes.batch; sample += gridDim.y) {
    const Cameras<T> own = cameras.of_sample(sample, sizes.num_cams);
    const int64_t i = sample * sizes.sample_points() + point_of_sample;
    const T point[3] = {key_points[3 * i], key_points[3 * i + 1], key_points[3 * i + 2]};
    T gradient[3] = {};
    for (int64_t camera = 0; camera < sizes.num_cams; ++camera) {
      const T* grad = grad_locations + (i * sizes.num_cams + camera) * 2;
      own.add_gradient(camera, point, grad[0], grad[1], gradient);
    }
    for (int axis = 0; axis < 3; ++axis) {
      grad_points[3 * i + axis] = gradient[axis];
    }
  }
}

// Blocks that take `block_points` points of a sample each.
dim3 grid_of(const ProjectPointsSizes& sizes, int64_t block_points) {
  return dim3((sizes.sample_points() + block_points - 1) / block_points, std::min(sizes.batch, MOST_BLOCKS));
}

}  // namespace

Tensor project_points_cuda(
    const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh) {
  return run_project_points(
      key_points, projection_mat, image_wh,
      [&](const auto& sizes, const auto& cameras, const auto* points, auto* locations) {
        const torch::stable::accelerator::DeviceGuard guard(key_points.get_device_index());
        const int block_cams = static_cast<int>(std::min<int64_t>(sizes.num_cams, WARP));
        const dim3 block(block_cams, THREADS / block_cams);
        project_points_forward<<<grid_of(sizes, block.y), block, 0, current_stream(key_points.get_device_index())>>>(
            sizes, cameras, points, locations);
        check_launch("project_points");
      });
}

Tensor project_points_backward_cuda(
    const Tensor& grad_output,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh) {
  return run_project_points_backward(
      grad_output, key_points, projection_mat, image_wh,
      [&](const auto& sizes, const auto& cameras, const auto* points, const auto* grad_locations, auto* grad_points) {
        const torch::stable::accelerator::DeviceGuard guard(key_points.get_device_index());
        project_points_backward_kernel<<<
            grid_of(sizes, THREADS), THREADS, 0, current_stream(key_points.get_device_index())>>>(
            sizes, cameras, points, grad_locations, grad_points);
        check_launch("project_points_backward");
      });
}

}  // namespace reimplementation::points
