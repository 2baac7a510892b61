// Adds eight numbers to float16 and bfloat16 sums from 32 threads at once, and prints the sums. All of them are exact.
#include <cstdio>
#include <cstring>

#include "cuda/vector.cuh"

using namespace reimplementation::cuda;

template <typename T>
__global__ void add(T* sums) {
  const float terms[8] = {0.125f, -0.125f, 0.25f, -0.25f, 0.0625f, 0, -0.0625f, 0.03125f};
  atomic_add_vector(sums, terms);
}

template <typename T>
float as_float(T value) {
  unsigned short half;
  memcpy(&half, &value, sizeof(half));
  if (std::is_same_v<T, __nv_bfloat16>) {
    const unsigned word = static_cast<unsigned>(half) << 16;
    float number;
    memcpy(&number, &word, sizeof(number));
    return number;
  }
  return __half2float(*reinterpret_cast<__half*>(&half));
}

template <typename T>
bool print_sums() {
  T* sums;
  cudaMallocManaged(&sums, 8 * sizeof(T));
  memset(sums, 0, 8 * sizeof(T));
  add<<<2, 16>>>(sums);
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    return false;
  }
  for (int i = 0; i < 8; ++i) {
    std::printf("%g ", as_float(sums[i]));
  }
  std::printf("\n");
  return true;
}

int main() {
  return print_sums<__half>() && print_sums<__nv_bfloat16>() ? 0 : 1;
}
