// The bilinear footprint of a sampling location in one level: four pixels, as the product of two axes.
#pragma once

#include <cmath>
#include <cstdint>

#include "shared/platform.h"

namespace reimplementation {

// One axis of a footprint: the two neighbouring pixels, what each weighs, and how its weight grows with the location.
// A pixel outside the level weighs nothing and takes the index of its neighbour inside, so that whoever reads it
// reads a pixel of the footprint and never a stranger's NaN.
template <typename T>
struct Axis {
  T weight[2];
  T slope[2];  // d weight / d location: -size, +size; 0 outside
  int index[2];
};

template <typename T>
HOST_DEVICE T pixel_position(T location, int size) {
  return location * static_cast<T>(size) - static_cast<T>(0.5);
}

// The axis at a pixel position in (-1, size) of a level that is `size` > 0 pixels long.
template <typename T>
HOST_DEVICE Axis<T> bilinear_axis(T pixel, int size) {
  constexpr T largest = 2147483520;  // the largest float below 2^31: the conversion to int cannot overflow
  const T low = std::floor(pixel);
  const T fraction = pixel - low;
  const int first = static_cast<int>(low < largest ? low : largest);
  const bool first_inside = static_cast<unsigned>(first) < static_cast<unsigned>(size);
  const bool second_inside = first + 1 < size;

  Axis<T> axis;
  axis.weight[0] = first_inside ? 1 - fraction : 0;
  axis.weight[1] = second_inside ? fraction : 0;
  axis.slope[0] = first_inside ? -static_cast<T>(size) : 0;
  axis.slope[1] = second_inside ? static_cast<T>(size) : 0;
  axis.index[0] = first_inside ? first : (first < 0 ? 0 : size - 1);
  axis.index[1] = second_inside ? first + 1 : size - 1;
  return axis;
}

// Deformable aggregation samples inside the open unit square alone; NaN fails the comparison, as it should.
template <typename T>
HOST_DEVICE bool inside_unit_square(T x, T y) {
  return x > 0 && x < 1 && y > 0 && y < 1;
}

// Multi-scale deformable attention samples wherever a footprint touches the level; NaN fails here too.
template <typename T>
HOST_DEVICE bool touches_level(T pixel_x, T pixel_y, int width, int height) {
  return pixel_x > -1 && pixel_x < static_cast<T>(width) && pixel_y > -1 && pixel_y < static_cast<T>(height);
}

}  // namespace reimplementation
