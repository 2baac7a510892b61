// Before and after the backward's kernel adds to a gradient in half precision; half_gradient.cuh says why.
//
//   1. `count_samples`: half of the blocks zero the gradient, the others have one thread per sample, which counts it with its
//      anchor. Who counts one too many there gives the rows around zeroed sums in float32;
//   2. the backward's kernel adds;
//   3. `round_crowds` adds the rounded sums to their rows, which nobody has added to before, unless levels overlap.

#include "attention/half_gradient.cuh"

namespace reimplementation::attention {
namespace {

template <typename T>
__global__ void __launch_bounds__(THREADS) round_crowds(
    T* gradient,
    int channels,
    const unsigned* num_crowded,
    const unsigned* crowded,
    const float* sums,
    int pitch,
    int log2_lanes) {
  const unsigned teams = gridDim.x * THREADS >> log2_lanes;
  const int lanes = 1 << log2_lanes, lane = threadIdx.x & (lanes - 1);
  for (unsigned place = (blockIdx.x * THREADS + threadIdx.x) >> log2_lanes; place < *num_crowded; place += teams) {
    if (crowded[place] == half_gradient::NO_ROW) {
      continue;
    }
    T* const row = gradient + static_cast<int64_t>(crowded[place]) * channels;
    const float* const wide = sums + static_cast<int64_t>(place) * pitch + 4 * lane;
    for (int first = 0; first + lane * HALF_VEC < channels; first += lanes * HALF_VEC) {
      const auto low = load_vector<4>(wide + first), high = load_vector<4>(wide + first + 4 * lanes);
      atomic_add_vector(
          row + first + lane * HALF_VEC, {low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]});
    }
  }
}

}  // namespace

bool half_sums_suffice(const Sizes& sizes, const Tensor& value, const Tensor& grad_output) {
  using half_gradient::num_rows;
  using half_gradient::num_samples;
  // The major compute capability from which on they are added eight at a time. Code for an older one adds pairs: slower.
  constexpr int ATOMICS_OF_HALVES = 9;
  // As often may a row be added to on average: with more, too many are crowded.
  const int64_t lonely = value.scalar_type() == ScalarType::Half ? 16 : 8;
  return (value.scalar_type() == ScalarType::Half || value.scalar_type() == ScalarType::BFloat16) &&
      num_rows(sizes) <= INT_MAX && num_samples(sizes) <= INT_MAX / 4 &&
      4 * num_samples(sizes) <= lonely * num_rows(sizes) && sizes.channels % HALF_VEC == 0 && is_aligned(value, 16) &&
      is_aligned(grad_output, 16) &&
      device_attribute(cudaDevAttrComputeCapabilityMajor, value.get_device_index()) >= ATOMICS_OF_HALVES;
}

Tensor HalfGradient::finish(cudaStream_t stream) const {
  dispatch_types(gradient_, gradient_, [&](auto* t, auto*) {
    using T = std::remove_pointer_t<decltype(t)>;
    if constexpr (IS_HALF<T>) {
      const int channels = static_cast<int>(gradient_.size(3));
      const int blocks = 4 * device_attribute(cudaDevAttrMultiProcessorCount, gradient_.get_device_index());
      round_crowds<T><<<blocks, THREADS, 0, stream>>>(
          static_cast<T*>(gradient_.mutable_data_ptr()), channels, num_crowded_, crowded_, sums_, pitch_,
          log2_lanes(channels, HALF_VEC));
      check_launch("round_crowds");
    }
  });
  return gradient_;
}

}  // namespace reimplementation::attention
