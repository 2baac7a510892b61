// Views of a tensor's memory, by the C function under the stable ABI: it takes no way through the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace reimplementation {

// From the tensor's element `first` on. Nobody checks that the view ends where the tensor does.
template <size_t DIMS>
torch::stable::Tensor strided_view(
    const torch::stable::Tensor& tensor,
    const std::array<int64_t, DIMS>& sizes,
    const std::array<int64_t, DIMS>& steps,
    int64_t first = 0) {
  AtenTensorHandle handle = nullptr;
  const AOTITorchError error =
      aoti_torch__reinterpret_tensor(tensor.get(), DIMS, sizes.data(), steps.data(), first, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "a tensor could not be viewed in another shape");
  return torch::stable::Tensor(handle);
}

// The rows along the last dimension of a contiguous tensor, as a matrix.
inline torch::stable::Tensor rows_of(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() > 0 && tensor.is_contiguous(), "a tensor must be contiguous to be viewed as rows");
  const int64_t columns = tensor.size(tensor.dim() - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    rows *= tensor.size(i);
  }
  return strided_view<2>(tensor, {rows, columns}, {std::max<int64_t>(columns, 1), 1});
}

inline torch::stable::Tensor transposed(const torch::stable::Tensor& matrix) {
  return strided_view<2>(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

}  // namespace reimplementation
