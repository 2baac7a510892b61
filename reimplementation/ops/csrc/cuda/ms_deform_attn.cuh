// What the forward and the backward of multi-scale deformable attention share on CUDA: operands, who owns what, staged
// samples.
//
// A *unit* is a query and a head: L * P samples of D channels. `lanes` threads, each with VEC neighbouring channels, are a
// *split*, which walks every `splits`-th sample of its unit; the splits of a unit are a *team*. A warp's teams own
// neighbouring heads of neighbouring queries:
//
//        warp     team 0 = query q, head m      | split 0: | lane 0: channels 0..3 | lane 1: 4..7 | ... |   samples 0, 2, ...
//                                               | split 1: |                       |              |     |   samples 1, 3, ...
//                 team 1 = query q, head m + 1  | ...
//                 team 2 = query q + 1, head m  | ...
//
// `heads_at_once` is 1 where the channels of a head fill the 128 bytes of a line, and grows as they get fewer: what
// neighbouring teams read at a time lies on different banks of L1.
//
// One thread per sample turns a location into a footprint in shared memory, and the unit's team then walks those that
// touch their level. So coordinates are computed once per sample and not once per lane; locations and weights are read
// coalesced; the queries of a block, being neighbours with like reference points, find each other's pixels of the head in
// L1; and no warp waits for another. When its units are done a warp goes on to the next ones, `rounds` times.
#pragma once

#include <type_traits>

#include "../common/corners.cuh"
#include "../common/launch.cuh"
#include "../common/ms_deform_attn.h"
#include "../common/vector.cuh"

namespace reimplementation::cuda::msda {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int LINE_BYTES = 128;  // of L1
constexpr int WARPS_WANTED = 32;  // on a multiprocessor: units are split while there are fewer warps
constexpr int MOST_ROUNDS = 4;    // of a warp, where there are many more

// The sizes, and how the work is divided.
struct Problem {
  int num_queries, num_heads, channels, num_levels, num_points;
  int log2_lanes, log2_team, log2_heads_at_once;
  int rounds;
  int query_blocks;  // that the queries of one head take
  unsigned blocks;

  // Of a warp.
  __host__ __device__ int units() const {
    return WARP >> log2_team;
  }
  __host__ __device__ int queries_at_once() const {
    return units() >> log2_heads_at_once;
  }

  // Of a unit.
  __device__ int lanes() const {
    return 1 << log2_lanes;
  }
  __device__ int splits() const {
    return 1 << (log2_team - log2_lanes);
  }

  // What the thread owns.
  __device__ int unit() const {
    return threadIdx.x % WARP >> log2_team;
  }
  __device__ int split() const {
    return threadIdx.x >> log2_lanes & (splits() - 1);
  }
  __device__ int lane() const {
    return threadIdx.x & (lanes() - 1);
  }
};

// Elements from one (batch, query, head, level, point) to the next, and from x to y.
struct Strides {
  int64_t batch;
  int query, head, level, point, axis;

  Strides() = default;
  explicit Strides(const Tensor& tensor)  // from with_short_strides
      : batch(tensor.stride(0)),
        query(static_cast<int>(tensor.stride(1))),
        head(static_cast<int>(tensor.stride(2))),
        level(static_cast<int>(tensor.stride(3))),
        point(static_cast<int>(tensor.stride(4))),
        axis(tensor.dim() > 5 ? static_cast<int>(tensor.stride(5)) : 0) {
    STD_TORCH_CHECK(tensor.stride(1) <= INT_MAX, "M * L * P must be below 2^30");
  }

  __device__ int64_t offset(int of_query, int of_head) const {
    return static_cast<int64_t>(of_query) * query + static_cast<int64_t>(of_head) * head;
  }
};

template <typename T, typename W>
struct Operands : Problem {
  const T* value;  // (batch, values, heads, channels)
  const compute_t<T>* locations;
  const W* weights;
  LevelTable levels;
  Strides location_strides, weight_strides;
};

// Which units a warp owns. In each round the warps of a block own neighbours.
struct Place {
  int batch, first_head, first_query;  // first_query: of the first round

  __device__ explicit Place(const Problem& op) {
    const int head_blocks = op.num_heads >> op.log2_heads_at_once;
    const int image_block = static_cast<int>(blockIdx.x) / head_blocks;
    first_head = (static_cast<int>(blockIdx.x) - image_block * head_blocks) << op.log2_heads_at_once;
    batch = image_block / op.query_blocks;
    const int first_warp = (image_block - batch * op.query_blocks) * op.rounds * WARPS;
    first_query = (first_warp + static_cast<int>(threadIdx.x) / WARP) * op.queries_at_once();
  }

