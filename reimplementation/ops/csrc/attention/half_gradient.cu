// Before and after the backward's kernel adds to a gradient in half precision; half_gradient.cuh says why.
//
//   1. `count_samples`: half of the blocks zero the gradient, the others have one thread per sample, which counts it with its
//      anchor. Who counts one too many there gives the rows around zeroed sums in float32;
//   2. the backward's kernel adds;
//   3. `round_crowds` adds the rounded sums to their rows, which nobody has added to before, unless levels overlap.

#include "attention/half_gradient.cuh"

#include "cuda/corners.cuh"

namespace reimplementation::attention {
namespace {

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

template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) count_samples(const Operands<T, W> op, const Counting rows) {
  if (blockIdx.x >= rows.query_blocks) {
    rows.zero_gradient();
    return;
  }
  const Place place(op);
  if (place.first_query >= op.num_queries) {
    return;
  }
  for (int first = 0; first < op.samples; first += op.samples_at_once.divisor) {
    const Sampler<T, W> sampler(op, place, first);
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
    if (crowded[place] == NO_ROW) {
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

int64_t num_rows(const Sizes& sizes) {
  return sizes.batch * sizes.num_values * sizes.num_heads;
}

int64_t num_samples(const Sizes& sizes) {
  return sizes.batch * sizes.num_queries * sizes.num_heads * sizes.num_levels * sizes.num_points;
}

// Warps that visit the samples of as many units at once as they have threads for.
template <typename T, typename W>
Operands<T, W> one_thread_a_sample(Operands<T, W> op) {
  op.samples_at_once = Divisor(std::min(WARP, op.samples));
  op.units_at_once = WARP / op.samples_at_once.divisor;
  op.log2_team = ceil_log2(WARP);
  while (2 * op.units() <= op.units_at_once) {
    --op.log2_team;
  }
  op.log2_heads_at_once = 0;
  return op;
}

}  // namespace

bool half_sums_suffice(const Sizes& sizes, const Tensor& value, const Tensor& grad_output) {
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

HalfGradient::HalfGradient(
    const Sizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    cudaStream_t stream)
    : gradient_(allocate_like(value)),
      memory_(gradient_) {
  dispatch_halves(value, weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    const auto all = one_thread_a_sample(operands<T, W>(sizes, value, levels, locations, weights, HALF_VEC, 2 * WARP));
    const int64_t rows = num_rows(sizes);
    const int64_t most_crowded = 4 * std::min(rows, num_samples(sizes) / (MOST_SAMPLES<T> + 1));
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

    launch_parts(all, sizes.batch, [&](const Operands<T, W>& op, dim3 grid) {
      const Counting counting = {
          static_cast<uint4*>(gradient_.mutable_data_ptr()),
          gradient_.numel() / HALF_VEC,
          grid.x,
          states_,
          num_crowded_,
          crowded_,
          sums_,
          pitch_};
      count_samples<T, W><<<dim3(2 * grid.x, grid.y, grid.z), THREADS, 0, stream>>>(op, counting);
      check_launch("count_samples");
    });
  });
}

Tensor HalfGradient::finish(cudaStream_t stream) const {
  dispatch_halves(gradient_, gradient_, [&](auto* t, auto*) {
    using T = std::remove_pointer_t<decltype(t)>;
    const int channels = static_cast<int>(gradient_.size(3));
    const int blocks = 4 * device_attribute(cudaDevAttrMultiProcessorCount, gradient_.get_device_index());
    round_crowds<T><<<blocks, THREADS, 0, stream>>>(
        static_cast<T*>(gradient_.mutable_data_ptr()), channels, num_crowded_, crowded_, sums_, pitch_,
        log2_lanes(channels, HALF_VEC));
    check_launch("round_crowds");
  });
  return gradient_;
}

}  // namespace reimplementation::attention
