// Access to several channels at once: aligned vectors of features, read and converted, and added atomically.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace reimplementation::cuda {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The sum of all lanes' values, in every lane.
template <typename T>
__device__ __forceinline__ T sum_of_lanes(T value) {
#pragma unroll
  for (int step = WARP / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(ALL_LANES, value, step);
  }
  return value;
}

// The sum of the lanes' values up to this one's.
__device__ __forceinline__ unsigned sum_up_to_lane(unsigned value) {
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    const unsigned before = __shfl_up_sync(ALL_LANES, value, step);
    value += threadIdx.x % WARP >= step ? before : 0;
  }
  return value;
}

// The type that sums run in.
template <typename T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <typename T>
using compute_t = typename Compute<T>::type;

__device__ __forceinline__ float to_compute(__half value) {
  return __half2float(value);
}
__device__ __forceinline__ float to_compute(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
__device__ __forceinline__ float to_compute(float value) {
  return value;
}
__device__ __forceinline__ double to_compute(double value) {
  return value;
}

template <typename T>
__device__ __forceinline__ T from_compute(compute_t<T> value) {
  return static_cast<T>(value);
}
template <>
__device__ __forceinline__ __half from_compute<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_compute<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// N channels that are loaded or stored by one instruction of sizeof(T) * N bytes (at most 16).
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];

  __device__ __forceinline__ compute_t<T> operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && N % 2 == 0) {
      // Of a pair in a word, one instruction each; the compiler would take the upper one out of the word first.
      unsigned pair;
      memcpy(&pair, values + (i & ~1), sizeof(pair));
      return __uint_as_float(i & 1 ? pair & 0xffff0000u : pair << 16);
    } else {
      return to_compute(values[i]);
    }
  }
};

// The word that one load instruction of so many bytes moves.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// Reads N channels that no thread writes meanwhile: the compiler may then move the load across atomics.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* address) {
  using Loaded = typename Word<sizeof(T) * N>::type;
  const Loaded word = __ldg(reinterpret_cast<const Loaded*>(address));
  Vector<T, N> vector;
  memcpy(&vector, &word, sizeof(word));
  return vector;
}

// Reads what nobody reads again. L2 fetches 256 bytes around it: neighbouring blocks, and those of the next head, find theirs.
template <typename T>
__device__ __forceinline__ T load_once(const T* address) {
#if __CUDA_ARCH__ >= 800
  typename Word<sizeof(T)>::type word;
  const size_t global = __cvta_generic_to_global(address);
  if constexpr (sizeof(T) == 2) {
    asm("ld.global.nc.L2::256B.u16 %0, [%1];" : "=h"(word) : "l"(global));
  } else if constexpr (sizeof(T) == 4) {
    asm("ld.global.nc.L2::256B.u32 %0, [%1];" : "=r"(word) : "l"(global));
  } else {
    asm("ld.global.nc.L2::256B.v2.u32 {%0, %1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(global));
  }
  T value;
  memcpy(&value, &word, sizeof(value));
  return value;
#else
  return *address;
#endif
}

// Writes what leaves the caches first.
template <typename T, int N>
__device__ __forceinline__ void store_once(T* address, const Vector<T, N>& vector) {
  typename Word<sizeof(T) * N>::type word;
  memcpy(&word, &vector, sizeof(word));
  __stcs(reinterpret_cast<decltype(word)*>(address), word);
}

template <typename T, int N>
__device__ __forceinline__ void product(compute_t<T> factor, const Vector<T, N>& vector, compute_t<T> (&terms)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    terms[i] = factor * vector[i];
  }
}

// The address of a row. The product is in PTX because the compiler, if it knows that a row has few bytes, makes five
// instructions of it; the sum is not, so that it sees whose memory this is.
template <typename T>
__device__ __forceinline__ T* row_address(T* first, int row, int row_bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  int64_t offset;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(row), "r"(row_bytes));
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(first) + offset);
}

// The same number, or pointer to global or to shared memory, which the compiler then keeps in a register, where it would rather
// work it out again at each use, or keep much of what it is made of.
__device__ __forceinline__ unsigned keep(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

template <typename T>
__device__ __forceinline__ T* keep_global(T* pointer) {
  size_t address = __cvta_generic_to_global(pointer);
  asm volatile("" : "+l"(address));
  return static_cast<T*>(__cvta_global_to_generic(address));
}

template <typename T>
__device__ __forceinline__ T* keep_shared(T* pointer) {
  return static_cast<T*>(__cvta_shared_to_generic(keep(static_cast<unsigned>(__cvta_generic_to_shared(pointer)))));
}

// Adds N sums to memory: 16-byte reductions where the GPU has them, which lets L2 take four channels per request.
template <int N>
__device__ __forceinline__ void atomic_add_vector(float* address, const float (&values)[N]) {
  int i = 0;
#if __CUDA_ARCH__ >= 900
#pragma unroll
  for (; i + 4 <= N; i += 4) {
    atomicAdd(
        reinterpret_cast<float4*>(address + i), make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]));
  }
#endif
#pragma unroll
  for (; i < N; ++i) {
    atomicAdd(address + i, values[i]);
  }
}

template <int N>
__device__ __forceinline__ void atomic_add_vector(double* address, const double (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    atomicAdd(address + i, values[i]);
  }
}

// Rounds eight sums and adds them to memory: by one reduction of 16 bytes where the code is for compute capability 9, else by
// four of a pair.
template <typename T, std::enable_if_t<sizeof(T) == 2, int> = 0>
__device__ __forceinline__ void atomic_add_vector(T* address, const float (&values)[8]) {
  Vector<T, 8> rounded;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    rounded.values[i] = from_compute<T>(values[i]);
  }
#if __CUDA_ARCH__ >= 900
  uint4 words;
  memcpy(&words, &rounded, sizeof(words));
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.f16x2 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  } else {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(address), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
  }
#else
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair pairs[4];
  memcpy(&pairs, &rounded, sizeof(pairs));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    atomicAdd(reinterpret_cast<Pair*>(address) + i, pairs[i]);
  }
#endif
}

// Four numbers that shared memory hands out in one read: a footprint's weights, or its rows.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];

  __device__ __forceinline__ T& operator[](int i) {
    return values[i];
  }
  __device__ __forceinline__ T operator[](int i) const {
    return values[i];
  }
};

}  // namespace reimplementation::cuda
