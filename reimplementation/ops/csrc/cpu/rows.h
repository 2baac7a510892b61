// What the inner loops of the kernels are made of: the corners of footprints, and the rows of channels that they read.
// A row may have any number of channels: it is worked through in vectors of `lanes`, then of half as many, down to one.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/vector.h"

namespace reimplementation::cpu {

// One value for each pixel of a footprint, in the order (x, y) = (0, 0), (1, 0), (0, 1), (1, 1).
template <typename T>
using Corners = std::array<T, 4>;

// What a corner weighs; of one footprint, or of a vector of them.
template <typename Axis>
C10_ALWAYS_INLINE auto corner_weight(const Axis& x, const Axis& y, int corner) {
  return x.weight[corner & 1] * y.weight[corner >> 1];
}

// Adds to a location's gradient what one corner contributes, whose weight has the gradient `along`.
template <typename T, typename Axis>
C10_ALWAYS_INLINE void add_location_gradient(
    T& grad_x, T& grad_y, const Axis& x, const Axis& y, int corner, const T& along) {
  grad_x += along * x.slope[corner & 1] * y.weight[corner >> 1];
  grad_y += along * x.weight[corner & 1] * y.slope[corner >> 1];
}

// sum += scale * from, for `count` elements.
template <int lanes, typename T>
C10_ALWAYS_INLINE void add_scaled(T* sum, const T* from, T scale, int64_t count) {
  for (; count >= lanes; count -= lanes, sum += lanes, from += lanes) {
    store<lanes>(sum, load<lanes>(sum) + scale * load<lanes>(from));
  }
  if constexpr (lanes > 1) {
    add_scaled<lanes / 2>(sum, from, scale, count);
  }
}

// sum += scale[0] * rows[0] + ... + scale[3] * rows[3], for `count` elements from `first` on.
template <int lanes, typename T, typename Feature>
C10_ALWAYS_INLINE void add_corners(
    T* sum, const Corners<const Feature*>& rows, const Corners<T>& scale, int64_t first, int64_t count) {
  for (; count >= lanes; count -= lanes, first += lanes) {
    store<lanes>(
        sum + first,
        load<lanes>(sum + first) + scale[0] * load<lanes>(rows[0] + first) + scale[1] * load<lanes>(rows[1] + first) +
            scale[2] * load<lanes>(rows[2] + first) + scale[3] * load<lanes>(rows[3] + first));
  }
  if constexpr (lanes > 1) {
    add_corners<lanes / 2>(sum, rows, scale, first, count);
  }
}

// dot[i] += the product of `with` and rows[i], for `count` elements from `first` on.
template <int lanes, typename T, typename Feature>
C10_ALWAYS_INLINE void add_dot_products(
    Corners<T>& dot, const T* with, const Corners<const Feature*>& rows, int64_t first, int64_t count) {
  if (count >= lanes) {
    Vector<T, lanes> sums[4] = {};
    for (; count >= lanes; count -= lanes, first += lanes) {
      const Vector<T, lanes> factor = load<lanes>(with + first);
      for (int i = 0; i < 4; ++i) {
        sums[i] += factor * load<lanes>(rows[i] + first);
      }
    }
    for (int i = 0; i < 4; ++i) {
      dot[i] += sum_of_lanes<lanes, T>(sums[i]);
    }
  }
  if constexpr (lanes > 1) {
    add_dot_products<lanes / 2>(dot, with, rows, first, count);
  }
}

template <int lanes, typename T, typename Stored>
C10_ALWAYS_INLINE void convert(Stored* to, const T* from, int64_t count) {
  for (; count >= lanes; count -= lanes, to += lanes, from += lanes) {
    store<lanes>(to, load<lanes>(from));
  }
  if constexpr (lanes > 1) {
    convert<lanes / 2>(to, from, count);
  }
}

}  // namespace reimplementation::cpu
