// Key points projected into every camera, on the CPU.
//
// Threads share out the key points. Each goes through the cameras, whose matrices stay in the cache; key points are read and
// locations are written once, in the order in which they lie in memory. The backward adds a key point's gradient up over the
// cameras in their order: the same bits for any number of threads.
#include "points/project_points.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <type_traits>

#include "cpu/capability.h"

namespace reimplementation::points {

using namespace cpu;

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

template <typename Kernel>
void share_out_points(const Kernel& kernel) {
  const ProjectPointsSizes& sizes = kernel.sizes;
  parallel_run(kernel, sizes.batch * sizes.sample_points(), items_per_thread(work_of_point(sizes)));
}

}  // namespace

Tensor project_points_cpu(
    const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh) {
  return run_project_points(
      key_points, projection_mat, image_wh,
      [](const auto& sizes, const auto& cameras, const auto* points, auto* locations) {
        using T = std::decay_t<decltype(*points)>;
        share_out_points(Forward<T>{sizes, cameras, points, locations});
      });
}

Tensor project_points_backward_cpu(
    const Tensor& grad_output,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh) {
  return run_project_points_backward(
      grad_output, key_points, projection_mat, image_wh,
      [](const auto& sizes, const auto& cameras, const auto* points, const auto* grad_locations, auto* grad_points) {
        using T = std::decay_t<decltype(*points)>;
        share_out_points(Backward<T>{sizes, cameras, points, grad_locations, grad_points});
      });
}

}  // namespace reimplementation::points
