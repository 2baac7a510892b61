// Key points seen by cameras: the arguments of project_points, checked, what a call does on any device, and one point in one
// camera, the same on every device.
//
// A camera's matrix takes (x, y, z, 1) to (u * depth, v * depth, depth, 1). The location is (u, v) in units of the image's
// size, and depths are raised to MIN_DEPTH: a point behind the camera then lands far outside.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "shared/checks.h"
#include "shared/platform.h"
#include "shared/tensors.h"

namespace reimplementation::points {

using torch::stable::Tensor;

constexpr double MIN_DEPTH = 1e-5;

struct ProjectPointsSizes {
  int64_t batch, num_anchors, num_points, num_cams;

  HOST_DEVICE int64_t sample_points() const {  // of one sample of the batch
    return num_anchors * num_points;
  }
};

inline ProjectPointsSizes check_project_points(
    const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh) {
  check_dim("key_points", key_points, 4);
  check_dim("projection_mat", projection_mat, 4);
  const ProjectPointsSizes sizes{key_points.size(0), key_points.size(1), key_points.size(2), projection_mat.size(1)};
  check_shape("key_points", key_points, {sizes.batch, sizes.num_anchors, sizes.num_points, 3});
  check_shape("projection_mat", projection_mat, {sizes.batch, sizes.num_cams, 4, 4});
  check_real("key_points", key_points);
  check_like("projection_mat", projection_mat, "key_points", key_points);
  if (image_wh) {
    check_shape("image_wh", *image_wh, {sizes.batch, sizes.num_cams, 2});
    check_like("image_wh", *image_wh, "key_points", key_points);
  }
  return sizes;
}

inline void check_project_points_gradient(
    const Tensor& grad_output, const Tensor& key_points, const ProjectPointsSizes& sizes) {
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_anchors, sizes.num_points, sizes.num_cams, 2});
  check_like("grad_output", grad_output, "key_points", key_points);
}

// Aligned, so that it is written as one vector.
template <typename T>
struct alignas(2 * sizeof(T)) Location {
  T x, y;
};

// The cameras of a sample.
template <typename T>
struct Cameras {
  const T* matrices;  // (num_cams, 4, 4)
  const T* image_wh;  // (num_cams, 2), or null: locations stay in pixels

  HOST_DEVICE Cameras of_sample(int64_t sample, int64_t num_cams) const {
    return {matrices + sample * num_cams * 16, image_wh == nullptr ? nullptr : image_wh + sample * num_cams * 2};
  }

  HOST_DEVICE static T min_depth() {
    return static_cast<T>(MIN_DEPTH);
  }

  HOST_DEVICE Location<T> locate(int64_t camera, const T (&point)[3]) const {
    T depth;
    return locate(camera, point, depth);
  }

  // The same, and the depth as it was before it was raised.
  HOST_DEVICE Location<T> locate(int64_t camera, const T (&point)[3], T& depth) const {
    const View view = see(camera, point);
    depth = view.depth;
    return {view.x / (view.extent * view.width), view.y / (view.extent * view.height)};
  }

  // Adds to a point's gradient what it gets from its location in one camera. A depth below MIN_DEPTH gets none.
  HOST_DEVICE void add_gradient(int64_t camera, const T (&point)[3], T grad_x, T grad_y, T (&gradient)[3]) const {
    const View view = see(camera, point);
    const T extent_x = view.extent * view.width;
    const T extent_y = view.extent * view.height;
    const T along_x = grad_x / extent_x;
    const T along_y = grad_y / extent_y;
    const T of_extent =
        -grad_x * (view.x / extent_x / extent_x) * view.width - grad_y * (view.y / extent_y / extent_y) * view.height;
    const T along_depth = view.depth >= min_depth() ? of_extent : 0;
    const T* matrix = matrices + camera * 16;
    for (int axis = 0; axis < 3; ++axis) {
      gradient[axis] += matrix[axis] * along_x + matrix[4 + axis] * along_y + matrix[8 + axis] * along_depth;
    }
  }