  // Whether the warp owns units in a round.
  __device__ bool has(const Problem& op, int round) const {
    return round < op.rounds && query(op, round, 0) < op.num_queries;
  }

  // Of a unit in a round; beyond the last where there is no such unit.
  __device__ int query(const Problem& op, int round, int unit) const {
    return first_query + round * WARPS * op.queries_at_once() + (unit >> op.log2_heads_at_once);
  }

  __device__ int head(const Problem& op, int unit) const {
    return first_head + (unit & ((1 << op.log2_heads_at_once) - 1));
  }
};

// Where one sample of a unit falls, and what it weighs there.
template <typename T>
struct Sample {
  Level level;
  Axis<T> x, y;
  T attention;
  bool inside;  // its footprint touches the level; only then is the above set
  int number;   // of those visited of its unit
  int rank;     // how many of those come before it and are inside
};

// Visits samples first, ..., first + count - 1 (at most `WARP`) of each unit. Neighbouring threads take neighbouring
// samples of one unit: their locations are neighbours in memory. A thread keeps to one number, so what depends on the
// level is looked up once, for all units and rounds.
template <typename T, typename W>
class Sampler {
 public:
  using C = compute_t<T>;

  __device__ Sampler(const Operands<T, W>& op, const Place& place, int first, int count) : count_(count) {
    const int thread = threadIdx.x % WARP;
    units_at_once_ = WARP / count;
    first_unit_ = thread / count;
    first_lane_ = first_unit_ * count;
    number_ = thread - first_lane_;
    level_number_ = (first + number_) / op.num_points;
    point_ = first + number_ - level_number_ * op.num_points;
    level_ = op.levels[level_number_];
    locations_ = op.locations + offset(op.location_strides, place.batch);
    weights_ = op.weights + offset(op.weight_strides, place.batch);
  }

  // Where this thread's samples of a batch begin in a tensor.
  __device__ int64_t offset(const Strides& strides, int batch) const {
    return batch * strides.batch + static_cast<int64_t>(level_number_) * strides.level +
        static_cast<int64_t>(point_) * strides.point;
  }

  // Calls `visit(unit, query, head, sample, inside)` for the units of a round; `inside` counts the samples of the unit
  // that are.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Operands<T, W>& op, const Place& place, int round, Visit visit) const {
    for (int before = 0; before < op.units(); before += units_at_once_) {
      const int unit = before + first_unit_;
      const int query = place.query(op, round, unit);
      const int head = place.head(op, unit);
      const bool exists = (first_unit_ < units_at_once_) & (unit < op.units()) & (query < op.num_queries);
      Sample<C> sample;
      sample.inside = false;
      sample.number = number_;
      if (exists) {
        const C* location = locations_ + op.location_strides.offset(query, head);
        sample.attention = to_compute(weights_[op.weight_strides.offset(query, head)]);
        const C x = pixel_position(location[0], level_.width);
        const C y = pixel_position(location[op.location_strides.axis], level_.height);
        sample.inside = !level_.empty() & touches_level(x, y, level_.width, level_.height);
        if (sample.inside) {
          sample.level = level_;
          sample.x = bilinear_axis(x, level_.width);
          sample.y = bilinear_axis(y, level_.height);
        }
      }
      const unsigned inside = __ballot_sync(ALL_LANES, sample.inside) >> first_lane_ & (ALL_LANES >> (WARP - count_));
      sample.rank = __popc(inside & ((1u << number_) - 1));
      if (exists) {
        visit(unit, query, head, sample, __popc(inside));
      }
    }
  }

 private:
  int count_, units_at_once_;
  int first_unit_, first_lane_, number_, level_number_, point_;
  Level level_;
  const C* locations_;
  const W* weights_;
};

// The footprints of a warp's samples that touch their level. One is staged at `rank * pitch + unit`: the units of a warp
// read neighbouring words, and a pitch one above the number of units keeps the threads that write neighbouring samples off
// each other's banks.
template <typename T, int SLOTS>
struct Footprints {
  Four<T> weights[SLOTS];  // of the corners, times the attention weight
  Four<int> rows[SLOTS];
  int count[WARP];         // of each unit

  // Between the samples of a unit.
  __device__ static int pitch(const Problem& op) {
    return op.units() + 1;
  }

