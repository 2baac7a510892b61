// What the forward and the backward of multi-scale deformable attention share on CUDA: operands, tiles, staged samples.
//
// A *unit* is a query and a head: L * P samples of D channels. `lanes` threads, each with VEC neighbouring channels, own
// a unit, and a block owns a *tile*: THREADS / lanes neighbouring queries of one head:
//
//        block = head m   unit 0 = query q      | lane 0: channels 0..3 | lane 1: 4..7 | ...
//                         unit 1 = query q + 1  |                                      |
//
// One thread per sample turns a location into a footprint in shared memory; the lanes of a unit then walk its samples. So
// coordinates are computed once per sample and not once per lane; locations and weights are read coalesced; and the
// tile's queries, being neighbours with like reference points, find each other's pixels of the head in L1.
#pragma once

#include <type_traits>

#include "../common/corners.cuh"
#include "../common/launch.cuh"
#include "../common/ms_deform_attn.h"
#include "../common/vector.cuh"

namespace reimplementation::cuda::msda {

constexpr int THREADS = 128;

template <typename T, typename W>
struct Operands {
  const T* value;  // (batch, values, heads, channels)
  const compute_t<T>* locations;
  const W* weights;
  LevelTable levels;
  int64_t location_strides[6];
  int64_t weight_strides[5];
  int64_t num_queries, tiles;  // tiles of neighbouring queries
  int num_heads, channels, num_levels, num_points;
  int lanes, log2_lanes;       // of a unit
};

// Which queries of which head a block owns.
template <typename T, typename W>
struct Tile {
  int64_t batch, first_query;
  int head, units, pitch;

  __device__ explicit Tile(const Operands<T, W>& op) {
    const int64_t tile = blockIdx.x / op.num_heads;
    head = static_cast<int>(blockIdx.x - tile * op.num_heads);
    batch = tile / op.tiles;
    units = THREADS >> op.log2_lanes;
    pitch = units + 1;
    first_query = (tile - batch * op.tiles) * units;
  }
};

// Where one sample of a unit falls, and what it weighs there.
template <typename T>
struct Sample {
  Level level;
  Axis<T> x, y;
  T attention;
  int level_number, point;
  bool inside;  // its footprint touches the level; only then are the axes and the attention weight set
};

// Calls `visit(number, unit, query, sample)` for samples first, ..., first + count - 1 (at most THREADS) of every unit.
// Neighbouring threads take neighbouring samples of one unit: their locations are neighbours in memory. A thread keeps to
// one number, so what depends on the level is computed once for all of its units.
template <typename T, typename W, typename Visit>
__device__ __forceinline__ void for_each_sample(
    const Operands<T, W>& op, const Tile<T, W>& tile, int first, int count, Visit visit) {
  using C = compute_t<T>;
  const int first_unit = threadIdx.x / count;
  const int units_at_once = THREADS / count;
  const int number = threadIdx.x - first_unit * count;
  if (first_unit >= units_at_once) {
    return;
  }
  Sample<C> sample = {};
  sample.level_number = (first + number) / op.num_points;
  sample.point = first + number - sample.level_number * op.num_points;
  sample.level = op.levels[sample.level_number];
  const C* locations = op.locations + tile.batch * op.location_strides[0] + tile.head * op.location_strides[2] +
      sample.level_number * op.location_strides[3] + sample.point * op.location_strides[4];
  const W* weights = op.weights + tile.batch * op.weight_strides[0] + tile.head * op.weight_strides[2] +
      sample.level_number * op.weight_strides[3] + sample.point * op.weight_strides[4];
  for (int unit = first_unit; unit < tile.units; unit += units_at_once) {
    const int64_t query = tile.first_query + unit;
    sample.inside = false;
    if (query < op.num_queries && !sample.level.empty()) {
      const C* location = locations + query * op.location_strides[1];
      const C x = pixel_position(location[0], sample.level.width);
      const C y = pixel_position(location[op.location_strides[5]], sample.level.height);
      sample.inside = touches_level(x, y, sample.level.width, sample.level.height);
      if (sample.inside) {
        sample.x = bilinear_axis(x, sample.level.width);
        sample.y = bilinear_axis(y, sample.level.height);
        sample.attention = to_compute(weights[query * op.weight_strides[1]]);
      }
    }
    visit(number, unit, query, sample);
  }
}

// A sample is staged at `sample * pitch + unit`: the units of a warp read neighbouring words, and a pitch one above the
// number of units keeps the threads that write neighbouring samples off each other's banks.
template <typename T, int SAMPLES>
struct Footprints {
  Four<T> weights[SAMPLES];  // of the corners, times the attention weight
  Four<int> rows[SAMPLES];
  int first_inside[THREADS];  // of each unit: its first staged sample that touches its level
};

constexpr int NONE_INSIDE = INT_MAX;

// Stages samples first, ..., first + count - 1 of every unit. A sample that touches nothing weighs nothing, and borrows
// the rows of one in its unit that does: it can be read like any other, and brings in no pixel that the unit does
// not sample anyway.
template <typename T, typename W, int SAMPLES>
__device__ void stage(
    const Operands<T, W>& op,
    const Tile<T, W>& tile,
    int first,
    int count,
    Footprints<compute_t<T>, SAMPLES>& staged) {
  using C = compute_t<T>;
  __syncthreads();  // whoever still reads the samples before these
  staged.first_inside[threadIdx.x] = NONE_INSIDE;
  __syncthreads();
  bool outside = false;
  for_each_sample(op, tile, first, count, [&](int number, int unit, int64_t, const Sample<C>& sample) {
    Four<C> weights = {};
    Four<int> rows = {-1, -1, -1, -1};
    if (sample.inside) {
      weights = corner_weights(sample.x, sample.y);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        weights[corner] *= sample.attention;
      }
      rows = corner_rows(sample.level, sample.x, sample.y);
      atomicMin(&staged.first_inside[unit], number);
    }
    const int slot = number * tile.pitch + unit;
    staged.weights[slot] = weights;
    staged.rows[slot] = rows;
    outside |= !sample.inside;
  });
  if (!__syncthreads_or(outside)) {
    return;
  }
  for (int i = threadIdx.x; i < count * tile.units; i += THREADS) {
    const int unit = i / count;
    const int slot = (i - unit * count) * tile.pitch + unit;
    const int lender = staged.first_inside[unit];
    if (staged.rows[slot][0] < 0 && lender != NONE_INSIDE) {
      staged.rows[slot] = staged.rows[lender * tile.pitch + unit];
    }
  }
  __syncthreads();
}

