// The floor of a gathering op: reads the rows whose numbers it is given, adds them up, and does nothing else.
//
// No coordinates, no weights, no conversion: a row is a string of 32-bit words, and the sum of a bag's rows is an integer
// sum, the same for every channel type and in every order, so that it can be checked to the bit.
//
//        block       splits of bag 0:  team 0 | lane 0: words 0..3, 128..131 | lane 1: 4..7, ... |   rows 0, 1, ...
//                                      team 1 |                                                  |   rows n/2, ...
//                    splits of bag 1:  team 2 | ...
//
// A team of up to 32 lanes spans a row in 16-byte loads, NV of them a lane; blockIdx.y takes further parts of a longer
// row. A bag's rows are split evenly among `splits` teams of one block, which add up in shared memory. Each team has
// ROWS rows in flight, and reads the numbers of the next ROWS while it waits for these.
//
// Built by `python -m reimplementation bench --floor` and called through ctypes.

#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ void add(uint4& sum, const uint4& words) {
  sum.x += words.x;
  sum.y += words.y;
  sum.z += words.z;
  sum.w += words.w;
}

template <int NV, int ROWS>
__global__ void __launch_bounds__(THREADS) gather(
    const uint4* __restrict__ table,
    const int* __restrict__ rows,
    const int64_t* __restrict__ starts,
    uint4* __restrict__ output,
    int64_t num_bags,
    int row_vectors,
    int lanes,
    int splits) {
  __shared__ uint4 team_sums[THREADS * NV];
  const int lane = threadIdx.x % lanes;
  const int team = threadIdx.x / lanes;
  const int split = team % splits;
  const int64_t bag = static_cast<int64_t>(blockIdx.x) * (THREADS / lanes / splits) + team / splits;
  const int first_vector = blockIdx.y * lanes * NV + lane;

  uint4 sums[NV] = {};
  if (bag < num_bags) {
    const int64_t start = starts[bag];
    const int64_t count = starts[bag + 1] - start;
    const int* next = rows + start + count * split / splits;
    const int* const end = rows + start + count * (split + 1) / splits;
    const uint4* columns[NV];
    for (int k = 0; k < NV; ++k) {
      columns[k] = table + min(first_vector + k * lanes, row_vectors - 1);
    }

    int numbers[ROWS];
    if (end - next >= ROWS) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        numbers[i] = __ldg(next + i);
      }
    }
    while (end - next >= ROWS) {
      next += ROWS;
      uint4 words[ROWS][NV];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int k = 0; k < NV; ++k) {
          words[i][k] = __ldg(columns[k] + static_cast<int64_t>(numbers[i]) * row_vectors);
        }
      }
      if (end - next >= ROWS) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          numbers[i] = __ldg(next + i);
        }
      }
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
#pragma unroll
        for (int k = 0; k < NV; ++k) {
          add(sums[k], words[i][k]);
        }
      }
    }
    for (; next < end; ++next) {
#pragma unroll
      for (int k = 0; k < NV; ++k) {
        add(sums[k], __ldg(columns[k] + static_cast<int64_t>(__ldg(next)) * row_vectors));
      }
    }
  }

  if (splits > 1) {
    for (int k = 0; k < NV; ++k) {
      team_sums[k * THREADS + threadIdx.x] = sums[k];
    }
    __syncthreads();
    for (int other = 1; split == 0 && other < splits; ++other) {
      for (int k = 0; k < NV; ++k) {
        add(sums[k], team_sums[k * THREADS + threadIdx.x + other * lanes]);
      }
    }
  }
  if (split == 0 && bag < num_bags) {
    for (int k = 0; k < NV; ++k) {
      if (first_vector + k * lanes < row_vectors) {
        output[bag * row_vectors + first_vector + k * lanes] = sums[k];
      }
    }
  }
}

}  // namespace

// table: rows of `row_vectors` * 16 bytes, aligned to 16; output: num_bags such rows. `lanes` and `splits` are powers of
// two, lanes at most 32, lanes * splits at most `THREADS`. Returns CUDA's error code, 0 for success.
extern "C" int gather_rows(
    const void* table,
    const int* rows,
    const int64_t* starts,
    void* output,
    int64_t num_bags,
    int row_vectors,
    int lanes,
    int splits,
    cudaStream_t stream) {
  const int bags_a_block = THREADS / lanes / splits;
  const auto blocks = static_cast<unsigned>((num_bags + bags_a_block - 1) / bags_a_block);
  const auto* from = static_cast<const uint4*>(table);
  auto* to = static_cast<uint4*>(output);
  if (row_vectors > lanes) {
    const dim3 grid(blocks, (row_vectors + 2 * lanes - 1) / (2 * lanes));
    gather<2, 4><<<grid, THREADS, 0, stream>>>(from, rows, starts, to, num_bags, row_vectors, lanes, splits);
  } else {
    gather<1, 8><<<blocks, THREADS, 0, stream>>>(from, rows, starts, to, num_bags, row_vectors, lanes, splits);
  }
  return cudaGetLastError();
}
