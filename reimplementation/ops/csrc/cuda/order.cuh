// What puts things in order on the device: a stable radix sort, and sums of all counts before.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace reimplementation::cuda {

// Pairs of a key and a value, in two halves of one allocation: a sort goes back and forth between them.
struct Pairs {
  uint32_t* keys;
  uint32_t* values;
};

// Scratch memory on the device.
struct Scratch {
  void* memory;
  size_t bytes;
};

// Sorts `count` pairs by the lowest `bits` bits of their keys; pairs of equal keys keep their order. Returns which of the
// two holds the result; the other's content is lost.
Pairs sort_pairs(Pairs pairs, Pairs spare, int64_t count, int bits, Scratch scratch, cudaStream_t stream);
int64_t sort_pairs_bytes(int64_t count, int bits);

// Every count becomes the sum of those before it.
void sum_before(uint32_t* counts, int64_t number, Scratch scratch, cudaStream_t stream);
int64_t sum_before_bytes(int64_t number);

}  // namespace reimplementation::cuda
