// The gradient of the features on CUDA, for both ops: one computation, seen from its samples.
//
// Deformable aggregation and multi-scale deformable attention differ in which of their operands' dimensions they have. Here
// a *sample* is numbered by (batch, head, query, point, camera, level); an op without heads or cameras has one of them,
// and a stride of 0 says that an operand does not change along a dimension.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <climits>

#include "../common/levels.h"
#include "../common/side_stream.cuh"

namespace reimplementation::cuda {

// Elements from one (batch, head, query, point, camera, level) to the next; last, from x to y or from group to group. All
// but the first two are below 2^31.
using SampleStrides = std::array<int64_t, 7>;

struct SampledOp {
  int64_t batch, heads, queries, points, cams, levels;
  int64_t rows;              // pixels of all cameras and levels
  int64_t channels, groups;  // of a head; each group of channels has its own weights
  bool unit_square;          // locations outside the open unit square count for nothing, else footprints off the level
  LevelTable level_table;    // cams * levels levels
  torch::stable::Tensor locations, weights;
  SampleStrides location_strides, weight_strides;
};

// Writes all of `grad_features` (batch, rows, heads, channels) from `grad_output` (batch, queries, heads, channels), both
// contiguous and of the features' dtype. The same bits every time, if deterministic; else faster.
// Works on the side stream, if there is one, and on the main one, PyTorch's current stream, if not. Returns the memory that
// it works in: with a side stream this and the operands must live until the main stream has been told to wait for it, lest
// somebody else on the main stream is given them.
[[nodiscard]] torch::stable::Tensor feature_gradient(
    const SampledOp& op,
    const torch::stable::Tensor& grad_output,
    const torch::stable::Tensor& grad_features,
    bool deterministic,
    cudaStream_t main,
    const SideStream* side);

// The tensor itself, or a copy of it where the strides of some inner dimension are too long for SampledOp.
inline torch::stable::Tensor with_short_strides(const torch::stable::Tensor& tensor) {
  for (int64_t i = 1; i < tensor.dim(); ++i) {
    if (tensor.stride(i) > INT_MAX) {
      return torch::stable::contiguous(tensor);
    }
  }
  return tensor;
}

}  // namespace reimplementation::cuda
