// Forward: a block takes up to eight rows, makes their activated outputs in shared memory, and then a warp a row normalises them.
//
// Each block reads the whole weight, from L2: 256 KB for 256 features, so that 900 rows in blocks of eight read 29 MB there, about
// as much as its bandwidth moves in the time that a product, ReLU and norm of their own take to be launched.
#include <torch/csrc/stable/accelerator.h>

#include <cstdint>

#include "linear_relu_norm/op.h"
#include "linear_relu_norm/rows.cuh"

namespace reimplementation::linear_relu_norm {

namespace {

template <int ROWS, int PACK, typename T>
__global__ void __launch_bounds__(THREADS<ROWS>) linear_relu_norm_forward(Layer<T> layer, T* output) {
  extern __shared__ __align__(16) unsigned char shared[];
  T* staged = reinterpret_cast<T*>(shared);
  T* activated = staged + ROWS * layer.sizes.in_features;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * ROWS;
  const int64_t width = layer.sizes.out_features;
  stage_rows<ROWS>(layer, first_row, staged);
  activate<ROWS, PACK>(layer, staged, activated);

  const int row = threadIdx.x / WARP;
  if (row >= ROWS || first_row + row >= layer.sizes.rows()) {
    return;
  }
  const Norm<T> norm = norm_of(activated + row * width, width, layer.eps);
  for (int64_t i = threadIdx.x % WARP; i < width; i += WARP) {
    output[(first_row + row) * width + i] =
        norm(activated[row * width + i]) * layer.norm_weight[i] + layer.norm_bias[i];
  }
}

}  // namespace

Tensor forward_cuda(
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps) {
  const int32_t device = feature.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  return run_forward({feature, weight, bias, norm_weight, norm_bias, eps}, [&](const auto& layer, auto* output) {
    using T = std::remove_pointer_t<decltype(output)>;
    with_block_shape(layer, device, [&](auto rows, auto pack) {
      linear_relu_norm_forward<rows(), pack()>
          <<<blocks_of(layer.sizes, rows()), THREADS<rows()>, shared_bytes<T>(layer.sizes, rows()),
             current_stream(device)>>>(layer, output);
      check_launch("linear_relu_norm");
    });
  });
}

}  // namespace reimplementation::linear_relu_norm
