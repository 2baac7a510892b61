// Memory for gradients.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace reimplementation {

// For the gradient of an operand; of no element where it is not needed.
inline torch::stable::Tensor gradient_of(const torch::stable::Tensor& operand, bool needed) {
  return needed ? torch::stable::empty_like(operand) : torch::stable::new_empty(operand, {0});
}

inline torch::stable::Tensor zero_gradient_of(const torch::stable::Tensor& operand, bool needed) {
  torch::stable::Tensor gradient = gradient_of(operand, needed);
  return torch::stable::zero_(gradient);
}

}  // namespace reimplementation
