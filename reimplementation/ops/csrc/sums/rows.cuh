// A block of (COLUMNS, ADDERS) threads adds COLUMNS neighbouring columns: every adder takes its share of the rows, each 32 bytes of
// them a sector of memory, and then the adders' sums are added in pairs.
#pragma once

#include <cstdint>

namespace reimplementation::sums {

constexpr int COLUMNS = 8, ADDERS = 128;

// In the threads of adder 0: the sum of the column that is theirs.
template <typename T>
__device__ __forceinline__ T
sum_of_column(const T* matrix, int64_t rows, int64_t row_step, int64_t column, bool is_there) {
  __shared__ T added[ADDERS][COLUMNS];
  T sum = 0;
  if (is_there) {
#pragma unroll 4
    for (int64_t row = threadIdx.y; row < rows; row += ADDERS) {
      sum += matrix[row * row_step + column];
    }
  }
  added[threadIdx.y][threadIdx.x] = sum;
  for (int step = ADDERS / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.y < step) {
      added[threadIdx.y][threadIdx.x] += added[threadIdx.y + step][threadIdx.x];
    }
  }
  return added[threadIdx.y][threadIdx.x];
}

__device__ __forceinline__ int64_t column_of_thread() {
  return static_cast<int64_t>(blockIdx.x) * COLUMNS + threadIdx.x;
}

inline unsigned blocks_for(int64_t columns) {
  return static_cast<unsigned>((columns + COLUMNS - 1) / COLUMNS);
}

}  // namespace reimplementation::sums
