// The gradient of the features on CUDA, for both ops: one computation, seen from its samples.
//
// Deformable aggregation and multi-scale deformable attention differ in which of their operands' dimensions they have. Here
// a *sample* is numbered by (batch, head, query, point, camera, level); an op without heads or cameras has one of them,
// and a stride of 0 says that an operand does not change along a dimension.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "shared/levels.h"
#include "cuda/streams.cuh"

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

// The gradient of `features` (batch, rows, heads, channels) from `grad_output` (batch, queries, heads, channels), both
// contiguous and of one dtype. The same bits every time, if deterministic; else faster.
//
// Works on `stream`, PyTorch's current one, or on a second stream beside what the caller launches there. Then it ends with
// the object: `stream` waits for the second one, and only after that the memory that was worked in is free for others.
// Steps that do not need each other are on one more stream, which forks off that one and joins it again.
class FeatureGradient {
 public:
  FeatureGradient(
      const SampledOp& op,
      const torch::stable::Tensor& grad_output,
      const torch::stable::Tensor& features,
      bool deterministic,
      bool beside,
      cudaStream_t stream);

  const torch::stable::Tensor& gradient() const {
    return *gradient_;
  }

 private:
  // In this order: the streams join before the rest goes.
  SampledOp op_;
  std::optional<torch::stable::Tensor> memory_, gradient_;
  std::optional<SideStream> side_;
};

}  // namespace reimplementation::cuda
