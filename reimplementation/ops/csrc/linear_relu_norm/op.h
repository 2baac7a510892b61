// A linear layer, ReLU and a layer norm: the arguments of linear_relu_norm, checked, and what a call does on any device.
//
//   activated = relu(feature @ weight^T + bias),  output = (activated - mean) * scale * norm_weight + norm_bias
//
// with mean and scale = 1 / sqrt(variance + eps) of a row. Nothing but the operands is kept: the backward makes `activated`
// again, row by row, and turns the output's gradient into that of the linear layer's output,
//
//   g = grad_output * norm_weight,  of_linear = scale * (g - mean(g) - normalised * mean(g * normalised)) where activated > 0
//
// From that the gradients of feature and weight are matrix products, which PyTorch makes, and those of the other three are sums
// over rows, in a fixed order: the same bits every time.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "shared/checks.h"
#include "shared/platform.h"
#include "shared/products.h"
#include "shared/tensors.h"
#include "shared/views.h"

namespace reimplementation::linear_relu_norm {

using torch::stable::Tensor;

constexpr int NUM_SUMS = 3;  // gradients that are sums over rows: of bias, norm_weight and norm_bias

struct Sizes {
  int64_t batch, queries;
  int64_t in_features, out_features;

  HOST_DEVICE int64_t rows() const {
    return batch * queries;
  }
};

struct Arguments {
  const Tensor& feature;  // (batch, queries, in_features)
  const Tensor& weight;   // (out_features, in_features)
  const Tensor& bias;     // (out_features,), and so are
  const Tensor& norm_weight;
  const Tensor& norm_bias;
  double eps;
};

inline Sizes check(const Arguments& given) {
  const Tensor& feature = given.feature;
  const Tensor& weight = given.weight;
  check_dim("feature", feature, 3);
  check_dim("weight", weight, 2);
  const Sizes sizes{feature.size(0), feature.size(1), feature.size(2), weight.size(0)};
  check_real("feature", feature);
  check_shape("weight", weight, {sizes.out_features, sizes.in_features});
  check_like("weight", weight, "feature", feature);
  STD_TORCH_CHECK(sizes.out_features > 0, "weight must have a row; got shape ", shape_text(weight));
  auto check_parameter = [&](const char* name, const Tensor& parameter) {
    check_shape(name, parameter, {sizes.out_features});
    check_like(name, parameter, "feature", feature);
  };
  check_parameter("bias", given.bias);
  check_parameter("norm_weight", given.norm_weight);
  check_parameter("norm_bias", given.norm_bias);
  STD_TORCH_CHECK(given.eps >= 0, "eps must be at least 0; got ", given.eps);
  return sizes;
}

// What a call reads. Rows of `feature` follow one another at `row_step`.
template <typename T>
struct Layer {
  Sizes sizes;
  const T* feature;
  int64_t row_step;
  const T* weight;  // (out_features, in_features)
  const T* bias;
  const T* norm_weight;
  const T* norm_bias;
  T eps;
};

// The operands of a call that was checked. They must outlive what reads them.
class Operands {
 public:
  explicit Operands(const Arguments& given)
      : feature(with_even_rows(given.feature)),
        weight(as_contiguous(given.weight)),
        bias(as_contiguous(given.bias)),
        norm_weight(as_contiguous(given.norm_weight)),
        norm_bias(as_contiguous(given.norm_bias)) {}

  int64_t row_step() const {
    return feature.stride(1);
  }

  template <typename T>
  Layer<T> layer(const Sizes& sizes, double eps) const {
    auto data = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    return {sizes,      data(feature),     row_step(),      data(weight),
            data(bias), data(norm_weight), data(norm_bias), static_cast<T>(eps)};
  }

  // The rows as a matrix (batch * queries, in_features).
  Tensor rows(const Sizes& sizes) const {
    return strided_view<2>(feature, {sizes.rows(), sizes.in_features}, {row_step(), 1});
  }

  const Tensor feature, weight, bias, norm_weight, norm_bias;

 private:
  // The tensor itself where all of its rows are equally far apart, as those of a wider one are.
  static Tensor with_even_rows(const Tensor& feature) {
    const bool has_dense_rows = feature.size(2) <= 1 || feature.stride(2) == 1;
    const bool is_even = feature.size(0) <= 1 || feature.stride(0) == feature.size(1) * feature.stride(1);
    const bool is_matrix = feature.stride(1) >= feature.size(2);
    return has_dense_rows && is_even && is_matrix ? feature : copied(feature, feature.scalar_type());
  }
};

// The op on any device: `run(layer, output)` gets what the call reads and where it writes.
template <typename Run>
Tensor run_forward(const Arguments& given, const Run& run) {
  const Sizes sizes = check(given);
  const Operands operands(given);
  const Tensor output = allocate(given.feature, {sizes.batch, sizes.queries, sizes.out_features});
  if (sizes.rows() > 0) {
    with_real_type(given.feature, [&](auto zero) {
      using T = decltype(zero);
      run(operands.layer<T>(sizes, given.eps), static_cast<T*>(output.mutable_data_ptr()));
    });
  }
  return output;
}

// Of feature, weight, bias, norm_weight and norm_bias.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Its backward: `run(layer, grad_output, of_linear, sums)` writes the gradient of the linear layer's output (rows,
// out_features), and those that are sums over rows. That of `feature` has no element where it is not needed.
template <typename Run>
Gradients run_backward(const Tensor& grad_output, const Arguments& given, bool needs_feature, const Run& run) {
  const Sizes sizes = check(given);
  check_shape("grad_output", grad_output, {sizes.batch, sizes.queries, sizes.out_features});
  check_like("grad_output", grad_output, "feature", given.feature);
  const Operands operands(given);
  const Tensor gradient = as_contiguous(grad_output);
  const Tensor of_linear = allocate(given.feature, {sizes.rows(), sizes.out_features});
  Tensor sums[NUM_SUMS] = {allocate_like(given.bias), allocate_like(given.norm_weight), allocate_like(given.norm_bias)};
  if (sizes.rows() == 0) {
    for (Tensor& sum : sums) {
      torch::stable::zero_(sum);
    }
  } else {
    with_real_type(given.feature, [&](auto zero) {
      using T = decltype(zero);
      T* to[NUM_SUMS];
      for (int i = 0; i < NUM_SUMS; ++i) {
        to[i] = static_cast<T*>(sums[i].mutable_data_ptr());
      }
      run(operands.layer<T>(sizes, given.eps), static_cast<const T*>(gradient.const_data_ptr()),
          static_cast<T*>(of_linear.mutable_data_ptr()), to);
    });
  }
  Tensor of_feature = contiguous_gradient(given.feature, needs_feature);
  if (needs_feature) {
    multiply(of_linear, operands.weight, rows_of(of_feature));
  }
  const Tensor of_weight = product(transposed(of_linear), operands.rows(sizes));
  return {of_feature, of_weight, sums[0], sums[1], sums[2]};
}

// One implementation per device.
using ForwardFunction = Tensor(
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps);
using BackwardFunction = Gradients(
    const Tensor& grad_output,
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps,
    bool needs_feature);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

}  // namespace reimplementation::linear_relu_norm
