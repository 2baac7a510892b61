// The gradient of the features of deformable feature aggregation on CUDA: that of deformable aggregation, without its
// weights in memory.
#pragma once

#include "feature_aggregation/operands.cuh"
#include "feature_gradient/feature_gradient.cuh"

namespace reimplementation::feature_aggregation {

// Works beside what the caller launches on `stream` until `finish`, if `beside`: see `FeatureGradient`.
class FeaturesGradient {
 public:
  template <typename T, typename L>
  FeaturesGradient(
      const Sizes& sizes,
      const Inputs<T, L>& in,
      const Tensor& statistics,
      const Tensor& grad_output,
      const Tensor& features,
      bool deterministic,
      bool beside,
      cudaStream_t stream);

  Tensor finish() {
    return sum_.finish();
  }

 private:
  // In this order: the streams join before what is read there goes.
  feature_gradient::SampledOp op_;
  Tensor shifts_;
  feature_gradient::FeatureGradient sum_;
};

}  // namespace reimplementation::feature_aggregation
