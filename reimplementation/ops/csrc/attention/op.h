// The arguments of multi-scale deformable attention, checked: what the cpu and the cuda kernels start from.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <tuple>

#include "shared/checks.h"
#include "shared/levels.h"

namespace reimplementation::attention {

using torch::stable::Tensor;

struct Sizes {
  int64_t batch, num_values, num_heads, channels;  // value: N, S, M, D
  int64_t num_levels;                              // L
  int64_t num_queries, num_points;                 // Lq, P

  // No sample exists: the output and every gradient are zero.
  bool nothing_to_sample() const {
    return std::min({batch, num_values, num_heads, channels, num_levels, num_queries, num_points}) == 0;
  }
};

// What the kernels number in 32 bits.
inline void check_bounds(const Sizes& sizes) {
  STD_TORCH_CHECK(
      sizes.num_values <= INT_MAX && sizes.num_heads * sizes.channels <= INT_MAX / 8 &&
          sizes.num_levels * sizes.num_points <= INT_MAX / 2,
      "S must be below 2^31, L * P below 2^30, M * D below 2^28");
}

inline Sizes check(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  check_dim("value", value, 4);
  check_dim("spatial_shapes", spatial_shapes, 2);
  check_dim("sampling_locations", sampling_locations, 6);

  const Sizes sizes{
      value.size(0),
      value.size(1),
      value.size(2),
      value.size(3),
      spatial_shapes.size(0),
      sampling_locations.size(1),
      sampling_locations.size(4)};
  check_shape("spatial_shapes", spatial_shapes, {sizes.num_levels, 2});
  check_shape("level_start_index", level_start_index, {sizes.num_levels});
  check_shape(
      "sampling_locations", sampling_locations,
      {sizes.batch, sizes.num_queries, sizes.num_heads, sizes.num_levels, sizes.num_points, 2});
  check_shape(
      "attention_weights", attention_weights,
      {sizes.batch, sizes.num_queries, sizes.num_heads, sizes.num_levels, sizes.num_points});

  check_features("value", value);
  check_metadata("spatial_shapes", spatial_shapes, value);
  check_metadata("level_start_index", level_start_index, value);
  STD_TORCH_CHECK(
      sampling_locations.scalar_type() == compute_type(value),
      "sampling_locations must be float64 for a float64 value, else float32");
  STD_TORCH_CHECK(
      attention_weights.scalar_type() == value.scalar_type() || attention_weights.scalar_type() == compute_type(value),
      "attention_weights must have the value's dtype or float32");
  check_same_device("sampling_locations", sampling_locations, value);
  check_same_device("attention_weights", attention_weights, value);
  check_bounds(sizes);
  check_levels_fit(spatial_shapes, level_start_index, sizes.num_values, {"spatial_shapes", "level_start_index", "S"});
  return sizes;
}

inline void check_gradient(const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels});
  STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output must have the value's dtype");
  check_same_device("grad_output", grad_output, value);
}

// One implementation per device. The output is (N, Lq, M * D) in the value's dtype. A gradient that is not needed comes back with
// no elements; the gradient of value is contiguous, those of locations and weights have their operand's strides where those are
// dense. Where `half_sums`, the value's gradient may be summed in the value's own dtype, where few samples meet in a row; else
// all sums are float32, or float64. The CPU's backward gives the same bits every time, asked for or not, and never sums in half
// precision.
using ForwardFunction = Tensor(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights);

using BackwardFunction = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights,
    bool needs_value,
    bool needs_sampling_locations,
    bool needs_attention_weights,
    bool deterministic,
    bool half_sums);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

}  // namespace reimplementation::attention
