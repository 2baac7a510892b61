// The value's gradient of multi-scale deformable attention on CUDA in half precision, where few samples meet in a row.
//
// Sums in float32 take memory for the whole image, zeros, a rounding, and atomics of twice the bytes. So a row is added to in
// its own dtype, in 16 bytes a lane, as long as that is harmless. A sample's *anchor* is the first row of its footprint.
// Samples are counted by anchor; where more than `MOST_SAMPLES` have the same, the rows that their footprints may touch are
// *crowded*: these have sums in float32, and are rounded once. A row that is not is in the footprints of four anchors, so it is
// added to at most 4 * MOST_SAMPLES times. If all of these additions round the same way, they are off by n * u of the terms'
// magnitudes: 1/16 in float16, where u = 2^-11, and 1/8 in bfloat16, where it is 2^-8. docs/kernels/half-precision-sums.md
// has what that is in practice.
#pragma once

#include <type_traits>

#include "attention/samples.cuh"

namespace reimplementation::attention {

template <typename T>
constexpr bool IS_HALF = sizeof(T) == 2;
template <typename T>
constexpr unsigned MOST_SAMPLES = std::is_same_v<T, __half> ? 32 : 8;

constexpr int HALF_VEC = 8;  // channels of a lane
constexpr unsigned CROWDED = 1u << 31;

// Of a row of a head.
struct alignas(8) RowState {
  unsigned samples;  // that have it as their anchor; | CROWDED if rows that their footprints may touch are
  unsigned crowd;    // 0, or where it is crowded one more than its place among these
};

// Where the backward's kernel adds to. The lanes of a crowded row have the channels there that they have elsewhere, but in
// another order: neighbouring lanes add to neighbouring 16 bytes.
template <typename T>
struct HalfSums {
  static constexpr bool EXIST = true;
  using Anchor = bool;  // whether rows that its samples' footprints may touch are crowded

  T* gradient;             // (batch, values, heads, channels)
  const RowState* states;  // (batch, heads, values)
  float* sums;             // (crowded rows, pitch)
  int pitch;               // channels of the lanes

  // For a thread's channels, from `channel` of a head on.
  template <typename Op>
  __device__ __forceinline__ HalfSums at(const Op& op, int64_t batch, int head, int channel) const {
    return {
        gradient + (batch * op.levels.num_rows * op.num_heads + head) * op.channels + channel,
        states + (batch * op.num_heads + head) * op.levels.num_rows, sums + channel - 4 * op.lane(), pitch};
  }
  __device__ __forceinline__ Anchor anchor(int row) const {
    return (__ldg(&states[row].samples) & CROWDED) != 0;
  }
  __device__ __forceinline__ void add(
      const Problem& op,
      const PackedRows& rows,
      Anchor crowded,
      const Four<float>& weights,
      const Vector<T, HALF_VEC>& grad_output) const {
    unsigned crowds[4] = {};
    if (crowded) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        crowds[corner] = __ldg(&states[rows[corner]].crowd);
      }
    }
    const int row_bytes = op.num_heads * op.channels * static_cast<int>(sizeof(T));
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (weights[corner] != 0) {
        float terms[HALF_VEC];
        product(weights[corner], grad_output, terms);
        if (crowds[corner] == 0) {
          atomic_add_vector(row_address(gradient, rows[corner], row_bytes), terms);
        } else {
          float* const wide = sums + static_cast<int64_t>(crowds[corner] - 1) * pitch;
          atomic_add_vector(wide, {terms[0], terms[1], terms[2], terms[3]});
          atomic_add_vector(wide + 4 * op.lanes(), {terms[4], terms[5], terms[6], terms[7]});
        }
      }
    }
  }
};

// Calls `body` with a null T* and a null W*, of which T is a half dtype.
template <typename Body>
void dispatch_halves(const Tensor& value, const Tensor& weights, Body body) {
  dispatch_types(value, weights, [&](auto* t, auto* w) {
    if constexpr (IS_HALF<std::remove_pointer_t<decltype(t)>>) {
      body(t, w);
    }
  });
}

// Whether it is possible, and worth while. Of 900 queries' rows each is added to three times on average.
bool half_sums_suffice(const Sizes& sizes, const Tensor& value, const Tensor& grad_output);

// The gradient while it is added to. The tensors of samples are from `with_short_steps`.
class HalfGradient {
 public:
  // Zeroes it, and counts samples.
  HalfGradient(
      const Sizes& sizes,
      const Tensor& value,
      const LevelTable& levels,
      const Tensor& locations,
      const Tensor& weights,
      cudaStream_t stream);

  template <typename T>
  HalfSums<T> sums() const {
    return {static_cast<T*>(gradient_.mutable_data_ptr()), states_, sums_, pitch_};
  }

  // Rounds the crowded rows. Returns (batch, values, heads, channels), in the value's dtype.
  Tensor finish(cudaStream_t stream) const;

 private:
  Tensor gradient_, memory_;
  RowState* states_;
  unsigned *num_crowded_, *crowded_;
  float* sums_;
  int pitch_;
};

}  // namespace reimplementation::attention
