// The bilinear footprints of many sampling locations at once: shared/footprint.h, lane by lane.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/vector.h"

namespace reimplementation::cpu {

// The integer as wide as T, so that an integer's lane lies where a number's does.
template <typename T>
using Integer = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// `value` where the mask is all ones, and 0 where it is zero.
template <int lanes, typename T>
C10_ALWAYS_INLINE Vector<T, lanes> keep(const Vector<Integer<T>, lanes>& mask, const Vector<T, lanes>& value) {
  return reinterpret_cast<Vector<T, lanes>>(mask & reinterpret_cast<Vector<Integer<T>, lanes>>(value));
}

// As `Axis`.
template <typename T, int lanes>
struct VectorAxis {
  Vector<T, lanes> weight[2];
  Vector<T, lanes> slope[2];
  Vector<Integer<T>, lanes> index[2];
};

// As `bilinear_axis`: `pixel` lies in (-1, size), and size > 0.
template <int lanes, typename T>
C10_ALWAYS_INLINE VectorAxis<T, lanes> bilinear_axes(const Vector<T, lanes>& pixel, const Vector<T, lanes>& size) {
  using Numbers = Vector<T, lanes>;
  using Integers = Vector<Integer<T>, lanes>;
  const Integers truncated = __builtin_convertvector(pixel, Integers);
  const Integers first = truncated + (__builtin_convertvector(truncated, Numbers) > pixel);  // a mask is 0 or -1
  const Numbers low = __builtin_convertvector(first, Numbers);
  const Numbers fraction = pixel - low;
  const Integers first_inside = first >= 0;
  const Integers second_inside = low + 1 < size;

  VectorAxis<T, lanes> axis;
  axis.weight[0] = keep<lanes, T>(first_inside, 1 - fraction);
  axis.weight[1] = keep<lanes, T>(second_inside, fraction);
  axis.slope[0] = keep<lanes, T>(first_inside, -size);
  axis.slope[1] = keep<lanes, T>(second_inside, size);
  axis.index[0] = first & first_inside;
  axis.index[1] = first - second_inside;
  return axis;
}

}  // namespace reimplementation::cpu
