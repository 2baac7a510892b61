// PyTorch's tensor functions as the ops need them.
//
// - Where memory runs out they say so, and where something else went wrong they say that, as far as anybody tells: libtorch's
//   stable ABI drops the message of an error.
// - The way through the dispatcher, boxed, takes as long as launching a kernel. They ask whether there is anything to do
//   before they take it, and new memory comes straight from the C functions under the stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

// What the last call said that failed: a function of libtorch from 2.13 on, null before.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace reimplementation {

#ifdef REIMPLEMENTATION_WITH_CUDA
namespace cuda {
// The error of a kernel that failed on a GPU, with which every later call there fails too; empty where there is none.
std::string lasting_error(int32_t device_index);
}  // namespace cuda
#endif

inline std::string device_name(const torch::stable::Tensor& tensor) {
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "the CPU";
}

// Why a call of libtorch failed that had to do with a tensor's device; empty where nobody tells.
inline std::string cause_of_failure([[maybe_unused]] const torch::stable::Tensor& tensor) {
#ifdef REIMPLEMENTATION_WITH_CUDA
  if (tensor.is_cuda()) {
    const std::string error = cuda::lasting_error(tensor.get_device_index());
    if (!error.empty()) {
      return "CUDA error: " + error + ", of a kernel that ran before";
    }
  }
#endif
  return torch_exception_get_what_without_backtrace != nullptr ? torch_exception_get_what_without_backtrace() : "";
}

[[noreturn]] inline void throw_out_of_memory(const torch::stable::Tensor& like, double bytes) {
  std::ostringstream text;  // begins as PyTorch's does, which callers look for
  text << (like.is_cuda() ? "CUDA out of memory on " + device_name(like) : "CPU out of memory")
       << ". Tried to allocate " << bytes / (1 << 30) << " GiB in an op of reimplementation";
  throw std::runtime_error(text.str());
}

// Memory for a tensor like this one was refused: there is not enough of it, unless somebody tells of another cause.
[[noreturn]] inline void throw_allocation_failure(const torch::stable::Tensor& like, double bytes) {
  const std::string cause = like.is_cuda() ? cause_of_failure(like) : "";
  if (cause.empty() || cause.find("out of memory") != std::string::npos) {
    throw_out_of_memory(like, bytes);
  }
  std::ostringstream text;
  text << bytes / (1 << 30) << " GiB could not be allocated on " << device_name(like)
       << " in an op of reimplementation: " << cause;
  throw std::runtime_error(text.str());
}

inline double bytes_of(const torch::stable::Tensor& tensor) {
  return static_cast<double>(tensor.numel()) * static_cast<double>(tensor.element_size());
}

// Uninitialised, contiguous, on the device of `like`; of its type where none is given.
inline torch::stable::Tensor allocate(
    const torch::stable::Tensor& like,
    torch::headeronly::IntHeaderOnlyArrayRef sizes,
    std::optional<torch::headeronly::ScalarType> type = {}) {
  constexpr size_t MOST_DIMS = 8;  // more than an operand has
  std::array<int64_t, MOST_DIMS> strides;
  STD_TORCH_CHECK(sizes.size() <= MOST_DIMS, "a tensor of so many dimensions is not expected: ", sizes.size());
  const int32_t dtype =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type.value_or(like.scalar_type())));
  double bytes = static_cast<double>(aoti_torch_dtype_element_size(dtype));
  for (int64_t size : sizes) {
    bytes *= static_cast<double>(std::max<int64_t>(size, 1));
  }
  if (bytes >= 0x1p62) {  // strides would not fit their type
    throw_out_of_memory(like, bytes);
  }
  int64_t stride = 1;
  for (size_t dim = sizes.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(sizes[dim], 1);
  }
  int32_t device_type;
  const AOTITorchError error = aoti_torch_get_device_type(like.get(), &device_type);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "a tensor does not tell its device");
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(
          static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, device_type, like.get_device_index(),
          &handle) != AOTI_TORCH_SUCCESS) {
    throw_allocation_failure(like, bytes);
  }
  return torch::stable::Tensor(handle);
}

inline torch::stable::Tensor allocate_zeros(
    const torch::stable::Tensor& like,
    torch::headeronly::IntHeaderOnlyArrayRef sizes,
    std::optional<torch::headeronly::ScalarType> type = {}) {
  torch::stable::Tensor zeros = allocate(like, sizes, type);
  return torch::stable::zero_(zeros);
}

// With the tensor's strides where these are dense.
inline torch::stable::Tensor allocate_like(const torch::stable::Tensor& tensor) {
  if (tensor.is_contiguous()) {
    return allocate(tensor, tensor.sizes());
  }
  try {
    return torch::stable::empty_like(tensor);
  } catch (const std::exception&) {
    throw_allocation_failure(tensor, bytes_of(tensor));
  }
}

// Contiguous, in any type.
inline torch::stable::Tensor copied(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  torch::stable::Tensor copy = allocate(tensor, tensor.sizes(), type);
  try {
    return torch::stable::copy_(copy, tensor);
  } catch (const std::exception& error) {
    const std::string cause = cause_of_failure(tensor);
    throw std::runtime_error(
        "a tensor could not be copied on " + device_name(tensor) + ": " + (cause.empty() ? error.what() : cause));
  }
}

inline torch::stable::Tensor as_contiguous(const torch::stable::Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : copied(tensor, tensor.scalar_type());
}

inline std::optional<torch::stable::Tensor> as_contiguous(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? std::optional(as_contiguous(*tensor)) : std::nullopt;
}

inline torch::stable::Tensor as_type(const torch::stable::Tensor& tensor, torch::headeronly::ScalarType type) {
  return tensor.scalar_type() == type ? tensor : copied(tensor, type);
}

// For the gradient of an operand; of no element where it is not needed.
inline torch::stable::Tensor gradient_of(const torch::stable::Tensor& operand, bool needed) {
  return needed ? allocate_like(operand) : allocate(operand, {0});
}

// The same, contiguous whatever the operand is.
inline torch::stable::Tensor contiguous_gradient(const torch::stable::Tensor& operand, bool needed) {
  return needed ? allocate(operand, operand.sizes()) : allocate(operand, {0});
}

inline torch::stable::Tensor zero_gradient_of(const torch::stable::Tensor& operand, bool needed) {
  torch::stable::Tensor gradient = gradient_of(operand, needed);
  return torch::stable::zero_(gradient);
}

// Calls `function` with a zero of the tensor's type, which is float32 or float64.
template <typename Function>
void with_real_type(const torch::stable::Tensor& tensor, const Function& function) {
  if (tensor.scalar_type() == torch::headeronly::ScalarType::Double) {
    function(double{});
  } else {
    function(float{});
  }
}

}  // namespace reimplementation
