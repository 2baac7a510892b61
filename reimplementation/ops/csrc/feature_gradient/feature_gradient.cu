#include "feature_gradient/feature_gradient.cuh"

#include "feature_gradient/sum_samples.cuh"
#include "feature_gradient/weights.cuh"

namespace reimplementation::feature_gradient {

FeatureGradient::FeatureGradient(const Tensor& features, bool beside, cudaStream_t stream) : stream_(stream) {
  if (beside) {
    side_.emplace(stream, features.get_device_index());
  }
}

FeatureGradient::FeatureGradient(
    const SampledOp& op,
    const Tensor& grad_output,
    const Tensor& features,
    bool deterministic,
    bool beside,
    cudaStream_t stream)
    : FeatureGradient(features, beside, stream) {
  read_ = op;
  dispatch_types(features, op.weights, [&](auto* t, auto* w) {
    using W = std::remove_pointer_t<decltype(w)>;
    start<std::remove_pointer_t<decltype(t)>>(op, GivenWeights<W>(op), grad_output, features, deterministic);
  });
}

Tensor FeatureGradient::finish() {
  if (side_) {
    side_->join();
  }
  return *gradient_;
}

}  // namespace reimplementation::feature_gradient
