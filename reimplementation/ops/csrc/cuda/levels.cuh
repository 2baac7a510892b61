// Level metadata where kernels can read it.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "shared/levels.h"

namespace reimplementation::cuda {

// Metadata of a call that was checked. What lies on the CPU travels as kernel arguments: nobody waits, a CUDA graph replays the
// numbers that it captured, and the caller may change them as soon as the call returns.
class DeviceLevels {
 public:
  DeviceLevels(
      const torch::stable::Tensor& shapes,
      const torch::stable::Tensor& starts,
      const torch::stable::Tensor& features,
      int64_t num_rows,
      cudaStream_t stream);

  // For kernels that are launched while this exists.
  const LevelTable& table() const {
    return table_;
  }

 private:
  torch::stable::Tensor shapes_, starts_;
  LevelTable table_;
};

}  // namespace reimplementation::cuda
