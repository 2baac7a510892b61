#include "sort.cuh"

#include <torch/csrc/stable/ops.h>

#include <cub/device/device_radix_sort.cuh>

#include "../common/launch.cuh"

namespace reimplementation::cuda {

Pairs sort_pairs(Pairs pairs, Pairs spare, int64_t count, int bits, const Tensor& like, cudaStream_t stream) {
  cub::DoubleBuffer<uint32_t> keys(pairs.keys, spare.keys), values(pairs.values, spare.values);
  auto sort = [&](void* scratch, size_t& bytes) {
    return cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, values, count, 0, bits, stream);
  };
  size_t bytes = 0;
  cudaError_t error = sort(nullptr, bytes);
  if (error == cudaSuccess) {
    const Tensor scratch = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    error = sort(scratch.mutable_data_ptr(), bytes);
  }
  STD_TORCH_CHECK(error == cudaSuccess, "sorting failed: ", cudaGetErrorString(error));
  return {keys.Current(), values.Current()};
}

}  // namespace reimplementation::cuda
