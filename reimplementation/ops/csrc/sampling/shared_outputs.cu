#include "sampling/shared_outputs.cuh"

namespace reimplementation::sampling {
namespace {

constexpr int THREADS = 128;

// One block a query.
template <typename T>
__global__ void __launch_bounds__(THREADS)
    add_blocks(const compute_t<T>* of_block, int blocks, int channels, T* output) {
  const compute_t<T>* const sums = of_block + static_cast<int64_t>(blockIdx.x) * blocks * channels;
  for (int channel = threadIdx.x; channel < channels; channel += THREADS) {
    compute_t<T> sum = 0;
#pragma unroll 4
    for (int block = 0; block < blocks; ++block) {
      sum += sums[static_cast<int64_t>(block) * channels + channel];
    }
    output[static_cast<int64_t>(blockIdx.x) * channels + channel] = from_compute<T>(sum);
  }
}

}  // namespace

SharedOutputs::SharedOutputs(const Tensor& output, const Shares& shares)
    : output_(output),
      blocks_(shares.blocks.divisor) {
  if (blocks_ > 1) {
    of_block_ = allocate(output, {output.size(0) * output.size(1), blocks_, output.size(2)}, compute_type(output));
  }
}

void SharedOutputs::finish(cudaStream_t stream) const {
  if (!of_block_) {
    return;
  }
  dispatch_types(output_, output_, [&](auto* t, auto*) {
    using T = std::remove_pointer_t<decltype(t)>;
    const Sums<T> to = sums<T>();
    add_blocks<<<static_cast<unsigned>(output_.size(0) * output_.size(1)), THREADS, 0, stream>>>(
        to.of_block, blocks_, static_cast<int>(output_.size(2)), to.output);
  });
  check_launch("add_blocks");
}

}  // namespace reimplementation::sampling
