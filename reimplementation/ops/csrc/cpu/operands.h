// The tensors of a call as the kernels see them: elements through strides, levels that were checked, types by name.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <type_traits>
#include <vector>

#include "shared/checks.h"
#include "shared/levels.h"
#include "shared/tensors.h"
#include "cpu/vector.h"

namespace reimplementation::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor's elements, addressed through its strides.
template <typename T, int dims>
class View {
 public:
  explicit View(const Tensor& tensor) {
    if constexpr (std::is_const_v<T>) {
      data_ = static_cast<T*>(tensor.const_data_ptr());
    } else {
      data_ = static_cast<T*>(tensor.mutable_data_ptr());
    }
    for (int dim = 0; dim < dims; ++dim) {
      strides_[dim] = tensor.stride(dim);
    }
  }

  // The element at the given indices; 0 for the dimensions left out.
  template <typename... Index>
  T* at(Index... index) const {
    T* element = data_;
    const int64_t* stride = strides_;
    ((element += index * *stride++), ...);
    return element;
  }

  int64_t stride(int dim) const {
    return strides_[dim];
  }

 private:
  T* data_;
  int64_t strides_[dims];
};

// The metadata of a call that was checked.
inline std::vector<Level> read_levels(const Tensor& shapes, const Tensor& starts, int64_t num_rows) {
  const Tensor readable_shapes = readable_metadata(shapes);
  const Tensor readable_starts = readable_metadata(starts);
  const LevelTable table = level_table(readable_shapes, readable_starts, num_rows);
  std::vector<Level> levels(starts.numel());
  for (size_t i = 0; i < levels.size(); ++i) {
    levels[i] = table[static_cast<int64_t>(i)];
  }
  return levels;
}

// Calls `function` with a zero of the features' type and one of the weights' type.
template <typename Function>
void with_types(const char* name, const Tensor& features, const Tensor& weights, const Function& function) {
  const bool same = weights.scalar_type() == features.scalar_type();
  switch (features.scalar_type()) {
    case ScalarType::Double:
      return function(double{}, double{});
    case ScalarType::Float:
      return function(float{}, float{});
    case ScalarType::Half:
      return same ? function(Half{}, Half{}) : function(Half{}, float{});
    case ScalarType::BFloat16:
      return same ? function(BFloat16{}, BFloat16{}) : function(BFloat16{}, float{});
    default:
      STD_TORCH_CHECK(false, name, " must be float64, float32, float16 or bfloat16");
  }
}

}  // namespace reimplementation::cpu
