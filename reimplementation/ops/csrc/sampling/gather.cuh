// Weighted sums of samples on CUDA: what the forward of both aggregations does once it has footprints in shared memory.
//
// A *team* of up to 32 lanes spans channels: vector k of a lane holds VEC of them from `first + (k * lanes + lane) *
// VEC`. A block's teams take the samples in turn:
//
//                           team 0  | lane 0: channels 0..3, 128..131 | lane 1: 4..7, ... |    samples 0, 4, 8, ...
//                           team 1  |                                                     |    samples 1, 5, 9, ...
#pragma once

#include "cuda/corners.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "sampling/pairs.cuh"

namespace reimplementation::sampling {

template <typename C, int SAMPLES>
struct Footprints {
  Four<C> corner_weights[SAMPLES];
  Four<int> rows[SAMPLES];  // the first is NOWHERE where there is nothing to read

  static constexpr int NOWHERE = -1;

  // Returns whether the level is empty.
  __device__ __forceinline__ bool set(int i, const Level& level, C location_x, C location_y) {
    if (level.empty()) {
      rows[i] = {NOWHERE, NOWHERE, NOWHERE, NOWHERE};
      return true;
    }
    const auto x = bilinear_axis(pixel_position(location_x, level.width), level.width);
    const auto y = bilinear_axis(pixel_position(location_y, level.height), level.height);
    corner_weights[i] = cuda::corner_weights(x, y);
    rows[i] = corner_rows(level, x, y);
    return false;
  }
};

// The channels of a block, and how its teams lie in them.
struct Span {
  int lanes, log2_lanes;
  int first, end;  // channels; the last team's lanes may lie beyond them

  // Those of the block at `y` and `z` of its grid.
  template <int LANE_CHANNELS>
  __device__ __forceinline__ static Span of_block(int log2_lanes, int channels) {
    const int width = LANE_CHANNELS << log2_lanes;
    const int first = (blockIdx.z * gridDim.y + blockIdx.y) * width;
    return {1 << log2_lanes, log2_lanes, first, min(first + width, channels)};
  }
};

// A grid of `blocks` along x, and along y and z what covers the channels.
inline dim3 grid_of_spans(int64_t blocks, int64_t channels, int log2_lanes, int lane_channels) {
  const int64_t width = int64_t{lane_channels} << log2_lanes;
  const int64_t spans = (channels + width - 1) / width;
  return dim3(static_cast<unsigned>(blocks), std::min(spans, MOST_BLOCKS), (spans + MOST_BLOCKS - 1) / MOST_BLOCKS);
}

// A lane of a team, with the sums of its channels.
template <typename T, int VEC, int NV, int THREADS>
struct Gatherer {
  using C = compute_t<T>;

  const T* features[NV];
  int channels[NV];  // the first of each vector
  int lane, team, teams, row_bytes;
  C sums[NV][VEC] = {};

  __device__ __forceinline__ Gatherer(const Span& span, const T* first_row, int num_channels)
      : lane(threadIdx.x & (span.lanes - 1)),
        team(threadIdx.x >> span.log2_lanes),
        teams(THREADS >> span.log2_lanes),
        row_bytes(num_channels * static_cast<int>(sizeof(T))) {
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      // Lanes beyond the last channel read it once more and write nothing.
      channels[k] = min(span.first + (k * span.lanes + lane) * VEC, num_channels - VEC);
      features[k] = first_row + channels[k];
    }
  }

  // Adds what its team takes of `count` samples, IN_FLIGHT at a time. `weight_of(sample, k)` is what a sample weighs in
  // the channels of vector k.
  template <int IN_FLIGHT, int SAMPLES, typename WeightOf>
  __device__ __forceinline__ void add(
      const Footprints<C, SAMPLES>& footprints, int count, bool any_empty, const WeightOf& weight_of) {
    int sample = team;
    for (; !any_empty && sample + (IN_FLIGHT - 1) * teams < count; sample += IN_FLIGHT * teams) {
      add_at_once<IN_FLIGHT>(footprints, sample, weight_of);
    }
    for (; sample < count; sample += teams) {
      if (!any_empty || footprints.rows[sample][0] >= 0) {
        add_at_once<1>(footprints, sample, weight_of);
      }
    }
  }

  // Adds the block's teams up, in their order, and calls `write(channel, sum)` for every channel of the span.
  // `team_sums` in shared memory has room for THREADS * NV * VEC.
  template <typename Write>
  __device__ __forceinline__ void finish(const Span& span, C* team_sums, const Write& write) const {
    const int width = span.lanes * NV * VEC;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        team_sums[team * width + (k * span.lanes + lane) * VEC + v] = sums[k][v];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; span.first + i < span.end; i += THREADS) {
      C sum = 0;
      for (int t = 0; t < teams; ++t) {
        sum += team_sums[t * width + i];
      }
      write(span.first + i, sum);
    }
  }

 private:
  // Samples `teams` apart: all loads before the first sum.
  template <int COUNT, int SAMPLES, typename WeightOf>
  __device__ __forceinline__ void add_at_once(
      const Footprints<C, SAMPLES>& footprints, int sample, const WeightOf& weight_of) {
    Vector<T, VEC> corners[COUNT][NV][4];
    C weights[COUNT][NV];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Four<int> rows = footprints.rows[sample + i * teams];
#pragma unroll
      for (int k = 0; k < NV; ++k) {
        weights[i][k] = weight_of(sample + i * teams, k);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          corners[i][k][corner] = load_vector<VEC>(row_address(features[k], rows[corner], row_bytes));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const Four<C> corner_weights = footprints.corner_weights[sample + i * teams];
#pragma unroll
      for (int k = 0; k < NV; ++k) {
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const C weight = corner_weights[corner] * weights[i][k];
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            sums[k][v] += weight * corners[i][k][corner][v];
          }
        }
      }
    }
  }
};

}  // namespace reimplementation::sampling
