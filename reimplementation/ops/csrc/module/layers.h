// The layers of the module, on any device: what its forward and its backward both make.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "feature_aggregation/op.h"
#include "linear_relu_norm/op.h"
#include "module/op.h"
#include "points/box_key_points.h"
#include "shared/checks.h"
#include "shared/products.h"
#include "shared/tensors.h"
#include "shared/views.h"
#include "sums/op.h"

namespace reimplementation::module {

// This package's own functions for a device.
struct Kernels {
  feature_aggregation::ForwardFunction* aggregate;
  feature_aggregation::BackwardFunction* aggregate_backward;
  decltype(&points::box_key_points_cpu) box_key_points;
  decltype(&points::box_key_points_backward_cpu) box_key_points_backward;
  linear_relu_norm::ForwardFunction* linear_relu_norm;
  linear_relu_norm::BackwardFunction* linear_relu_norm_backward;
  decltype(&sums::sum_rows_cpu) sum_rows;
};

inline const Kernels& kernels_for(const Tensor& tensor) {
  static constexpr Kernels on_cpu{
      &feature_aggregation::forward_cpu,
      &feature_aggregation::backward_cpu,
      &points::box_key_points_cpu,
      &points::box_key_points_backward_cpu,
      &linear_relu_norm::forward_cpu,
      &linear_relu_norm::backward_cpu,
      &sums::sum_rows_cpu};
#ifdef REIMPLEMENTATION_WITH_CUDA
  static constexpr Kernels on_cuda{
      &feature_aggregation::forward_cuda,
      &feature_aggregation::backward_cuda,
      &points::box_key_points_cuda,
      &points::box_key_points_backward_cuda,
      &linear_relu_norm::forward_cuda,
      &linear_relu_norm::backward_cuda,
      &sums::sum_rows_cuda};
  if (tensor.is_cuda()) {
    return on_cuda;
  }
#endif
  return on_cpu;
}

// Rows of a contiguous matrix as (batch, queries, columns), batch and queries of `like`.
inline Tensor with_batch_of(const Tensor& matrix, const Tensor& like) {
  const int64_t columns = matrix.size(1);
  STD_TORCH_CHECK(
      matrix.is_contiguous() && matrix.size(0) == like.size(0) * like.size(1), "expected ", like.size(0) * like.size(1),
      " rows, one behind the other; got shape ", shape_text(matrix));
  return strided_view<3>(matrix, {like.size(0), like.size(1), columns}, {like.size(1) * columns, columns, 1});
}

// What the kernels, and PyTorch's products, do not look at themselves.
inline void check(const Operands& operands) {
  const Tensor& feature = operands.instance_feature;
  check_dim("instance_feature", feature, 3);
  check_real("instance_feature", feature);
  const int64_t batch = feature.size(0), channels = feature.size(2);
  auto check_parameter = [&](const char* name, const Tensor& parameter, int64_t dim) {
    check_dim(name, parameter, dim);
    check_like(name, parameter, "instance_feature", feature);
  };
  check_parameter("weights_fc.weight", operands.weights_weight, 2);
  check_parameter("weights_fc.bias", operands.weights_bias, 1);
  check_parameter("output_proj.weight", operands.output_weight, 2);
  check_parameter("output_proj.bias", operands.output_bias, 1);
  STD_TORCH_CHECK(operands.output_weight.size(0) == channels, "output_proj must have as many outputs as channels");
  if (operands.points_weight) {
    check_parameter("learnable_fc.weight", *operands.points_weight, 2);
    check_parameter("learnable_fc.bias", *operands.points_bias, 1);
  }
  check_like("anchor_embed", operands.anchor_embed, "instance_feature", feature);
  check_shape("projection_mat", operands.projection_mat, {batch, operands.projection_mat.size(1), 4, 4});
  check_like("projection_mat", operands.projection_mat, "instance_feature", feature);
  STD_TORCH_CHECK(
      operands.epsilons.empty() || operands.epsilons.size() == LAYERS, "a camera encoder must have two layers");
  for (const OptionalTensor& parameter : operands.encoder) {
    STD_TORCH_CHECK(
        parameter.has_value() == operands.has_encoder(), "a camera encoder must have all of its parameters");
  }
}

// (batch, rows, features) of contiguous (batch, rows, in_features).
inline Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor output = allocate(input, {input.size(0), input.size(1), weight.size(0)});
  const Tensor rows = rows_of(input), transposed_weight = transposed(weight);
  if (bias) {
    multiply_and_add(*bias, rows, transposed_weight, rows_of(output));
  } else {
    multiply(rows, transposed_weight, rows_of(output));
  }
  return output;
}

inline Tensor query_of(const Operands& operands) {
  const Tensor& feature = operands.instance_feature;
  const Tensor query = as_contiguous(sum_of(feature, operands.anchor_embed));
  check_shape("anchor_embed, as it broadcasts,", query, {feature.size(0), feature.size(1), feature.size(2)});
  return query;
}

inline Tensor logits_of(const Operands& operands, const Tensor& query) {
  return linear(query, operands.weights_weight, operands.weights_bias);
}

// The cameras' matrices without their last row, as rows of twelve numbers.
inline Tensor matrices_of(const Tensor& projection_mat) {
  constexpr int64_t numbers = 12, step = 16;
  const Tensor matrices = as_contiguous(projection_mat);
  return strided_view<3>(matrices, {matrices.size(0), matrices.size(1), numbers}, {matrices.size(1) * step, step, 1});
}

inline OptionalTensor if_there(const Tensor& tensor, bool is_there) {
  return is_there ? OptionalTensor(tensor) : std::nullopt;
}

}  // namespace reimplementation::module