 private:
  struct View {
    T x, y, depth;  // x and y are still multiplied by the depth
    T extent;       // the depth that they are divided by
    T width, height;
  };

  HOST_DEVICE static T apply_row(const T* row, const T (&point)[3]) {
    return row[3] + row[0] * point[0] + row[1] * point[1] + row[2] * point[2];
  }

  HOST_DEVICE View see(int64_t camera, const T (&point)[3]) const {
    const T* matrix = matrices + camera * 16;
    const T depth = apply_row(matrix + 8, point);
    return {
        apply_row(matrix, point),
        apply_row(matrix + 4, point),
        depth,
        depth < min_depth() ? min_depth() : depth,  // NaN stays NaN
        image_wh == nullptr ? 1 : image_wh[2 * camera],
        image_wh == nullptr ? 1 : image_wh[2 * camera + 1]};
  }
};

// The operands of a call that was checked, contiguous. They must outlive what reads them.
struct ProjectPointsOperands {
  ProjectPointsOperands(const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh)
      : key_points(as_contiguous(key_points)),
        projection_mat(as_contiguous(projection_mat)),
        image_wh(as_contiguous(image_wh)) {}

  template <typename T>
  Cameras<T> cameras() const {
    return {
        static_cast<const T*>(projection_mat.const_data_ptr()),
        image_wh ? static_cast<const T*>(image_wh->const_data_ptr()) : nullptr};
  }

  const Tensor key_points, projection_mat;
  const std::optional<Tensor> image_wh;
};

// The op on any device: `run(sizes, cameras, key_points, locations)` gets what the call reads and where it writes, in the key
// points' type.
template <typename Run>
Tensor run_project_points(
    const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh, const Run& run) {
  const ProjectPointsSizes sizes = check_project_points(key_points, projection_mat, image_wh);
  const ProjectPointsOperands operands(key_points, projection_mat, image_wh);
  const Tensor locations = allocate(key_points, {sizes.batch, sizes.num_anchors, sizes.num_points, sizes.num_cams, 2});
  if (locations.numel() > 0) {
    with_real_type(key_points, [&](auto zero) {
      using T = decltype(zero);
      run(sizes, operands.cameras<T>(), static_cast<const T*>(operands.key_points.const_data_ptr()),
          static_cast<Location<T>*>(locations.mutable_data_ptr()));
    });
  }
  return locations;
}

// Its backward: `run(sizes, cameras, key_points, grad_locations, grad_points)`.
template <typename Run>
Tensor run_project_points_backward(
    const Tensor& grad_output,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh,
    const Run& run) {
  const ProjectPointsSizes sizes = check_project_points(key_points, projection_mat, image_wh);
  check_project_points_gradient(grad_output, key_points, sizes);
  const ProjectPointsOperands operands(key_points, projection_mat, image_wh);
  const Tensor grad_locations = as_contiguous(grad_output);
  const Tensor grad_points = allocate(key_points, {sizes.batch, sizes.num_anchors, sizes.num_points, 3});
  if (grad_points.numel() > 0) {
    with_real_type(key_points, [&](auto zero) {
      using T = decltype(zero);
      run(sizes, operands.cameras<T>(), static_cast<const T*>(operands.key_points.const_data_ptr()),
          static_cast<const T*>(grad_locations.const_data_ptr()), static_cast<T*>(grad_points.mutable_data_ptr()));
    });
  }
  return grad_points;
}

// One implementation per device, each of them bitwise reproducible. The backward returns the gradient of the key points.
Tensor project_points_cpu(
    const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh);

Tensor project_points_backward_cpu(
    const Tensor& grad_output,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh);

Tensor project_points_cuda(
    const Tensor& key_points, const Tensor& projection_mat, const std::optional<Tensor>& image_wh);

Tensor project_points_backward_cuda(
    const Tensor& grad_output,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh);

}  // namespace reimplementation::points
