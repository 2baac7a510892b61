// Backward: blocks make the activated outputs of their rows again, as the forward does, then the gradient of the linear layer's
// output, and of their rows' part of the three sums over rows; a second kernel adds the blocks' parts, in their order. The
// products that are left are PyTorch's.
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "linear_relu_norm/op.h"
#include "linear_relu_norm/rows.cuh"

#include "sums/rows.cuh"

namespace reimplementation::linear_relu_norm {

namespace {

// Of a row: its norm, and what its elements' gradients have in common.
template <typename T>
struct RowGradient {
  Norm<T> norm;
  T mean;             // of the normalised outputs' gradients
  T mean_normalised;  // of these, times the normalised outputs
};

template <typename T>
__device__ __forceinline__ RowGradient<T> row_gradient(
    const Layer<T>& layer, const T* activated, const T* grad_output) {
  const int64_t width = layer.sizes.out_features;
  const Norm<T> norm = norm_of(activated, width, layer.eps);
  T sum = 0, sum_normalised = 0;
  for (int64_t i = threadIdx.x % WARP; i < width; i += WARP) {
    const T gradient = grad_output[i] * layer.norm_weight[i];
    sum += gradient;
    sum_normalised += gradient * norm(activated[i]);
  }
  return {norm, sum_of_lanes(sum) / width, sum_of_lanes(sum_normalised) / width};
}

// parts: (blocks, NUM_SUMS, out_features).
template <int ROWS, int PACK, typename T>
__global__ void __launch_bounds__(THREADS<ROWS>)
    linear_relu_norm_backward(Layer<T> layer, const T* grad_output, T* of_linear, T* parts) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ RowGradient<T> rows[ROWS];
  T* staged = reinterpret_cast<T*>(shared);
  T* activated = staged + ROWS * layer.sizes.in_features;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * ROWS;
  const int64_t width = layer.sizes.out_features;
  stage_rows<ROWS>(layer, first_row, staged);
  activate<ROWS, PACK>(layer, staged, activated);

  const int own = threadIdx.x / WARP;
  if (own < ROWS && first_row + own < layer.sizes.rows()) {
    rows[own] = row_gradient(layer, activated + own * width, grad_output + (first_row + own) * width);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < width; i += THREADS<ROWS>) {
    T sums[NUM_SUMS] = {};
    for (int row = 0; row < ROWS && first_row + row < layer.sizes.rows(); ++row) {
      const RowGradient<T> of = rows[row];
      const int64_t at = (first_row + row) * width + i;
      const T output = activated[row * width + i], normalised = of.norm(output), gradient = grad_output[at];
      const T centred = gradient * layer.norm_weight[i] - of.mean - normalised * of.mean_normalised;
      const T passed = output <= 0 ? T(0) : centred * of.norm.scale;  // NaN passes
      of_linear[at] = passed;
      sums[0] += passed;
      sums[1] += gradient * normalised;
      sums[2] += gradient;
    }
#pragma unroll
    for (int sum = 0; sum < NUM_SUMS; ++sum) {
      parts[(blockIdx.x * int64_t{NUM_SUMS} + sum) * width + i] = sums[sum];
    }
  }
}

template <typename T>
struct Sums {
  T* to[NUM_SUMS];
};

// The sums of all columns of the parts.
template <typename T>
__global__ void __launch_bounds__(sums::COLUMNS* sums::ADDERS)
    sum_parts(const T* parts, int64_t blocks, int64_t width, Sums<T> sums) {
  const int64_t columns = NUM_SUMS * width, column = sums::column_of_thread();
  const T sum = sums::sum_of_column(parts, blocks, columns, column, column < columns);
#pragma unroll
  for (int i = 0; i < NUM_SUMS; ++i) {  // an index known to the compiler keeps the addresses in registers
    if (threadIdx.y == 0 && column / width == i) {
      sums.to[i][column % width] = sum;
    }
  }
}

}  // namespace

Gradients backward_cuda(
    const Tensor& grad_output,
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps,
    bool needs_feature) {
  const int32_t device = feature.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  auto run = [&](const auto& layer, const auto* gradient, auto* of_linear, auto* to_sums) {
    using T = std::remove_pointer_t<decltype(of_linear)>;
    const int64_t width = layer.sizes.out_features;
    with_block_shape(layer, device, [&](auto rows, auto pack) {
      const unsigned blocks = blocks_of(layer.sizes, rows());
      const Tensor parts = allocate(feature, {blocks, NUM_SUMS, width});
      T* const to_parts = static_cast<T*>(parts.mutable_data_ptr());
      linear_relu_norm_backward<rows(), pack()>
          <<<blocks, THREADS<rows()>, shared_bytes<T>(layer.sizes, rows()), current_stream(device)>>>(
              layer, gradient, of_linear, to_parts);
      check_launch("linear_relu_norm_backward");
      sum_parts<<<sums::blocks_for(NUM_SUMS * width), dim3(sums::COLUMNS, sums::ADDERS), 0, current_stream(device)>>>(
          to_parts, blocks, width, Sums<T>{{to_sums[0], to_sums[1], to_sums[2]}});
      check_launch("linear_relu_norm_backward, its sums");
    });
  };
  return run_backward(grad_output, {feature, weight, bias, norm_weight, norm_bias, eps}, needs_feature, run);
}

}  // namespace reimplementation::linear_relu_norm
