// Sums of all counts before each, on the device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace reimplementation::feature_gradient {

// Scratch memory on the device.
struct Scratch {
  void* memory;
  size_t bytes;
};

// Every count becomes the sum of those before it.
void sum_before(uint32_t* counts, int64_t number, Scratch scratch, cudaStream_t stream);
int64_t sum_before_bytes(int64_t number);

}  // namespace reimplementation::feature_gradient
