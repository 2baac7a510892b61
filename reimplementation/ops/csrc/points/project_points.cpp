// Key points projected into every camera, on the CPU.
//
// Threads share out the key points. Each goes through the cameras, whose matrices stay in the cache; key points are read and
// locations are written once, in the order in which they lie in memory. The backward adds a key point's gradient up over the
// cameras in their order: the same bits for any number of threads.
#include "points/project_points.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "cpu/capability.h"

namespace reimplementation::cpu {
namespace {

constexpr int64_t WORK_OF_PAIR = 32;  // about as many multiplications as a point in a camera takes, divisions included

int64_t work_of_point(const ProjectPointsSizes& sizes) {
  return WORK_OF_PAIR * (1 + sizes.num_cams);
}

// The locations of key points [begin, end), numbered through the batch.
template <typename T>
struct Forward {
  ProjectPointsSizes sizes;
  Cameras<T> cameras;
  const T* key_points;
  Location<T>* locations;  // (batch, num_anchors, num_points, num_cams)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const Cameras<T> own = cameras.of_sample(i / sizes.sample_points(), sizes.num_cams);
      const T point[3] = {key_points[3 * i], key_points[3 * i + 1], key_points[3 * i + 2]};
      for (int64_t camera = 0; camera < sizes.num_cams; ++camera) {
        locations[i * sizes.num_cams + camera] = own.locate(camera, point);
      }
    }
  }
};

// The gradients of key points [begin, end).
template <typename T>
struct Backward {
  ProjectPointsSizes sizes;
  Cameras<T> cameras;
  const T* key_points;
  const T* grad_locations;
  T* grad_points;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const Cameras<T> own = cameras.of_sample(i / sizes.sample_points(), sizes.num_cams);
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
};

}  // namespace

Tensor project_points(const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh) {
  const ProjectPointsSizes sizes = check_project_points(key_points, projection_mat, image_wh);
  const ProjectPointsOperands operands(key_points, projection_mat, image_wh);
  const Tensor locations = allocate(key_points, {sizes.batch, sizes.num_anchors, sizes.num_points, sizes.num_cams, 2});
  with_real_type(key_points, [&](auto zero) {
    using T = decltype(zero);
    const Forward<T> kernel{
        sizes,
        operands.cameras<T>(),
        static_cast<const T*>(operands.key_points.const_data_ptr()),
        static_cast<Location<T>*>(locations.mutable_data_ptr())};
    parallel_run(kernel, key_points.numel() / 3, items_per_thread(work_of_point(sizes)));
  });
  return locations;
}

Tensor project_points_backward(
    const Tensor& grad_output,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh) {
  const ProjectPointsSizes sizes = check_project_points(key_points, projection_mat, image_wh);
  check_project_points_gradient(grad_output, key_points, sizes);
  const ProjectPointsOperands operands(key_points, projection_mat, image_wh);
  const Tensor grad_locations = as_contiguous(grad_output);
  const Tensor grad_points = allocate(key_points, {sizes.batch, sizes.num_anchors, sizes.num_points, 3});
  with_real_type(key_points, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> kernel{
        sizes,
        operands.cameras<T>(),
        static_cast<const T*>(operands.key_points.const_data_ptr()),
        static_cast<const T*>(grad_locations.const_data_ptr()),
        static_cast<T*>(grad_points.mutable_data_ptr())};
    parallel_run(kernel, key_points.numel() / 3, items_per_thread(work_of_point(sizes)));
  });
  return grad_points;
}

}  // namespace reimplementation::cpu
