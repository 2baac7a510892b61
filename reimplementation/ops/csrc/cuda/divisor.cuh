// Division without dividing.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

namespace reimplementation::cuda {

// Division of numbers below 2^31 by one that the host knows: a multiplication and a shift.
// After Granlund and Montgomery, Division by Invariant Integers using Multiplication (1994).
struct Divisor {
  int divisor;
  unsigned factor, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<int>(d)), shift(ceil_log2(d)) {
    STD_TORCH_CHECK(divisor > 0, "a kernel's divisor must be from 1 to 2^31 - 1, got ", d);  // 0 would end the process
    factor = static_cast<unsigned>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  // Leaves the quotient in `number` and returns the remainder.
  __device__ __forceinline__ int split(unsigned& number) const {
    const unsigned whole = number;
    number = (__umulhi(whole, factor) + whole) >> shift;
    return static_cast<int>(whole - number * divisor);
  }
};

}  // namespace reimplementation::cuda
