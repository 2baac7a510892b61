// On the CPU: threads share out the columns, and go down the rows with all of theirs.
#include "sums/op.h"

#include <algorithm>
#include <cstdint>

#include "cpu/capability.h"
#include "shared/tensors.h"

namespace reimplementation::sums {

using namespace cpu;

namespace {

template <typename T>
struct SumRows {
  const T* matrix;
  int64_t rows, row_step;
  T* sums;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    std::fill(sums + begin, sums + end, T(0));
    for (int64_t row = 0; row < rows; ++row) {
      const T* const from = matrix + row * row_step;
      for (int64_t i = begin; i < end; ++i) {
        sums[i] += from[i];
      }
    }
  }
};

constexpr int64_t VECTORISED = 8;  // additions at a time

}  // namespace

Tensor sum_rows_cpu(const Tensor& matrix) {
  const Tensor sums = allocate(matrix, {matrix.size(1)});
  with_real_type(matrix, [&](auto zero) {
    using T = decltype(zero);
    const SumRows<T> kernel{
        static_cast<const T*>(matrix.const_data_ptr()), matrix.size(0), matrix.stride(0),
        static_cast<T*>(sums.mutable_data_ptr())};
    if (matrix.size(1) > 0) {
      parallel_run(kernel, matrix.size(1), items_per_thread(1 + matrix.size(0) / VECTORISED));
    }
  });
  return sums;
}

}  // namespace reimplementation::sums
