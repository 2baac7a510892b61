// The value's gradient of multi-scale deformable attention on CUDA, where many samples meet in a row and the order in which
// they are added need not repeat.
#pragma once

#include "attention/samples.cuh"

namespace reimplementation::attention {

// Whether it is worth while: a row is added to `SHARED` times on average. Of an encoder's it is 64 times, of 900 queries' 3.
// And whether 32 bits number the samples of a head and level, those by which the last block is too large included.
inline bool rows_are_shared(const Sizes& sizes) {
  constexpr int64_t SHARED = 24;
  return 4 * sizes.num_queries * sizes.num_levels * sizes.num_points >= SHARED * sizes.num_values &&
      sizes.num_queries * sizes.num_points <= INT_MAX - 512;
}

// Adds the gradient to `grad_value` (batch, values, heads, channels), which is contiguous, aligned to 16 bytes, and of the
// type that sums run in. `grad_output` (batch, queries, heads, channels) is contiguous; the tensors of samples are from
// `with_short_steps`.
void add_value_gradient(
    const Sizes& sizes,
    const Tensor& grad_output,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const Tensor& grad_value,
    cudaStream_t stream);

}  // namespace reimplementation::attention
