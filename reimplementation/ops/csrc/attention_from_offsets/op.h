// The arguments of multi-scale deformable attention from offsets and logits, checked, and where its samples lie: what the cpu
// and the cuda kernels start from.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <tuple>

#include "attention/op.h"
#include "shared/checks.h"
#include "shared/levels.h"
#include "shared/platform.h"

namespace reimplementation::attention_from_offsets {

using attention::Sizes;
using torch::stable::Tensor;

// A reference point along one axis, and what offsets from it count in.
template <typename T>
struct Reference {
  T place;         // of the point, or of the centre of a box; normalised
  T unit;          // the level's size in pixels, or what an offset of 1 moves a sample by, normalised
  bool in_pixels;  // which of these

  HOST_DEVICE T location(T offset) const {
    return in_pixels ? place + offset / unit : place + offset * unit;
  }
  // From the location's. Where that has none, the offset has none, whatever the unit is.
  HOST_DEVICE T offset_gradient(T of_location) const {
    return of_location == 0 ? 0 : in_pixels ? of_location / unit : of_location * unit;
  }
};

// The tensors of a call.
struct Arguments {
  const Tensor &value, &spatial_shapes, &level_start_index, &reference_points, &sampling_offsets, &attention_logits;
  const std::optional<Tensor>& offset_scale;

  // Reference points have a size.
  bool has_boxes() const {
    return reference_points.size(3) == 4;
  }
};

inline Sizes check(const Arguments& arguments) {
  const auto& [value, spatial_shapes, level_start_index, references, offsets, logits, offset_scale] = arguments;
  check_dim("value", value, 4);
  check_dim("spatial_shapes", spatial_shapes, 2);
  check_dim("reference_points", references, 4);
  check_dim("sampling_offsets", offsets, 6);
  const Sizes sizes{value.size(0),          value.size(1),   value.size(2),  value.size(3),
                    spatial_shapes.size(0), offsets.size(1), offsets.size(4)};
  const auto& [batch, num_values, num_heads, channels, num_levels, num_queries, num_points] = sizes;
  check_shape("spatial_shapes", spatial_shapes, {num_levels, 2});
  check_shape("level_start_index", level_start_index, {num_levels});
  const bool shared = references.size(2) == 1, boxes = arguments.has_boxes();
  check_shape("reference_points", references, {batch, num_queries, shared ? 1 : num_levels, boxes ? 4 : 2});
  check_shape("sampling_offsets", offsets, {batch, num_queries, num_heads, num_levels, num_points, 2});
  check_shape("attention_logits", logits, {batch, num_queries, num_heads, num_levels, num_points});

  const auto type = compute_type(value);
  check_features("value", value);
  check_metadata("spatial_shapes", spatial_shapes, value);
  check_metadata("level_start_index", level_start_index, value);
  STD_TORCH_CHECK(
      references.scalar_type() == type, "reference_points must be float64 for a float64 value, else float32");
  STD_TORCH_CHECK(
      logits.scalar_type() == value.scalar_type() || logits.scalar_type() == type,
      "attention_logits must have the value's dtype or float32");
  STD_TORCH_CHECK(
      offsets.scalar_type() == logits.scalar_type(), "sampling_offsets must have the dtype of attention_logits");
  check_same_device("reference_points", references, value);
  check_same_device("sampling_offsets", offsets, value);
  check_same_device("attention_logits", logits, value);
  if (offset_scale) {
    check_shape("offset_scale", *offset_scale, {num_levels});
    check_same_device("offset_scale", *offset_scale, value);
    STD_TORCH_CHECK(
        offset_scale->scalar_type() == type, "offset_scale must be float64 for a float64 value, else float32");
  }
  attention::check_bounds(sizes);
  check_levels_fit(spatial_shapes, level_start_index, num_values, {"spatial_shapes", "level_start_index", "S"});
  return sizes;
}

// One implementation per device. The output is (N, Lq, M * D) in the value's dtype. Gradients are those of the value, the
// reference points, the offsets and the logits. One that is not needed comes back with no elements; those of value and
// reference points are contiguous, the others have their operand's strides where those are dense. `deterministic` and
// `half_sums` are what they are for attention's backward.
using ForwardFunction = Tensor(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    const std::optional<Tensor>& offset_scale);

using BackwardFunction = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    const std::optional<Tensor>& offset_scale,
    bool needs_value,
    bool needs_reference_points,
    bool needs_sampling_offsets,
    bool needs_attention_logits,
    bool deterministic,
    bool half_sums);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

}  // namespace reimplementation::attention_from_offsets
