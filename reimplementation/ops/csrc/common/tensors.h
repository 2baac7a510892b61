// Tensors as the kernels need them, and memory for gradients.
//
// PyTorch's functions return what they are given where there is nothing to do, but after a way through the dispatcher that
// takes as long as launching a kernel: so ask first.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace reimplementation {

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline torch::stable::Tensor as_type(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// For the gradient of an operand; of no element where it is not needed.
inline torch::stable::Tensor gradient_of(const torch::stable::Tensor& operand, bool needed) {
  return needed ? torch::stable::empty_like(operand) : torch::stable::new_empty(operand, {0});
}

inline torch::stable::Tensor zero_gradient_of(const torch::stable::Tensor& operand, bool needed) {
  torch::stable::Tensor gradient = gradient_of(operand, needed);
  return torch::stable::zero_(gradient);
}

}  // namespace reimplementation
