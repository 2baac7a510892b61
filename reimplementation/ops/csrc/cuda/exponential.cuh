// Exponentials, as a softmax needs them.
#pragma once

namespace reimplementation::cuda {

__device__ __forceinline__ float exponential(float x) {
  return __expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

}  // namespace reimplementation::cuda
