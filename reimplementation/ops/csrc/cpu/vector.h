// Vectors of the compiler (GCC's and clang's vector_size) and how rows of any supported type are read and written with
// them. Lanes are of the compute type; half types are widened on the way in and rounded on the way out, by integer
// arithmetic that every instruction set has.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

// GCC warns that functions cannot pass vectors wider than the baseline's registers in one agreed way. These need not:
// all of them are inlined.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace reimplementation::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// The type of locations and sums.
template <typename Feature>
using Compute = std::conditional_t<std::is_same_v<Feature, double>, double, float>;

template <typename T, int lanes>
struct VectorType {
  typedef T type __attribute__((vector_size(lanes * sizeof(T))));
};

template <typename T, int lanes>
using Vector = typename VectorType<T, lanes>::type;

template <int lanes>
C10_ALWAYS_INLINE Vector<float, lanes> as_float(const Vector<uint32_t, lanes>& bits) {
  return reinterpret_cast<Vector<float, lanes>>(bits);
}

template <int lanes>
C10_ALWAYS_INLINE Vector<uint32_t, lanes> as_bits(const Vector<float, lanes>& value) {
  return reinterpret_cast<Vector<uint32_t, lanes>>(value);
}

// Lane by lane `yes` where the mask is all ones and `no` where it is zero.
template <int lanes>
C10_ALWAYS_INLINE Vector<uint32_t, lanes> select(
    const Vector<int32_t, lanes>& mask, const Vector<uint32_t, lanes>& yes, const Vector<uint32_t, lanes>& no) {
  const auto bits = reinterpret_cast<Vector<uint32_t, lanes>>(mask);
  return (yes & bits) | (no & ~bits);
}

template <int lanes>
C10_ALWAYS_INLINE Vector<float, lanes> widen(const Vector<uint16_t, lanes>& stored, BFloat16) {
  return as_float<lanes>(__builtin_convertvector(stored, Vector<uint32_t, lanes>) << 16);
}

// Both branches avoid float32 denormals, which a thread may have told its processor to flush.
template <int lanes>
C10_ALWAYS_INLINE Vector<float, lanes> widen(const Vector<uint16_t, lanes>& stored, Half) {
  using Bits = Vector<uint32_t, lanes>;
  const Bits bits = __builtin_convertvector(stored, Bits);
  const Bits sign = (bits & 0x8000) << 16;
  const Bits magnitude = bits & 0x7fff;
  // The exponent grows by 112, in two steps: 224 turns that of infinities and NaNs into float32's, and then no factor
  // changes it any more.
  const Bits normal = as_bits<lanes>(as_float<lanes>((magnitude << 13) + (224u << 23)) * 0x1p-112f);
  // A denormal counts units of 2^-24: put them at the end of the mantissa of 0.5, and subtract that.
  const Bits denormal = as_bits<lanes>(as_float<lanes>(magnitude | (126u << 23)) - 0.5f);
  return as_float<lanes>(sign | select<lanes>(magnitude < 0x0400, denormal, normal));
}

// Round to nearest, ties to even: add half a unit less one, and one more where the last kept bit is odd.
template <int lanes>
C10_ALWAYS_INLINE Vector<uint16_t, lanes> narrow(const Vector<float, lanes>& value, BFloat16) {
  using Bits = Vector<uint32_t, lanes>;
  const Bits bits = as_bits<lanes>(value);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits nan = Bits{} + 0x7fc0;
  return __builtin_convertvector(
      select<lanes>((bits & 0x7fffffff) > 0x7f800000, nan, rounded), Vector<uint16_t, lanes>);
}

template <int lanes>
C10_ALWAYS_INLINE Vector<uint16_t, lanes> narrow(const Vector<float, lanes>& value, Half) {
  using Bits = Vector<uint32_t, lanes>;
  const Bits bits = as_bits<lanes>(value);
  const Bits sign = (bits >> 16) & 0x8000;
  const Bits magnitude = bits & 0x7fffffff;
  const Bits normal = (magnitude - (112u << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the unit is 2^-24: adding 0.5, whose mantissa ends there, makes the processor round to it.
  const Bits denormal = as_bits<lanes>(as_float<lanes>(magnitude) + 0.5f) - (126u << 23);
  const Bits infinity = Bits{} + 0x7c00;
  const Bits nan = Bits{} + 0x7e00;
  Bits result = select<lanes>(magnitude < (113u << 23), denormal, normal);
  result = select<lanes>(magnitude >= 0x477ff000, infinity, result);  // 65520: halfway above the largest half
  result = select<lanes>(magnitude > 0x7f800000, nan, result);
  return __builtin_convertvector(result | sign, Vector<uint16_t, lanes>);
}

// The type of a lane that holds a stored element: integers stay as they are.
template <typename Stored>
using Lane = std::conditional_t<std::is_integral_v<Stored>, Stored, Compute<Stored>>;

// `lanes` consecutive elements, at any alignment.
template <int lanes, typename Stored>
C10_ALWAYS_INLINE Vector<Lane<Stored>, lanes> load(const Stored* from) {
  constexpr bool is_half = sizeof(Stored) == 2;
  Vector<std::conditional_t<is_half, uint16_t, Lane<Stored>>, lanes> stored;
  std::memcpy(&stored, from, sizeof(stored));
  if constexpr (is_half) {
    return widen<lanes>(stored, Stored{});
  } else {
    return stored;
  }
}

template <int lanes, typename Stored>
C10_ALWAYS_INLINE void store(Stored* to, const Vector<Lane<Stored>, lanes>& value) {
  if constexpr (sizeof(Stored) == 2) {
    const auto stored = narrow<lanes>(value, Stored{});
    std::memcpy(to, &stored, sizeof(stored));
  } else {
    std::memcpy(to, &value, sizeof(value));
  }
}

template <int lanes, typename T>
C10_ALWAYS_INLINE T sum_of_lanes(const Vector<T, lanes>& value) {
  if constexpr (lanes == 1) {
    return value[0];
  } else {
    Vector<T, lanes / 2> halves[2];
    std::memcpy(halves, &value, sizeof(value));
    return sum_of_lanes<lanes / 2, T>(halves[0] + halves[1]);
  }
}

}  // namespace reimplementation::cpu
