// Exponentials of vectors, as a softmax needs them: of numbers up to 0.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/footprints.h"
#include "cpu/vector.h"

namespace reimplementation::cpu {

// Lane by lane the larger one; `b` where `a` is NaN.
template <int lanes, typename T>
C10_ALWAYS_INLINE Vector<T, lanes> larger(const Vector<T, lanes>& a, const Vector<T, lanes>& b) {
  using Bits = Vector<Integer<T>, lanes>;
  const Bits is_larger = a > b;
  return reinterpret_cast<Vector<T, lanes>>(
      reinterpret_cast<Bits>(keep<lanes, T>(is_larger, a)) | reinterpret_cast<Bits>(keep<lanes, T>(~is_larger, b)));
}

// exp(x) for x <= 0, to two units in the last place; 0 where that is no normal float any more, NaN of NaN.
//
// x = n * log(2) + r with |r| <= log(2) / 2, so exp(x) = 2^n * exp(r), and of exp(r) eight terms of the series are
// left.
template <int lanes>
C10_ALWAYS_INLINE Vector<float, lanes> exponential(const Vector<float, lanes>& x) {
  constexpr float least = -87;
  constexpr float rounder = 0x1.8p23f;  // added to a number, it leaves the number's integer
  constexpr float log_2_high = 0x1.62ep-1f, log_2_low = 0x1.0bfbe8p-15f;  // n times the first one is exact
  using Bits = Vector<uint32_t, lanes>;
  const Vector<float, lanes> rounded = x * 0x1.715476p0f + rounder;
  const Vector<float, lanes> n = rounded - rounder;
  const Vector<float, lanes> r = (x - n * log_2_high) - n * log_2_low;
  Vector<float, lanes> series = r * (1 / 5040.0f) + 1 / 720.0f;
  series = series * r + 1 / 120.0f;
  series = series * r + 1 / 24.0f;
  series = series * r + 1 / 6.0f;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const Bits power = (reinterpret_cast<Bits>(rounded) << 23) + (127u << 23);  // the exponent's bits of 2^n
  return keep<lanes, float>(~(x < least), series * reinterpret_cast<Vector<float, lanes>>(power));
}

template <int lanes>
C10_ALWAYS_INLINE Vector<double, lanes> exponential(const Vector<double, lanes>& x) {
  Vector<double, lanes> result;
  for (int lane = 0; lane < lanes; ++lane) {
    result[lane] = std::exp(x[lane]);
  }
  return result;
}

}  // namespace reimplementation::cpu
