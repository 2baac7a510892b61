// A stable radix sort on the device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace reimplementation::cuda {

// Pairs of a key and a value, in two halves of one allocation: a sort goes back and forth between them.
struct Pairs {
  uint32_t* keys;
  uint32_t* values;
};

// Sorts `count` pairs by the lowest `bits` bits of their keys; pairs of equal keys keep their order. Returns which of the
// two holds the result; the other's content is lost. `like` tells the device that scratch memory is taken from.
Pairs sort_pairs(
    Pairs pairs, Pairs spare, int64_t count, int bits, const torch::stable::Tensor& like, cudaStream_t stream);

}  // namespace reimplementation::cuda