  __device__ static int samples_at_once(const Problem& op) {
    return min(min(SLOTS / pitch(op), WARP), op.num_levels * op.num_points);
  }
};

// Stages what a sampler visits.
template <typename T, typename W, int SLOTS>
__device__ __forceinline__ void stage(
    const Operands<T, W>& op,
    const Place& place,
    int round,
    const Sampler<T, W>& sampler,
    Footprints<compute_t<T>, SLOTS>& staged) {
  using C = compute_t<T>;
  __syncwarp();  // whoever still reads the samples before these
  const int pitch = staged.pitch(op);
  sampler.for_each(op, place, round, [&](int unit, int, int, const Sample<C>& sample, int inside) {
    if (sample.inside) {
      const int slot = sample.rank * pitch + unit;
      Four<C> weights = corner_weights(sample.x, sample.y);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        weights[corner] *= sample.attention;
      }
      staged.weights[slot] = weights;
      staged.rows[slot] = corner_rows(sample.level, sample.x, sample.y);
    }
    if (sample.number == 0) {
      staged.count[unit] = inside;
    }
  });
  __syncwarp();
}

// Fill in what the kernels' operands have in common: sizes; where samples lie, and what they weigh.
template <typename Operands>
void set_sizes(Operands& op, const MSDeformAttnSizes& sizes) {
  STD_TORCH_CHECK(sizes.num_queries <= INT_MAX, "Lq must be below 2^31, got ", sizes.num_queries);
  op.num_queries = static_cast<int>(sizes.num_queries);
  op.num_heads = static_cast<int>(sizes.num_heads);
  op.channels = static_cast<int>(sizes.channels);
  op.num_levels = static_cast<int>(sizes.num_levels);
  op.num_points = static_cast<int>(sizes.num_points);
}

template <typename Operands>
void set_samples(Operands& op, const LevelTable& levels, const Tensor& locations, const Tensor& weights) {
  op.locations = static_cast<decltype(op.locations)>(locations.const_data_ptr());
  op.weights = static_cast<decltype(op.weights)>(weights.const_data_ptr());
  op.levels = levels;
  op.location_strides = Strides(locations);
  op.weight_strides = Strides(weights);
}

// For lanes of `vec` channels of so many bytes each.
inline Problem divide(const MSDeformAttnSizes& sizes, int vec, int element_bytes, int32_t device) {
  Problem op = {};
  set_sizes(op, sizes);
  op.log2_team = op.log2_lanes = log2_lanes(sizes.channels, vec);
  while (op.queries_at_once() > 1 && sizes.channels * element_bytes << op.log2_heads_at_once <= LINE_BYTES / 2 &&
         sizes.num_heads % (2 << op.log2_heads_at_once) == 0) {
    ++op.log2_heads_at_once;
  }
  const int64_t wanted = int64_t{WARPS_WANTED} * device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t units = sizes.batch * sizes.num_heads * sizes.num_queries;
  int64_t samples = sizes.num_levels * sizes.num_points;  // of a split
  while (op.queries_at_once() > 1 && 2 * units / op.units() <= wanted && samples >= 4) {
    ++op.log2_team;
    samples /= 2;
  }
  op.rounds = static_cast<int>(std::clamp<int64_t>(units / op.units() / (8 * wanted), 1, MOST_ROUNDS));
  const int64_t queries_a_block = op.queries_at_once() * WARPS * op.rounds;
  const int64_t query_blocks = (sizes.num_queries + queries_a_block - 1) / queries_a_block;
  const int64_t blocks = sizes.batch * (sizes.num_heads >> op.log2_heads_at_once) * query_blocks;
  STD_TORCH_CHECK(
      blocks <= INT_MAX && query_blocks * queries_a_block <= INT_MAX,
      "batch * queries * heads is too large: it takes ", blocks, " blocks");
  op.query_blocks = static_cast<int>(query_blocks);
  op.blocks = static_cast<unsigned>(blocks);
  return op;
}

template <typename T, typename W>
Operands<T, W> operands(
    const MSDeformAttnSizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    int vec) {
  Operands<T, W> op = {divide(sizes, vec, sizeof(T), value.get_device_index())};
  op.value = static_cast<const T*>(value.const_data_ptr());
  set_samples(op, levels, locations, weights);
  return op;
}

template <typename T>
bool can_vectorize(const MSDeformAttnSizes& sizes, const Tensor& tensor, int vec) {
  return sizes.channels % vec == 0 && is_aligned(tensor, vec * sizeof(T));
}

}  // namespace reimplementation::cuda::msda
