// What forward and backward share: a block makes the activated outputs of its ROWS rows, in shared memory, and their norms.
//
// A warp makes OUTPUTS neighbouring outputs of each row at a time. Its lanes go along the input's features side by side, so that they
// read a row of the weight from end to end; each adds up its own part of all these dot products in registers, and then the lanes'
// parts are added in exchanges, which leave an output to each lane. The order of the sums does not depend on ROWS: an output has
// the same bits however many rows there are.
#pragma once

#include <algorithm>
#include <cstdint>

#include "linear_relu_norm/op.h"

#include "cuda/launch.cuh"

namespace reimplementation::linear_relu_norm {

using namespace cuda;

constexpr int MOST_ROWS = 8;             // of a block
constexpr int OUTPUTS = 4;               // of each row, that a warp makes at a time
constexpr int SHARED_BYTES = 48 * 1024;  // that every block may have without asking

// Of a block. Where rows are few so are the blocks, and each has the whole weight to read: more threads have more of it on the way.
template <int ROWS>
constexpr int THREADS = ROWS <= 2 ? 1024 : 512;

// Adds the lanes' arrays of N elements: lane i gets the sum of their elements i % N. Of two lanes that are STEP apart, one goes on with
// the upper half of what both have, and the other with the lower one; or both go on with all of it, where there are more lanes.
template <int N, int STEP = WARP / 2, typename T>
__device__ __forceinline__ T sum_of_own(T (&parts)[N]) {
  if constexpr (STEP == 0) {
    return parts[0];
  } else {
    const bool is_upper = threadIdx.x & STEP;
#pragma unroll
    for (int i = 0; i < (STEP < N ? STEP : N); ++i) {
      const T lower = parts[i], upper = STEP < N ? parts[(i + STEP) % N] : lower;
      parts[i] = (is_upper ? upper : lower) + __shfl_xor_sync(ALL_LANES, is_upper ? lower : upper, STEP);
    }
    return sum_of_own<N, STEP / 2>(parts);
  }
}

// Copies the block's rows of features to shared memory; rows behind the last one are zero.
template <int ROWS, typename T>
__device__ __forceinline__ void stage_rows(const Layer<T>& layer, int64_t first_row, T* staged) {
  const int64_t width = layer.sizes.in_features;
  for (int row = 0; row < ROWS; ++row) {
    const bool is_there = first_row + row < layer.sizes.rows();
    const T* from = layer.feature + (first_row + row) * layer.row_step;
    for (int64_t i = threadIdx.x; i < width; i += THREADS<ROWS>) {
      staged[row * width + i] = is_there ? from[i] : T(0);
    }
  }
  __syncthreads();
}

// The activated outputs (ROWS, out_features) of the staged rows. PACK neighbours of a weight's row are read at once.
template <int ROWS, int PACK, typename T>
__device__ __forceinline__ void activate(const Layer<T>& layer, const T* staged, T* activated) {
  const int64_t in_features = layer.sizes.in_features, out_features = layer.sizes.out_features;
  const int lane = threadIdx.x % WARP;
  for (int64_t first = threadIdx.x / WARP * OUTPUTS; first < out_features; first += THREADS<ROWS> / WARP * OUTPUTS) {
    T parts[ROWS * OUTPUTS] = {};
    for (int64_t i = lane * PACK; i < in_features; i += WARP * PACK) {
      Vector<T, PACK> row[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        row[r] = *reinterpret_cast<const Vector<T, PACK>*>(staged + r * in_features + i);
      }
#pragma unroll
      for (int o = 0; o < OUTPUTS; ++o) {
        const int64_t output = min(first + o, out_features - 1);  // what is made twice is not kept
        const auto weight = load_vector<PACK>(layer.weight + output * in_features + i);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
#pragma unroll
          for (int p = 0; p < PACK; ++p) {
            parts[r * OUTPUTS + o] += weight[p] * row[r][p];
          }
        }
      }
    }
    const T sum = sum_of_own(parts);
    const int64_t output = first + lane % OUTPUTS;
    if (lane < ROWS * OUTPUTS && output < out_features) {
      const T value = sum + layer.bias[output];
      activated[lane / OUTPUTS * out_features + output] = value < 0 ? T(0) : value;  // NaN stays
    }
  }
  __syncthreads();
}

// Of an activated row.
template <typename T>
struct Norm {
  T mean;
  T scale;

  __device__ __forceinline__ T operator()(T activated) const {
    return (activated - mean) * scale;
  }
};

// The lanes of a warp take a row's elements in turn; all of them get the norm.
template <typename T>
__device__ __forceinline__ Norm<T> norm_of(const T* activated, int64_t width, T eps) {
  const int lane = threadIdx.x % WARP;
  T sum = 0;
  for (int64_t i = lane; i < width; i += WARP) {
    sum += activated[i];
  }
  const T mean = sum_of_lanes(sum) / width;
  T squares = 0;
  for (int64_t i = lane; i < width; i += WARP) {
    squares += (activated[i] - mean) * (activated[i] - mean);
  }
  return {mean, 1 / sqrt(sum_of_lanes(squares) / width + eps)};
}

// Shared memory of a block: its rows of features, and of activated outputs.
template <typename T>
size_t shared_bytes(const Sizes& sizes, int rows) {
  return sizeof(T) * rows * (sizes.in_features + sizes.out_features);
}

// Calls `launch(ROWS, PACK)`, as compile-time numbers: as few rows a block as keep the GPU's multiprocessors busy, for then a
// block's rows are soonest done, and at most as many as fit its shared memory.
template <typename T, typename Launch>
void with_block_shape(const Layer<T>& layer, int device, const Launch& launch) {
  const Sizes& sizes = layer.sizes;
  STD_TORCH_CHECK(
      shared_bytes<T>(sizes, 1) <= SHARED_BYTES, "linear_relu_norm takes in_features + out_features of at most ",
      SHARED_BYTES / sizeof(T), " on a GPU; got ", sizes.in_features, " + ", sizes.out_features);
  const int64_t blocks = resident_blocks(1, device);
  int rows = 1;
  while (rows < MOST_ROWS && rows * blocks < sizes.rows() && shared_bytes<T>(sizes, 2 * rows) <= SHARED_BYTES) {
    rows *= 2;
  }
  constexpr int PACK = 16 / sizeof(T);
  const bool is_packed = sizes.in_features % PACK == 0 && reinterpret_cast<uintptr_t>(layer.weight) % 16 == 0;
  auto with_rows = [&](auto pack) {
    switch (rows) {
      case 1:
        return launch(std::integral_constant<int, 1>{}, pack);
      case 2:
        return launch(std::integral_constant<int, 2>{}, pack);
      case 4:
        return launch(std::integral_constant<int, 4>{}, pack);
      default:
        return launch(std::integral_constant<int, 8>{}, pack);
    }
  };
  is_packed ? with_rows(std::integral_constant<int, PACK>{}) : with_rows(std::integral_constant<int, 1>{});
}

inline unsigned blocks_of(const Sizes& sizes, int rows) {
  return static_cast<unsigned>((sizes.rows() + rows - 1) / rows);
}

}  // namespace reimplementation::linear_relu_norm
