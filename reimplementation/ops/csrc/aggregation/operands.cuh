// What the forward and the backward of deformable aggregation share on CUDA: operands, teams, and the visible pairs.
//
// A *pair* is a key point in a camera, a *sample* a pair in a level. One block owns one query. A *team* of up to 32 lanes
// spans the query's channels: vector k of a lane holds VEC channels from `first + (k * lanes + lane) * VEC`.
#pragma once

#include <type_traits>

#include "cuda/corners.cuh"
#include "aggregation/op.h"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace reimplementation::aggregation {

using namespace cuda;

template <typename T, typename W>
struct Operands {
  const T* features;  // (batch, rows, channels)
  const compute_t<T>* locations;
  const W* weights;
  LevelTable levels;
  int64_t location_strides[5];
  int64_t weight_strides[6];
  Divisor queries, points;  // their numbers
  int num_cams, num_levels;
  int channels, group_channels;  // channels of a group share a weight
  int lanes, log2_lanes;         // of a team; a power of two

  __device__ __forceinline__ bool has_few_levels(int most) const {
    return static_cast<int64_t>(num_cams) * num_levels <= most;
  }
};

template <typename T, typename W>
Operands<T, W> operands(
    const Sizes& sizes,
    const Tensor& features,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights) {
  Operands<T, W> op = {};
  op.features = static_cast<const T*>(features.const_data_ptr());
  op.locations = static_cast<const compute_t<T>*>(locations.const_data_ptr());
  op.weights = static_cast<const W*>(weights.const_data_ptr());
  op.levels = levels;
  copy_strides(locations, op.location_strides);
  copy_strides(weights, op.weight_strides);
  op.queries = Divisor(sizes.num_queries);
  op.points = Divisor(sizes.num_points);
  op.num_cams = static_cast<int>(sizes.num_cams);
  op.num_levels = static_cast<int>(sizes.num_levels);
  op.channels = static_cast<int>(sizes.channels);
  op.group_channels = static_cast<int>(sizes.channels / sizes.num_groups);
  return op;
}

// Makes teams that span `channels` where a lane holds `lane_channels`, or as many as a warp can.
template <typename T, typename W>
void set_team(Operands<T, W>& op, int channels, int lane_channels) {
  op.log2_lanes = log2_lanes(channels, lane_channels);
  op.lanes = 1 << op.log2_lanes;
}

// Whether vectors of `vec` channels stay within a group and on their alignment.
template <typename T>
bool can_vectorize(const Sizes& sizes, const Tensor& features, int vec) {
  return sizes.channels / sizes.num_groups % vec == 0 && is_aligned(features, vec * sizeof(T));
}

inline unsigned query_blocks(const Sizes& sizes) {
  STD_TORCH_CHECK(
      sizes.batch * sizes.num_queries <= INT_MAX, "bs * num_queries must be below 2^31; got ", sizes.batch, " * ",
      sizes.num_queries);
  return static_cast<unsigned>(sizes.batch * sizes.num_queries);
}

// A key point in a camera.
struct Pair {
  int cam, point;

  __device__ __forceinline__ Pair(unsigned number, const Divisor& points) {
    point = points.split(number);
    cam = static_cast<int>(number);
  }

  // Where its location (or the location's gradient) begins, seen from the query.
  __device__ __forceinline__ int64_t location(const int64_t* strides) const {
    return point * strides[2] + cam * strides[3];
  }

  // Where its weights (or their gradients) in a level begin, seen from the query.
  __device__ __forceinline__ int64_t weights(const int64_t* strides, int level) const {
    return point * strides[2] + cam * strides[3] + level * strides[4];
  }
};

// The visible ones among THREADS of a query's pairs; pairs are numbered camera by camera.
template <typename T, int THREADS>
struct VisiblePairs {
  T x[THREADS], y[THREADS];
  int number[THREADS];
  int warp_counts[THREADS / WARP];
};

// Fills `found` with the visible ones of pairs first, ..., first + THREADS - 1 in their order; returns how many they are.
template <typename T, typename W, int THREADS>
__device__ int compact_visible_pairs(
    const Operands<T, W>& op, const compute_t<T>* locations, int first, VisiblePairs<compute_t<T>, THREADS>& found) {
  const int number = first + threadIdx.x;
  const int warp = threadIdx.x / WARP;
  compute_t<T> x = 0, y = 0;
  bool visible = false;
  if (number < op.points.divisor * op.num_cams) {
    const compute_t<T>* location = locations + Pair(number, op.points).location(op.location_strides);
    x = location[0];
    y = location[op.location_strides[4]];
    visible = inside_unit_square(x, y);
  }
  const unsigned seen = __ballot_sync(ALL_LANES, visible);
  __syncthreads();  // whoever still reads the pairs before these
  if (threadIdx.x % WARP == 0) {
    found.warp_counts[warp] = __popc(seen);
  }
  __syncthreads();
  int position = __popc(seen & ((1u << (threadIdx.x % WARP)) - 1));
  int count = 0;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    position += w < warp ? found.warp_counts[w] : 0;
    count += found.warp_counts[w];
  }
  if (visible) {
    found.x[position] = x;
    found.y[position] = y;
    found.number[position] = number;
  }
  __syncthreads();
  return count;
}

}  // namespace reimplementation::aggregation
