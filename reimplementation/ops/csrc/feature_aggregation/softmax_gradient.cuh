// From the terms of the weights' gradients to the gradients of the logits.
#pragma once

#include "feature_aggregation/softmax.cuh"

namespace reimplementation::feature_aggregation {

// Subtracts from the terms w * u of every query's logits what the group's mean takes, w * mean: writes `grad_logits`,
// which may be the very same memory where no blocks share queries, and `grad_camera_logits` from the parts (batch, num_parts, cams, row) that hold the
// sums of the terms. Either may be null. `like` has the dtype of the terms.
template <typename T, typename L>
void differentiate_softmax(
    const Sizes& sizes,
    const Inputs<T, L>& in,
    const compute_t<T>* terms,
    const compute_t<T>* camera_parts,
    int64_t num_parts,
    L* grad_logits,
    L* grad_camera_logits,
    const Tensor& like,
    cudaStream_t stream);

}  // namespace reimplementation::feature_aggregation
