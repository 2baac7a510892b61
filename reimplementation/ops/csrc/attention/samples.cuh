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
// L1; and no warp waits for another.
#pragma once

#include <type_traits>

#include "cuda/corners.cuh"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "attention/op.h"
#include "cuda/vector.cuh"

namespace reimplementation::attention {

using namespace cuda;

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int LINE_BYTES = 128;   // of L1
constexpr int WARPS_WANTED = 32;  // on a multiprocessor: units are split while there are fewer warps

// The sizes, and how the work is divided.
struct Problem {
  int num_queries, num_heads, channels, num_levels, num_points;
  int log2_lanes, log2_team, log2_heads_at_once;
  int samples;                  // of a unit
  Divisor samples_at_once;      // staged together
  int units_at_once;            // whose staged samples are as many as the threads of a warp, or fewer
  Divisor points;               // num_points
  int first_image, first_head;  // of a launch

  // Of a warp.
  __host__ __device__ int units() const {
    return WARP >> log2_team;
  }
  __host__ __device__ int queries_at_once() const {
    return units() >> log2_heads_at_once;
  }

  // Between the staged samples of a unit.
  __host__ __device__ int pitch() const {
    return units() + 1;
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
  explicit Strides(const Tensor& tensor)  // from with_short_steps
      : batch(step(tensor, 0)),
        query(short_step(tensor, 1)),
        head(short_step(tensor, 2)),
        level(short_step(tensor, 3)),
        point(short_step(tensor, 4)),
        axis(tensor.dim() > 5 ? short_step(tensor, 5) : 0) {}

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

// Which units a warp owns. The warps of a block own neighbours.
struct Place {
  int batch, first_head, first_query;

  __device__ explicit Place(const Problem& op) {
    batch = op.first_image + static_cast<int>(blockIdx.z);
    first_head = op.first_head + (static_cast<int>(blockIdx.y) << op.log2_heads_at_once);
    first_query = (static_cast<int>(blockIdx.x) * WARPS + static_cast<int>(threadIdx.x) / WARP) * op.queries_at_once();
  }

  // Of a unit; beyond the last where there is no such unit.
  __device__ int query(const Problem& op, int unit) const {
    return first_query + (unit >> op.log2_heads_at_once);
  }

  __device__ int head(const Problem& op, int unit) const {
    return first_head + (unit & ((1 << op.log2_heads_at_once) - 1));
  }
};

// Where one sample of a unit falls, and what it weighs there. Its axes are for those to compute who need them: a variable
// that is set for some samples alone keeps its registers as long as the kernel runs.
template <typename T>
struct Sample {
  Level level;
  T x, y;  // in pixels
  T attention;
  bool inside;  // its footprint touches the level
  int number;   // of those visited of its unit
  int rank;     // how many of those come before it and are inside

  __device__ __forceinline__ Axis<T> x_axis() const {
    return bilinear_axis(x, level.width);
  }
  __device__ __forceinline__ Axis<T> y_axis() const {
    return bilinear_axis(y, level.height);
  }
};

// Visits `samples_at_once` samples of each unit, from `first` on. Neighbouring threads take neighbouring samples of one
// unit: their locations are neighbours in memory. A thread keeps to one number, so what depends on the level is looked up
// once, for all units.
template <typename T, typename W>
class Sampler {
 public:
  using C = compute_t<T>;

  __device__ Sampler(const Operands<T, W>& op, const Place& place, int first) {
    const unsigned thread = keep(threadIdx.x % WARP);
    unsigned unit = thread;
    number_ = op.samples_at_once.split(unit);
    const unsigned lanes = ALL_LANES >> (WARP - op.samples_at_once.divisor) << (thread - number_);
    lanes_ = keep(lanes);
    lanes_before_ = keep(lanes & ((1u << thread) - 1));
    units_ = min(op.num_queries - place.first_query, op.queries_at_once()) << op.log2_heads_at_once;
    first_unit_ = (unit < op.units_at_once) & (first + number_ < op.samples) ? unit : WARP;
    unsigned level = min(first + number_, op.samples - 1);
    point_ = op.points.split(level);
    level_number_ = level;
    level_ = op.levels[level];
    locations_ = keep_global(op.locations + offset(op.location_strides, place.batch));
    weights_ = keep_global(op.weights + offset(op.weight_strides, place.batch));
  }

  // Where this thread's samples of a batch begin in a tensor.
  __device__ int64_t offset(const Strides& strides, int batch) const {
    return batch * strides.batch + static_cast<int64_t>(level_number_) * strides.level +
        static_cast<int64_t>(point_) * strides.point;
  }

  // Calls `visit(unit, query, head, sample, inside)` for the units; `inside` counts the samples of the unit that are.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Operands<T, W>& op, const Place& place, Visit visit) const {
    Loaded next = load(op, place, first_unit_);  // under way while the one before is visited
    int before = 0;
    do {
      const int unit = before + first_unit_;
      before += op.units_at_once;
      Sample<C> sample;
      sample.level = level_;
      sample.x = pixel_position(next.x, level_.width);
      sample.y = pixel_position(next.y, level_.height);
      sample.attention = to_compute(next.attention);
      if (before < op.units()) {
        next = load(op, place, before + first_unit_);
      }
      const bool exists = unit < units_;
      sample.inside = exists & !level_.empty() & touches_level(sample.x, sample.y, level_.width, level_.height);
      sample.number = number_;
      const unsigned inside = __ballot_sync(ALL_LANES, sample.inside);
      sample.rank = __popc(inside & lanes_before_);
      if (exists) {
        visit(unit, place.query(op, unit), place.head(op, unit), sample, __popc(inside & lanes_));
      }
    } while (before < op.units());
  }

 private:
  struct Loaded {
    C x, y;
    W attention;
  };

  // Where there is no such unit, the first one's.
  __device__ __forceinline__ Loaded load(const Operands<T, W>& op, const Place& place, int unit) const {
    unit = unit < units_ ? unit : 0;
    const int query = place.query(op, unit), head = place.head(op, unit);
    const C* location = locations_ + op.location_strides.offset(query, head);
    return {
        load_once(location), load_once(location + op.location_strides.axis),
        load_once(weights_ + op.weight_strides.offset(query, head))};
  }

  unsigned lanes_, lanes_before_;  // of the warp, that visit samples of the same unit; those of them before this one
  int units_;                      // of the warp, that exist
  int first_unit_;                 // that this thread visits; beyond the last if none
  int number_, level_number_, point_;
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
  PackedRows rows[SLOTS];
  int count[WARP];  // of each unit
};

// Stages what a sampler visits.
template <typename T, typename W, int SLOTS>
__device__ __forceinline__ void stage(
    const Operands<T, W>& op,
    const Place& place,
    const Sampler<T, W>& sampler,
    Footprints<compute_t<T>, SLOTS>& staged) {
  using C = compute_t<T>;
  __syncwarp();  // whoever still reads the samples before these
  const int pitch = op.pitch();
  sampler.for_each(op, place, [&](int unit, int, int, const Sample<C>& sample, int inside) {
    if (sample.inside) {
      const int slot = sample.rank * pitch + unit;
      const Axis<C> x = sample.x_axis(), y = sample.y_axis();
      staged.weights[slot] = corner_weights(x, y, sample.attention);
      staged.rows[slot] = packed_rows(sample.level, x, y);
    }
    if (sample.number == 0) {
      staged.count[unit] = inside;
    }
  });
  __syncwarp();
}

// Fill in what the kernels' operands have in common: sizes; where samples lie, and what they weigh.
template <typename Operands>
void set_sizes(Operands& op, const Sizes& sizes) {
  // The last block numbers queries beyond the last one, and must not run out of numbers.
  STD_TORCH_CHECK(sizes.num_queries <= INT_MAX - 256, "Lq must be below 2^31 - 256, got ", sizes.num_queries);
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

// For lanes of `vec` channels of so many bytes each, and warps that stage `slots` samples.
inline Problem divide(const Sizes& sizes, int vec, int element_bytes, int slots, int32_t device) {
  Problem op = {};
  set_sizes(op, sizes);
  op.samples = op.num_levels * op.num_points;
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
  op.samples_at_once = Divisor(std::min({slots / op.pitch(), WARP, op.samples}));
  op.units_at_once = WARP / op.samples_at_once.divisor;
  op.points = Divisor(op.num_points);
  return op;
}

template <typename T, typename W>
Operands<T, W> operands(
    const Sizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    int vec,
    int slots) {
  Operands<T, W> op = {divide(sizes, vec, sizeof(T), slots, value.get_device_index())};
  op.value = static_cast<const T*>(value.const_data_ptr());
  set_samples(op, levels, locations, weights);
  return op;
}

// Calls `launch(op, grid)` until all images and heads have had their turn: a grid takes so many of them.
template <typename Op, typename Launch>
void launch_parts(Op op, int64_t num_images, Launch launch) {
  const int queries = op.queries_at_once() * WARPS;  // of a block
  const unsigned query_blocks = (op.num_queries + queries - 1) / queries;
  const int64_t heads = MOST_BLOCKS << op.log2_heads_at_once;
  for (int64_t image = 0; image < num_images; image += MOST_BLOCKS) {
    for (int64_t head = 0; head < op.num_heads; head += heads) {
      op.first_image = static_cast<int>(image);
      op.first_head = static_cast<int>(head);
      const int64_t head_blocks = std::min(op.num_heads - head, heads) >> op.log2_heads_at_once;
      launch(op, dim3(query_blocks, head_blocks, std::min(num_images - image, MOST_BLOCKS)));
    }
  }
}

template <typename T>
bool can_vectorize(const Sizes& sizes, const Tensor& tensor, int vec) {
  return sizes.channels % vec == 0 && is_aligned(tensor, vec * sizeof(T));
}

}  // namespace reimplementation::attention
