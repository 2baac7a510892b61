// Outputs of queries whose pairs several blocks share: each leaves its sum, and these are added up in their order.
#pragma once

#include <optional>

#include "cuda/vector.cuh"
#include "sampling/pairs.cuh"
#include "shared/checks.h"

namespace reimplementation::sampling {

using torch::stable::Tensor;

// Where a block of the forward writes its sums.
template <typename T>
struct Sums {
  T* output;               // (queries, channels), if a query has one block
  compute_t<T>* of_block;  // (queries, blocks, channels), else

  __device__ __forceinline__ void write(
      int64_t query, int64_t block, int channels, int channel, compute_t<T> sum) const {
    if (of_block == nullptr) {
      output[query * channels + channel] = from_compute<T>(sum);
    } else {
      of_block[block * channels + channel] = sum;
    }
  }
};

class SharedOutputs {
 public:
  // `output` is (batch, queries, channels).
  SharedOutputs(const Tensor& output, const Shares& shares);

  template <typename T>
  Sums<T> sums() const {
    return {
        static_cast<T*>(output_.mutable_data_ptr()),
        of_block_ ? static_cast<compute_t<T>*>(of_block_->mutable_data_ptr()) : nullptr};
  }

  // Completes the output after the kernel that wrote the sums.
  void finish(cudaStream_t stream) const;

 private:
  Tensor output_;
  int blocks_;
  std::optional<Tensor> of_block_;
};

}  // namespace reimplementation::sampling
