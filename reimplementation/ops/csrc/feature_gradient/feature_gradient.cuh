// The gradient of the features on CUDA, for both ops: one computation, seen from its samples.
//
// Deformable aggregation and multi-scale deformable attention differ in which of their operands' dimensions they have. Here
// a *sample* is numbered by (batch, head, query, point, camera, level); an op without heads or cameras has one of them,
// and a step of 0 says that an operand does not change along a dimension.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "cuda/streams.cuh"
#include "feature_gradient/division.h"
#include "shared/levels.h"

namespace reimplementation::feature_gradient {

using cuda::SideStream;
using torch::stable::Tensor;

// Elements from one (batch, head, query, point, camera, level) to the next; last, from x to y or from group to group. All
// behind the query's must be below 2^31.
using SampleSteps = std::array<int64_t, 7>;

struct SampledOp : Sizes {
  bool unit_square;        // locations outside the open unit square count for nothing, else footprints off the level
  LevelTable level_table;  // cams * levels levels
  Tensor locations, weights;
  SampleSteps location_steps, weight_steps;
};

// The gradient of `features` (batch, rows, heads, channels) from `grad_output` (batch, queries, heads, channels), both
// contiguous and of one dtype. The same bits every time, if deterministic; else faster.
//
// Works on `stream`, PyTorch's current one, or on a second stream beside what the caller launches there until `finish`. Steps
// that do not need each other are on one more stream, which forks off that one and joins it again.
class FeatureGradient {
 public:
  FeatureGradient(
      const SampledOp& op,
      const Tensor& grad_output,
      const Tensor& features,
      bool deterministic,
      bool beside,
      cudaStream_t stream);

  // The same where weights are not in memory: then `start` follows, which sum_samples.cuh has, with what weights.cuh
  // describes instead of the op's weights. What both read must outlive `finish`.
  FeatureGradient(const Tensor& features, bool beside, cudaStream_t stream);

  template <typename T, typename Weights>
  void start(
      const SampledOp& op,
      const Weights& weights,
      const Tensor& grad_output,
      const Tensor& features,
      bool deterministic);

  // `stream` waits for the second one. Only after that the memory that was worked in is free for others, with the object.
  Tensor finish();

 private:
  cudaStream_t stream_;
  // In this order: the streams join before the rest goes.
  std::optional<SampledOp> read_;
  std::optional<Tensor> memory_, gradient_;
  std::optional<SideStream> side_;
};

}  // namespace reimplementation::feature_gradient