template <typename T, typename W>
Operands<T, W> operands(
    const MSDeformAttnSizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    int vec) {
  Operands<T, W> op;
  op.value = static_cast<const T*>(value.const_data_ptr());
  op.locations = static_cast<const compute_t<T>*>(locations.const_data_ptr());
  op.weights = static_cast<const W*>(weights.const_data_ptr());
  op.levels = levels;
  copy_strides(locations, op.location_strides);
  copy_strides(weights, op.weight_strides);
  op.num_queries = sizes.num_queries;
  op.num_heads = static_cast<int>(sizes.num_heads);
  op.channels = static_cast<int>(sizes.channels);
  op.num_levels = static_cast<int>(sizes.num_levels);
  op.num_points = static_cast<int>(sizes.num_points);
  op.log2_lanes = std::min(5, ceil_log2((sizes.channels + vec - 1) / vec));
  op.lanes = 1 << op.log2_lanes;
  op.tiles = (sizes.num_queries * op.lanes + THREADS - 1) / THREADS;
  return op;
}

template <typename T, typename W>
inline unsigned num_blocks(const MSDeformAttnSizes& sizes, const Operands<T, W>& op) {
  const int64_t blocks = sizes.batch * sizes.num_heads * op.tiles;
  STD_TORCH_CHECK(blocks <= INT_MAX, "batch * queries * heads is too large: it takes ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

template <typename T>
bool can_vectorize(const MSDeformAttnSizes& sizes, const Tensor& tensor, int vec) {
  return sizes.channels % vec == 0 &&
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (vec * sizeof(T)) == 0;
}

}  // namespace reimplementation::cuda::msda
