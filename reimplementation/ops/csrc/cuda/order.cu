#include "order.cuh"

#include <torch/headeronly/util/Exception.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>

namespace reimplementation::cuda {
namespace {

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "samples could not be put in order: ", cudaGetErrorString(error));
}

}  // namespace

Pairs sort_pairs(Pairs pairs, Pairs spare, int64_t count, int bits, Scratch scratch, cudaStream_t stream) {
  cub::DoubleBuffer<uint32_t> keys(pairs.keys, spare.keys), values(pairs.values, spare.values);
  check(cub::DeviceRadixSort::SortPairs(scratch.memory, scratch.bytes, keys, values, count, 0, bits, stream));
  return {keys.Current(), values.Current()};
}

int64_t sort_pairs_bytes(int64_t count, int bits) {
  cub::DoubleBuffer<uint32_t> none;
  size_t bytes = 0;
  check(cub::DeviceRadixSort::SortPairs(nullptr, bytes, none, none, count, 0, bits));
  return static_cast<int64_t>(bytes);
}

void sum_before(uint32_t* counts, int64_t number, Scratch scratch, cudaStream_t stream) {
  check(cub::DeviceScan::ExclusiveSum(scratch.memory, scratch.bytes, counts, counts, number, stream));
}

int64_t sum_before_bytes(int64_t number) {
  uint32_t* const none = nullptr;
  size_t bytes = 0;
  check(cub::DeviceScan::ExclusiveSum(nullptr, bytes, none, none, number));
  return static_cast<int64_t>(bytes);
}

}  // namespace reimplementation::cuda
