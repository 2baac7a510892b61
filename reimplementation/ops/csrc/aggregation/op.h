// The arguments of deformable aggregation, checked: what the cpu and the cuda kernels start from.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <tuple>

#include "shared/checks.h"
#include "shared/levels.h"

namespace reimplementation::aggregation {

using torch::stable::Tensor;

struct Sizes {
  int64_t batch, num_rows, channels;
  int64_t num_cams, num_levels;
  int64_t num_queries, num_points, num_groups;

  // No sample exists: the output and every gradient are zero.
  bool nothing_to_sample() const {
    return std::min({batch, num_rows, channels, num_cams, num_levels, num_queries, num_points}) == 0;
  }
};

inline Sizes check(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights) {
  check_dim("feature_maps", feature_maps, 3);
  check_dim("spatial_shape", spatial_shape, 3);
  check_dim("sampling_location", sampling_location, 5);
  check_dim("weights", weights, 6);

  const Sizes sizes{feature_maps.size(0),  feature_maps.size(1),      feature_maps.size(2),      spatial_shape.size(0),
                    spatial_shape.size(1), sampling_location.size(1), sampling_location.size(2), weights.size(5)};
  check_shape("spatial_shape", spatial_shape, {sizes.num_cams, sizes.num_levels, 2});
  check_shape("scale_start_index", scale_start_index, {sizes.num_cams, sizes.num_levels});
  check_shape(
      "sampling_location", sampling_location, {sizes.batch, sizes.num_queries, sizes.num_points, sizes.num_cams, 2});
  check_shape(
      "weights", weights,
      {sizes.batch, sizes.num_queries, sizes.num_points, sizes.num_cams, sizes.num_levels, sizes.num_groups});
  STD_TORCH_CHECK(
      sizes.num_groups > 0 && sizes.channels % sizes.num_groups == 0, "weights: num_groups must divide the ",
      sizes.channels, " channels; got num_groups=", sizes.num_groups);

  check_features("feature_maps", feature_maps);
  check_metadata("spatial_shape", spatial_shape, feature_maps);
  check_metadata("scale_start_index", scale_start_index, feature_maps);
  STD_TORCH_CHECK(
      sampling_location.scalar_type() == compute_type(feature_maps),
      "sampling_location must be float64 for float64 features, else float32");
  STD_TORCH_CHECK(
      weights.scalar_type() == feature_maps.scalar_type() || weights.scalar_type() == compute_type(feature_maps),
      "weights must have the features' dtype or float32");
  check_same_device("sampling_location", sampling_location, feature_maps);
  check_same_device("weights", weights, feature_maps);
  STD_TORCH_CHECK(
      sizes.num_rows <= INT_MAX && sizes.num_cams * sizes.num_points <= INT_MAX / 2 &&
          sizes.num_levels * sizes.num_groups <= INT_MAX / 2 && sizes.channels <= INT_MAX / 8,
      "num_feat must be below 2^31, num_cams * num_pts and num_levels * num_groups below 2^30, C below 2^28");
  check_levels_fit(
      spatial_shape, scale_start_index, sizes.num_rows, {"spatial_shape", "scale_start_index", "num_feat"});
  return sizes;
}

inline void check_gradient(const Tensor& grad_output, const Tensor& feature_maps, const Sizes& sizes) {
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_queries, sizes.channels});
  STD_TORCH_CHECK(
      grad_output.scalar_type() == feature_maps.scalar_type(), "grad_output must have the dtype of feature_maps");
  check_same_device("grad_output", grad_output, feature_maps);
}

// One implementation per device; the CPU's backward gives the same bits every time, asked for or not. A gradient
// that is not needed comes back with no elements; the gradients of locations and weights have their operand's
// strides where those are dense.
using ForwardFunction = Tensor(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights);

using BackwardFunction = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad_output,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights,
    bool needs_feature_maps,
    bool needs_sampling_location,
    bool needs_weights,
    bool deterministic);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

}  // namespace reimplementation::aggregation
