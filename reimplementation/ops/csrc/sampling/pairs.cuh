// The pairs of a query on CUDA: which ones a camera sees, and which block takes them.
//
// A *pair* is a key point in a camera, a *sample* a pair in a level. A block takes all pairs of some key points: as a
// query is seen by few cameras, all blocks of one then have about as many visible ones.
#pragma once

#include <algorithm>

#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace reimplementation::sampling {

using namespace cuda;

struct Pair {
  int cam, point;
};

// Some key points of a query, with all of their cameras.
struct Points {
  int first, end;

  __device__ __forceinline__ int count() const {
    return end - first;
  }
};

// How blocks share out a query's key points: one takes all of them where there are enough queries.
struct Shares {
  Divisor blocks;  // of a query
  Divisor points;  // of a block; the last may have fewer
  int of_query;

  // For blocks of THREADS, of which a multiprocessor holds `of_multiprocessor`. Where it takes several of them to a query
  // to keep the GPU busy, there are that many `rounds` of them, so that none waits long for the last; one with fewer
  // pairs than THREADS would not be worth it. No block takes more than `most_points`.
  template <int THREADS>
  static Shares of(
      int64_t queries, int64_t points, int64_t cams, int of_multiprocessor, int device, int64_t most_points = INT_MAX) {
    int64_t blocks = 1;
    if (points * cams > THREADS) {
      constexpr int64_t rounds = 2;
      const int64_t of_query = rounds * resident_blocks(of_multiprocessor, device) / queries;
      blocks = std::clamp<int64_t>(of_query, 1, (points * cams + THREADS - 1) / THREADS);
    }
    blocks = std::max(blocks, (points + most_points - 1) / most_points);
    const int64_t points_of_block = (points + blocks - 1) / blocks;
    blocks = (points + points_of_block - 1) / points_of_block;
    return {Divisor(blocks), Divisor(points_of_block), static_cast<int>(points)};
  }

  // Leaves a query's number in that of a block, and returns the block's key points.
  __device__ __forceinline__ Points take(unsigned& block) const {
    const int first = blocks.split(block) * points.divisor;
    return {first, min(first + points.divisor, of_query)};
  }
  // Numbers for the pairs of a block's key points, of which some may not exist, camera by camera: neighbours then
  // sample neighbouring pixels.
  __device__ __forceinline__ int numbers_by_camera(int cams) const {
    return points.divisor * cams;
  }
  __device__ __forceinline__ Pair pair_by_camera(const Points& share, unsigned number) const {
    const int point = share.first + points.split(number);
    return {static_cast<int>(number), point};
  }
};

// Of a batch, each a block or some.
inline int64_t count_queries(int64_t batch, int64_t num_queries) {
  STD_TORCH_CHECK(
      batch * num_queries <= INT_MAX, "bs * num_queries must be below 2^31; got ", batch, " * ", num_queries);
  return batch * num_queries;
}

// The visible ones among THREADS of a query's pairs.
template <typename C, int THREADS>
struct VisiblePairs {
  C x[THREADS], y[THREADS];
  Pair pair[THREADS];
  int warp_counts[THREADS / WARP];
};

// Fills `found` with the visible ones of a block's pairs in the order of its threads, which bring one each; returns how
// many they are.
template <typename C, int THREADS>
__device__ __forceinline__ int compact(bool visible, const Pair& pair, C x, C y, VisiblePairs<C, THREADS>& found) {
  const int warp = threadIdx.x / WARP;
  const unsigned seen = __ballot_sync(ALL_LANES, visible);
  __syncthreads();  // whoever still reads the pairs before these
  if (threadIdx.x % WARP == 0) {
    found.warp_counts[warp] = __popc(seen);
  }
  __syncthreads();
  int position = __popc(seen & ((1u << (threadIdx.x % WARP)) - 1));
  int count = 0;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    position += w < warp ? found.warp_counts[w] : 0;
    count += found.warp_counts[w];
  }
  if (visible) {
    found.x[position] = x;
    found.y[position] = y;
    found.pair[position] = pair;
  }
  __syncthreads();
  return count;
}

}  // namespace reimplementation::sampling
