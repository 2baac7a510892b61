// PyTorch's tensor functions as the ops need them.
//
// - Where memory runs out they say so: libtorch's stable ABI of 2.10 drops the message of an error.
// - They ask whether there is anything to do before they take the way through the dispatcher, which takes as long as
//   launching a kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>

namespace reimplementation {

// What `function` returns, for which PyTorch takes memory on the device of `like`.
template <typename Function>
torch::stable::Tensor allocated(const torch::stable::Tensor& like, double bytes, Function function) {
  try {
    return function();
  } catch (const std::exception&) {
    std::ostringstream text;
    text << (like.is_cuda() ? "CUDA" : "CPU") << " out of memory. Tried to allocate " << bytes / (1 << 30)
         << " GiB in an op of reimplementation";
    throw std::runtime_error(text.str());  // begins as PyTorch's does, which callers look for
  }
}

inline double bytes_of(const torch::stable::Tensor& tensor) {
  return static_cast<double>(tensor.numel()) * static_cast<double>(tensor.element_size());
}

inline int size_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Byte:
      return 1;
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

inline double bytes_of(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType type) {
  double bytes = size_of(type);
  for (int64_t size : sizes) {
    bytes *= static_cast<double>(size);
  }
  return bytes;
}

inline torch::stable::Tensor allocate(
    const torch::stable::Tensor& like,
    std::initializer_list<int64_t> sizes,
    std::optional<torch::headeronly::ScalarType> type = {}) {
  return allocated(like, bytes_of(sizes, type.value_or(like.scalar_type())), [&] {
    return torch::stable::new_empty(like, sizes, type);
  });
}

inline torch::stable::Tensor allocate_zeros(
    const torch::stable::Tensor& like,
    std::initializer_list<int64_t> sizes,
    std::optional<torch::headeronly::ScalarType> type = {}) {
  return allocated(like, bytes_of(sizes, type.value_or(like.scalar_type())), [&] {
    return torch::stable::new_zeros(like, sizes, type);
  });
}

inline torch::stable::Tensor allocate_like(const torch::stable::Tensor& tensor) {
  return allocated(tensor, bytes_of(tensor), [&] { return torch::stable::empty_like(tensor); });
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous()
      ? tensor
      : allocated(tensor, bytes_of(tensor), [&] { return torch::stable::contiguous(tensor); });
}

inline torch::stable::Tensor as_type(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  return tensor.scalar_type() == type
      ? tensor
      : allocated(tensor, bytes_of(tensor), [&] { return torch::stable::to(tensor, type); });
}

// For the gradient of an operand; of no element where it is not needed.
inline torch::stable::Tensor gradient_of(const torch::stable::Tensor& operand, bool needed) {
  return needed ? allocate_like(operand) : allocate(operand, {0});
}

inline torch::stable::Tensor zero_gradient_of(const torch::stable::Tensor& operand, bool needed) {
  torch::stable::Tensor gradient = gradient_of(operand, needed);
  return torch::stable::zero_(gradient);
}

}  // namespace reimplementation
