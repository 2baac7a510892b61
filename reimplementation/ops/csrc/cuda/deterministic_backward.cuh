// The backward of both ops on CUDA with the same bits every time: one computation, seen from its samples.
//
// Deformable aggregation and multi-scale deformable attention differ in which of their operands' dimensions they have. Here
// a *sample* is numbered by (batch, head, query, point, camera, level); an op without heads or cameras has one of them,
// and a stride of 0 says that an operand does not change along a dimension.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>

#include "../common/levels.h"

namespace reimplementation::cuda {

// Elements from one (batch, head, query, point, camera, level) to the next; last, from x to y or from group to group.
using SampleStrides = std::array<int64_t, 7>;

struct SampledOp {
  int64_t batch, heads, queries, points, cams, levels;
  int64_t rows;              // pixels of all cameras and levels
  int64_t channels, groups;  // of a head; each group of channels has its own weights
  bool unit_square;          // locations outside the open unit square count for nothing, else footprints off the level
  LevelTable level_table;    // cams * levels levels

  torch::stable::Tensor features;     // (batch, rows, heads, channels), contiguous
  torch::stable::Tensor grad_output;  // (batch, queries, heads, channels), contiguous
  torch::stable::Tensor locations, weights;
  SampleStrides location_strides, weight_strides;

  // Filled where they have elements. Features' gradient is laid out like the features.
  torch::stable::Tensor grad_features, grad_locations, grad_weights;
  SampleStrides grad_location_strides, grad_weight_strides;
};

void deterministic_backward(const SampledOp& op);

}  // namespace reimplementation::cuda
