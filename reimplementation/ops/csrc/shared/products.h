// PyTorch's matrix products and sums, as C functions under the dispatcher: autocast and autograd, which live in it, have no say
// here, and a call takes a fraction of the host's time.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "shared/tensors.h"
#include "shared/views.h"

extern "C" {
AOTITorchError aoti_torch_cpu_mm_out(AtenTensorHandle out, AtenTensorHandle a, AtenTensorHandle b);
AOTITorchError aoti_torch_cpu_addmm_out(
    AtenTensorHandle out, AtenTensorHandle added, AtenTensorHandle a, AtenTensorHandle b, double beta, double alpha);
AOTITorchError aoti_torch_cpu_add_Tensor(AtenTensorHandle a, AtenTensorHandle b, double alpha, AtenTensorHandle* sum);
}

namespace reimplementation {

struct Products {
  decltype(&aoti_torch_cpu_mm_out) mm_out;
  decltype(&aoti_torch_cpu_addmm_out) addmm_out;
  decltype(&aoti_torch_cpu_add_Tensor) add;
};

// The functions of libtorch_cuda, which a CPU build of PyTorch lacks: they are looked up when first used, so that one and the same
// library loads under both.
inline Products products_on_cuda() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(library != nullptr, "libtorch_cuda.so is not loaded: PyTorch was built without CUDA");
  auto find = [&](auto* like, const char* name) {
    void* function = dlsym(library, name);
    STD_TORCH_CHECK(function != nullptr, "libtorch_cuda.so has no ", name);
    return reinterpret_cast<decltype(like)>(function);
  };
  return {
      find(&aoti_torch_cpu_mm_out, "aoti_torch_cuda_mm_out"),
      find(&aoti_torch_cpu_addmm_out, "aoti_torch_cuda_addmm_out"),
      find(&aoti_torch_cpu_add_Tensor, "aoti_torch_cuda_add_Tensor")};
}

inline const Products& products_for(const torch::stable::Tensor& tensor) {
  static constexpr Products on_cpu{&aoti_torch_cpu_mm_out, &aoti_torch_cpu_addmm_out, &aoti_torch_cpu_add_Tensor};
  if (!tensor.is_cuda()) {
    return on_cpu;
  }
  static const Products on_cuda = products_on_cuda();
  return on_cuda;
}

inline void check_product(AOTITorchError error, const torch::stable::Tensor& tensor) {
  if (error != AOTI_TORCH_SUCCESS) {
    const std::string cause = cause_of_failure(tensor);
    throw std::runtime_error("a matrix product failed on " + device_name(tensor) + (cause.empty() ? "" : ": " + cause));
  }
}

// out = a @ b, of matrices on one device and of one type.
inline void multiply(const torch::stable::Tensor& a, const torch::stable::Tensor& b, const torch::stable::Tensor& out) {
  check_product(products_for(out).mm_out(out.get(), a.get(), b.get()), out);
}

inline torch::stable::Tensor product(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  const torch::stable::Tensor out = allocate(a, {a.size(0), b.size(1)});
  multiply(a, b, out);
  return out;
}

// out = added + a @ b, where `added` may be `out` itself, or one row for all.
inline void multiply_and_add(
    const torch::stable::Tensor& added,
    const torch::stable::Tensor& a,
    const torch::stable::Tensor& b,
    const torch::stable::Tensor& out) {
  check_product(products_for(out).addmm_out(out.get(), added.get(), a.get(), b.get(), 1, 1), out);
}

// Of shapes that broadcast.
inline torch::stable::Tensor sum_of(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  AtenTensorHandle handle = nullptr;
  check_product(products_for(a).add(a.get(), b.get(), 1, &handle), a);
  return torch::stable::Tensor(handle);
}

}  // namespace reimplementation
