#include "cuda/levels.cuh"

#include <algorithm>

#include "cuda/launch.cuh"

namespace reimplementation::cuda {
namespace {

constexpr int THREADS = 128;

// As many as fit beside the other arguments of a kernel, which may have 4 KB.
struct Numbers {
  static constexpr int MOST = 496;

  int64_t values[MOST];
};

__global__ void __launch_bounds__(THREADS)
    write_numbers(const __grid_constant__ Numbers numbers, int count, int64_t* to) {
  for (int i = threadIdx.x; i < count; i += THREADS) {
    to[i] = numbers.values[i];
  }
}

Tensor on_device(const Tensor& metadata, const Tensor& features, cudaStream_t stream) {
  if (!metadata.is_cpu()) {
    return readable_metadata(metadata);
  }
  const Tensor wide = as_contiguous(as_type(metadata, ScalarType::Long));
  const Tensor written = allocate(features, wide.sizes(), ScalarType::Long);
  const auto* from = static_cast<const int64_t*>(wide.const_data_ptr());
  auto* to = static_cast<int64_t*>(written.mutable_data_ptr());
  for (int64_t first = 0; first < wide.numel(); first += Numbers::MOST) {
    const int count = static_cast<int>(std::min<int64_t>(wide.numel() - first, Numbers::MOST));
    Numbers numbers;
    std::copy_n(from + first, count, numbers.values);
    write_numbers<<<1, THREADS, 0, stream>>>(numbers, count, to + first);
  }
  check_launch("write_numbers");
  return written;
}

}  // namespace

DeviceLevels::DeviceLevels(
    const Tensor& shapes, const Tensor& starts, const Tensor& features, int64_t num_rows, cudaStream_t stream)
    : shapes_(on_device(shapes, features, stream)),
      starts_(on_device(starts, features, stream)),
      table_(level_table(shapes_, starts_, num_rows)) {}

}  // namespace reimplementation::cuda
