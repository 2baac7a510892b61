// A footprint's four corners, in the order that kernels keep them: top left, top right, bottom left, bottom right.
#pragma once

#include "shared/footprint.h"
#include "shared/levels.h"
#include "cuda/vector.cuh"

namespace reimplementation::cuda {

template <typename T>
__device__ __forceinline__ Four<T> corner_weights(const Axis<T>& x, const Axis<T>& y, T factor = 1) {
  const T top = factor * y.weight[0], bottom = factor * y.weight[1];
  return {top * x.weight[0], top * x.weight[1], bottom * x.weight[0], bottom * x.weight[1]};
}

template <typename T>
__device__ __forceinline__ Four<int> corner_rows(const Level& level, const Axis<T>& x, const Axis<T>& y) {
  const int top = level.start + y.index[0] * level.width;
  const int bottom = level.start + y.index[1] * level.width;
  return {top + x.index[0], top + x.index[1], bottom + x.index[0], bottom + x.index[1]};
}

// The same in two words: reading four from shared memory takes longer, adding them up more instructions.
struct alignas(8) PackedRows {
  int first;
  unsigned steps;  // to the one below << 1 | to the one on the right

  __device__ __forceinline__ int operator[](int corner) const {
    return first + static_cast<int>((corner & 1 ? steps & 1 : 0) + (corner & 2 ? steps >> 1 : 0));
  }
};

template <typename T>
__device__ __forceinline__ PackedRows packed_rows(const Level& level, const Axis<T>& x, const Axis<T>& y) {
  const unsigned right = x.index[1] - x.index[0], below = (y.index[1] - y.index[0]) * level.width;
  return {level.start + y.index[0] * level.width + x.index[0], below << 1 | right};
}

// The location's gradient, from what each corner's weight would add to the loss.
template <typename T>
__device__ __forceinline__ void location_gradient(
    const Four<T>& weights, const Four<T>& slopes, const T (&along_corner)[4], T& x, T& y) {
  x = weights[2] * (slopes[0] * along_corner[0] + slopes[1] * along_corner[1]) +
      weights[3] * (slopes[0] * along_corner[2] + slopes[1] * along_corner[3]);
  y = slopes[2] * (weights[0] * along_corner[0] + weights[1] * along_corner[1]) +
      slopes[3] * (weights[0] * along_corner[2] + weights[1] * along_corner[3]);
}

}  // namespace reimplementation::cuda
