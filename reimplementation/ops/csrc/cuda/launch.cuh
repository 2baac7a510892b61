// What every kernel launch needs: the tensors' types and strides, the stream of their device, a look at the launch's error.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "shared/tensors.h"
#include "cuda/vector.cuh"

namespace reimplementation::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// PyTorch's current stream on a device. The function lives in libtorch_cuda, which a CPU build of PyTorch lacks; it is
// looked up when first used, so that one and the same library loads under both.
inline cudaStream_t current_stream(int32_t device_index) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function get_current_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get_current_stream != nullptr, "libtorch_cuda.so is not loaded: PyTorch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_current_stream(device_index, &stream) == 0, "no current CUDA stream on device ", device_index);
  return static_cast<cudaStream_t>(stream);
}

constexpr int64_t MOST_BLOCKS = 65535;  // of a grid, along y and along z

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, " could not be launched: ", cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "a GPU does not tell its sizes");
  return value;
}

// How many blocks keep a GPU busy of which each multiprocessor holds so many.
inline int64_t resident_blocks(int of_multiprocessor, int device) {
  return int64_t{of_multiprocessor} * device_attribute(cudaDevAttrMultiProcessorCount, device);
}

// Calls `body` with a null T* and a null W* of the features' and the weights' types.
template <typename Body>
void dispatch_types(const Tensor& features, const Tensor& weights, Body body) {
  auto with_features = [&](auto* t) {
    if (weights.scalar_type() == features.scalar_type()) {
      body(t, t);
    } else {
      body(t, static_cast<compute_t<std::remove_pointer_t<decltype(t)>>*>(nullptr));
    }
  };
  switch (features.scalar_type()) {
    case ScalarType::Double:
      return body(static_cast<double*>(nullptr), static_cast<double*>(nullptr));
    case ScalarType::Float:
      return body(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    case ScalarType::Half:
      return with_features(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16:
      return with_features(static_cast<__nv_bfloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "feature_maps must be float64, float32, float16 or bfloat16");
  }
}

inline void copy_strides(const Tensor& tensor, int64_t* strides) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    strides[i] = tensor.stride(i);
  }
}

// Elements from one index of a dimension to the next. Where there is one index alone, a stride means nothing, and may be any.
inline int64_t step(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : 0;
}

// The same in 32 bits.
inline int short_step(int64_t step) {
  STD_TORCH_CHECK(
      step <= INT_MAX, "too large: neighbours along an inner dimension are ", step, " elements apart, more than 2^31");
  return static_cast<int>(step);
}

inline int short_step(const Tensor& tensor, int64_t dim) {
  return short_step(step(tensor, dim));
}

// The tensor itself, or a contiguous copy of it where steps along some inner dimension are beyond 32 bits. In a tensor of so
// many elements they still may be.
inline Tensor with_short_steps(const Tensor& tensor) {
  for (int64_t dim = 1; dim < tensor.dim(); ++dim) {
    if (step(tensor, dim) > INT_MAX) {
      return as_contiguous(tensor);
    }
  }
  return tensor;
}

inline int ceil_log2(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) {
    ++log;
  }
  return log;
}

// Of the lanes that span the channels if each holds `lane_channels`; of a warp at most.
inline int log2_lanes(int64_t channels, int lane_channels) {
  return std::min(ceil_log2(WARP), ceil_log2((channels + lane_channels - 1) / lane_channels));
}

inline bool is_aligned(const Tensor& tensor, int bytes) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

}  // namespace reimplementation::cuda
