// What the forward and the backward of deformable aggregation share on CUDA: operands, and the visible pairs.
#pragma once

#include <type_traits>

#include "cuda/corners.cuh"
#include "aggregation/op.h"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "sampling/pairs.cuh"

namespace reimplementation::aggregation {

using namespace cuda;
using sampling::Pair;
using sampling::Points;
using sampling::Shares;

template <typename T, typename W>
struct Operands {
  const T* features;  // (batch, rows, channels)
  const compute_t<T>* locations;
  const W* weights;
  LevelTable levels;
  int64_t location_strides[5];
  int64_t weight_strides[6];
  Divisor queries;  // their number
  Shares shares;    // of a query's key points
  int cams, num_levels;
  int channels, group_channels;  // channels of a group share a weight

  __device__ __forceinline__ bool has_few_levels(int most) const {
    return static_cast<int64_t>(cams) * num_levels <= most;
  }
  // Where a pair's location (or the location's gradient) begins, seen from the query.
  __device__ __forceinline__ int64_t location_offset(const Pair& pair, const int64_t* strides) const {
    return pair.point * strides[2] + pair.cam * strides[3];
  }
  // Where its weights (or their gradients) in a level begin, seen from the query.
  __device__ __forceinline__ int64_t weight_offset(const Pair& pair, int level, const int64_t* strides) const {
    return pair.point * strides[2] + pair.cam * strides[3] + level * strides[4];
  }
};

template <typename T, typename W>
Operands<T, W> operands(
    const Sizes& sizes,
    const Shares& shares,
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
  op.cams = static_cast<int>(sizes.num_cams);
  op.shares = shares;
  op.num_levels = static_cast<int>(sizes.num_levels);
  op.channels = static_cast<int>(sizes.channels);
  op.group_channels = static_cast<int>(sizes.channels / sizes.num_groups);
  return op;
}

// Whether vectors of `vec` channels stay within a group and on their alignment.
template <typename T>
bool can_vectorize(const Sizes& sizes, const Tensor& features, int vec) {
  return sizes.channels / sizes.num_groups % vec == 0 && is_aligned(features, vec * sizeof(T));
}

inline int64_t count_queries(const Sizes& sizes) {
  return sampling::count_queries(sizes.batch, sizes.num_queries);
}

// Fills `found` with the visible ones of THREADS of a block's pairs, of which a thread brings one if it `exists`; returns
// how many they are.
template <typename T, typename W, int THREADS>
__device__ int compact_visible_pairs(
    const Operands<T, W>& op,
    const compute_t<T>* locations,
    const Pair& pair,
    bool exists,
    sampling::VisiblePairs<compute_t<T>, THREADS>& found) {
  compute_t<T> x = 0, y = 0;
  bool visible = false;
  if (exists) {
    const compute_t<T>* location = locations + op.location_offset(pair, op.location_strides);
    x = location[0];
    y = location[op.location_strides[4]];
    visible = inside_unit_square(x, y);
  }
  return sampling::compact(visible, pair, x, y, found);
}

}  // namespace reimplementation::aggregation
