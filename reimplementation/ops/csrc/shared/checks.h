// Argument checks of the C++ entry points: all that keeps a kernel from reading out of bounds. Where they refuse a call of the
// Python functions, these look at the arguments too, and speak better.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

namespace reimplementation {

inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text << (i ? ", " : "") << tensor.size(i);
  }
  text << ")";
  return text.str();
}

inline void check_shape(
    const char* name, const torch::stable::Tensor& tensor, std::initializer_list<int64_t> expected) {
  bool fits = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t i = 0;
  for (int64_t size : expected) {
    fits = fits && tensor.size(i++) == size;
  }
  if (fits) {
    return;
  }
  std::ostringstream text;
  for (int64_t size : expected) {
    text << (text.tellp() > 0 ? ", " : "") << size;
  }
  STD_TORCH_CHECK(false, name, " must be (", text.str(), "); got ", shape_text(tensor));
}

inline void check_dim(const char* name, const torch::stable::Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must have ", dim, " dimensions; got shape ", shape_text(tensor));
}

inline bool on_same_device(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_same_device(
    const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& features) {
  STD_TORCH_CHECK(on_same_device(tensor, features), name, " must be on the features' device");
}

inline void check_features(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
          type == ScalarType::BFloat16,
      name, " must be float64, float32, float16 or bfloat16");
}

// The first operand of an op that computes in one dtype, float32 or float64.
inline void check_real(const char* name, const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Double || type == ScalarType::Float, name, " must be float64 or float32");
}

// The other operands of such an op.
inline void check_like(
    const char* name, const torch::stable::Tensor& tensor, const char* first_name, const torch::stable::Tensor& first) {
  STD_TORCH_CHECK(on_same_device(tensor, first), name, " must be on the device of ", first_name);
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), name, " must have the dtype of ", first_name);
}

// Shapes and first rows of levels.
inline void check_metadata(
    const char* name, const torch::stable::Tensor& tensor, const torch::stable::Tensor& features) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Short || type == ScalarType::Char ||
          type == ScalarType::Byte,
      name, " must be an integer tensor");
  STD_TORCH_CHECK(
      tensor.is_cpu() || on_same_device(tensor, features), name, " must be on the CPU or the features' device");
}

// The type of locations and sums.
inline torch::headeronly::ScalarType compute_type(const torch::stable::Tensor& features) {
  using torch::headeronly::ScalarType;
  return features.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace reimplementation
