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
#include "cuda/corners.cuh"

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

// What is done before: see half_gradient.cu.
namespace half_gradient {

constexpr unsigned NO_ROW = ~0u;
constexpr unsigned TAKEN = ~0u;  // a crowd of somebody who has no place for it yet

struct Counting {
  uint4* gradient;
  int64_t gradient_words;
  unsigned query_blocks;  // of the grid along x; those beyond write zeros
  RowState* states;       // as HalfSums has them
  unsigned* num_crowded;
  unsigned* crowded;  // the gradient's rows, of all images and heads, by place; or NO_ROW
  float* sums;
  int pitch;

  __device__ __forceinline__ void zero_gradient() const {
    const unsigned zero_blocks = gridDim.x - query_blocks;
    const int64_t row_of_blocks = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    const int64_t block = row_of_blocks * zero_blocks + blockIdx.x - query_blocks;
    const int64_t threads = static_cast<int64_t>(gridDim.z) * gridDim.y * zero_blocks * THREADS;
    for (int64_t i = block * THREADS + threadIdx.x; i < gradient_words; i += threads) {
      gradient[i] = {};
    }
  }

  // Of a pixel and the ones on its right and below, of which `state` and `row` are the first one's state and row: makes those
  // crowded that are not yet, and lets all anchors know whose samples may touch one of them.
  __device__ __forceinline__ void make_crowded(
      const Level& level, int x, int y, RowState* state, unsigned row, int num_heads) const {
    const unsigned places = atomicAdd(num_crowded, 4u);
    unsigned before[4];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int right = corner & 1, below = corner >> 1;
      const bool exists = x + right < level.width && y + below < level.height;
      before[corner] = exists ? atomicCAS(&state[below * level.width + right].crowd, 0u, TAKEN) : TAKEN;
    }
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const int to_corner = (corner >> 1) * level.width + (corner & 1);
      const unsigned place = places + corner;
      crowded[place] = before[corner] == 0 ? row + to_corner * num_heads : NO_ROW;
      if (before[corner] == 0) {
        state[to_corner].crowd = place + 1;
        auto* zeros = reinterpret_cast<float4*>(sums + static_cast<int64_t>(place) * pitch);
        for (int i = 0; i < pitch / 4; ++i) {
          zeros[i] = {};
        }
      }
    }
    for (int down = -1; down <= 1; ++down) {
      for (int right = -1; right <= 1; ++right) {
        if (static_cast<unsigned>(x + right) < level.width && static_cast<unsigned>(y + down) < level.height) {
          atomicOr(&state[down * level.width + right].samples, CROWDED);
        }
      }
    }
  }
};

template <typename T, typename Form>
__global__ void __launch_bounds__(THREADS) count_samples(const Operands<T, Form> op, const Counting rows) {
  if (blockIdx.x >= rows.query_blocks) {
    rows.zero_gradient();
    return;
  }
  const Place place(op);
  if (place.first_query >= op.num_queries) {
    return;
  }
  const typename Form::Units units = {};  // nobody asks for a weight
  for (int first = 0; first < op.samples; first += op.samples_at_once.divisor) {
    const Sampler<T, Form> sampler(op, place, first, &units);
    sampler.for_each(op, place, [&](int, int, int head, const Sample<float>& sample, int) {
      if (!sample.inside) {
        return;
      }
      const Level& level = sample.level;
      const int x = sample.x_axis().index[0], y = sample.y_axis().index[0];
      const int anchor = level.start + y * level.width + x;
      const int64_t image = place.batch;
      RowState* const state = rows.states + (image * op.num_heads + head) * op.levels.num_rows + anchor;
      if ((atomicAdd(&state->samples, 1u) & ~CROWDED) == MOST_SAMPLES<T>) {
        const unsigned row = (image * op.levels.num_rows + anchor) * op.num_heads + head;
        rows.make_crowded(level, x, y, state, row, op.num_heads);
      }
    });
  }
}

inline int64_t num_rows(const Sizes& sizes) {
  return sizes.batch * sizes.num_values * sizes.num_heads;
}

inline int64_t num_samples(const Sizes& sizes) {
  return sizes.batch * sizes.num_queries * sizes.num_heads * sizes.num_levels * sizes.num_points;
}

