// Whether a GPU still answers.
#include <cuda_runtime.h>

#include <string>

#include "shared/tensors.h"

namespace reimplementation::cuda {

std::string lasting_error(int32_t device_index) {
  int current = 0;
  cudaGetDevice(&current);
  cudaSetDevice(device_index);
  size_t free = 0, total = 0;
  const cudaError_t error = cudaMemGetInfo(&free, &total);  // any question would do
  cudaSetDevice(current);
  cudaGetLastError();  // or the next launch would be told of it
  return error == cudaSuccess || error == cudaErrorMemoryAllocation ? "" : cudaGetErrorString(error);
}

}  // namespace reimplementation::cuda
