#include "feature_gradient/prefix_sums.cuh"

#include <cub/device/device_scan.cuh>

#include "cuda/launch.cuh"

namespace reimplementation::feature_gradient {
namespace {

void check(cudaError_t error) {
  cuda::check_cuda(error, "prefix sums failed");
}

}  // namespace

void sum_before(uint32_t* counts, int64_t number, Scratch scratch, cudaStream_t stream) {
  check(cub::DeviceScan::ExclusiveSum(scratch.memory, scratch.bytes, counts, counts, number, stream));
}

int64_t sum_before_bytes(int64_t number) {
  uint32_t* const none = nullptr;
  size_t bytes = 0;
  check(cub::DeviceScan::ExclusiveSum(nullptr, bytes, none, none, number));
  return static_cast<int64_t>(bytes);
}

}  // namespace reimplementation::feature_gradient