// Warps that visit the samples of as many units at once as they have threads for.
template <typename T, typename Form>
Operands<T, Form> one_thread_a_sample(Operands<T, Form> op) {
  op.samples_at_once = Divisor(std::min(WARP, op.samples));
  op.units_at_once = WARP / op.samples_at_once.divisor;
  op.log2_team = ceil_log2(WARP);
  while (2 * op.units() <= op.units_at_once) {
    --op.log2_team;
  }
  op.log2_heads_at_once = 0;
  return op;
}

}  // namespace half_gradient

// Whether it is possible, and worth while. Of 900 queries' rows each is added to three times on average.
bool half_sums_suffice(const Sizes& sizes, const Tensor& value, const Tensor& grad_output);

// The gradient while it is added to.
class HalfGradient {
 public:
  // Zeroes it, and counts samples; T is a half dtype.
  template <typename T, typename Form>
  static HalfGradient of(
      const Sizes& sizes, const Tensor& value, const LevelTable& levels, const Form& form, cudaStream_t stream);

  template <typename T>
  HalfSums<T> sums() const {
    return {static_cast<T*>(gradient_.mutable_data_ptr()), states_, sums_, pitch_};
  }

  // Rounds the crowded rows. Returns (batch, values, heads, channels), in the value's dtype.
  Tensor finish(cudaStream_t stream) const;

 private:
  explicit HalfGradient(const Tensor& value) : gradient_(allocate_like(value)), memory_(gradient_) {}

  template <typename T, typename Form>
  void count(const Sizes& sizes, const Tensor& value, const LevelTable& levels, const Form& form, cudaStream_t stream);

  Tensor gradient_, memory_;
  RowState* states_;
  unsigned *num_crowded_, *crowded_;
  float* sums_;
  int pitch_;
};

template <typename T, typename Form>
HalfGradient HalfGradient::of(
    const Sizes& sizes, const Tensor& value, const LevelTable& levels, const Form& form, cudaStream_t stream) {
  HalfGradient made(value);
  made.count<T>(sizes, value, levels, form, stream);
  return made;
}

template <typename T, typename Form>
void HalfGradient::count(
    const Sizes& sizes, const Tensor& value, const LevelTable& levels, const Form& form, cudaStream_t stream) {
  const auto all = half_gradient::one_thread_a_sample(operands<T>(sizes, value, levels, form, HALF_VEC, 2 * WARP));
  const int64_t rows = half_gradient::num_rows(sizes);
  const int64_t most_crowded = 4 * std::min(rows, half_gradient::num_samples(sizes) / (MOST_SAMPLES<T> + 1));
  const int64_t lane_channels = HALF_VEC << log2_lanes(sizes.channels, HALF_VEC);
  pitch_ = static_cast<int>((sizes.channels + lane_channels - 1) / lane_channels * lane_channels);

  // In words. What comes before `zeroed` must be zero: how many rows are crowded, and the states.
  const auto aligned = [](int64_t words) { return (words + 63) / 64 * 64; };
  const int64_t states_at = 2, zeroed = aligned(states_at + 2 * rows), sums_at = aligned(zeroed + most_crowded);
  memory_ = allocate(value, {sums_at + most_crowded * pitch_}, ScalarType::Float);
  sums_ = static_cast<float*>(memory_.mutable_data_ptr()) + sums_at;
  num_crowded_ = static_cast<unsigned*>(memory_.mutable_data_ptr());
  states_ = reinterpret_cast<RowState*>(num_crowded_ + states_at);
  crowded_ = num_crowded_ + zeroed;
  const cudaError_t error = cudaMemsetAsync(num_crowded_, 0, zeroed * sizeof(unsigned), stream);
  STD_TORCH_CHECK(error == cudaSuccess, "memory could not be zeroed: ", cudaGetErrorString(error));

  launch_parts(all, sizes.batch, [&](const Operands<T, Form>& op, dim3 grid) {
    const half_gradient::Counting counting = {
        static_cast<uint4*>(gradient_.mutable_data_ptr()),
        gradient_.numel() / HALF_VEC,
        grid.x,
        states_,
        num_crowded_,
        crowded_,
        sums_,
        pitch_};
    half_gradient::count_samples<T, Form><<<dim3(2 * grid.x, grid.y, grid.z), THREADS, 0, stream>>>(op, counting);
    check_launch("count_samples");
  });
}

}  // namespace reimplementation::attention
