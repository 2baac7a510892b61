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
//
// What a sample's location and weight are made of is for a *form* to know, such as `GivenSamples` below:
// - `Pointers` to what is in memory of a sample, `Loaded` for what is read there, and `find`, which makes of that what is
//   `Found`, or more;
// - `Softmax`, of a unit, and `Units`, which has those of a warp's units in shared memory after `prepare`.
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

template <typename T, typename Form>
struct Operands : Problem {
  const T* value;  // (batch, values, heads, channels)
  Form form;
  LevelTable levels;
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

// Where a sample lies, normalised, and what it weighs.
template <typename C>
struct Found {
  C x, y, attention;
};

// How a thread reads what it, or a neighbour, reads once more.
struct Load {
  template <typename T>
  __device__ __forceinline__ T operator()(const T* address) const {
    return *address;
  }
};
// And what nobody does.
struct LoadOnce {
  template <typename T>
  __device__ __forceinline__ T operator()(const T* address) const {
    return load_once(address);
  }
};

// The form whose locations and weights are in memory.
template <typename T, typename W>
struct GivenSamples {
  using C = compute_t<T>;
  using Weight = W;

  const C* locations;
  const W* weights;
  Strides location_strides, weight_strides;

  GivenSamples() = default;
  GivenSamples(const Tensor& locations, const Tensor& weights)  // from with_short_steps
      : locations(static_cast<const C*>(locations.const_data_ptr())),
        weights(static_cast<const W*>(weights.const_data_ptr())),
        location_strides(locations),
        weight_strides(weights) {}

  // There is none: the weights are known.
  struct Softmax {};
  struct Units {
    __device__ __forceinline__ Softmax softmax(int) const {
      return {};
    }
  };
  __device__ __forceinline__ void prepare(const Problem&, const Place&, Units&) const {}
  __device__ __forceinline__ Softmax softmax(int64_t) const {
    return {};
  }

  struct Pointers {
    const C* location;
    const W* weight;

    __device__ __forceinline__ Pointers kept() const {
      return {keep_global(location), keep_global(weight)};
    }
  };
  struct Loaded {
    C x, y;
    W attention;
  };
  using Found = attention::Found<C>;

  // `offset` says how far from the first element of a tensor with these strides.
  template <typename Offset>
  __device__ __forceinline__ Pointers pointers(const Offset& offset) const {
    return {locations + offset(location_strides), weights + offset(weight_strides)};
  }
  template <typename Offset, typename Loader>
  __device__ __forceinline__ Loaded load(const Pointers& from, const Offset& offset, const Loader& loader) const {
    const C* location = from.location + offset(location_strides);
    return {loader(location), loader(location + location_strides.axis), loader(from.weight + offset(weight_strides))};
  }
  __device__ __forceinline__ Found find(const Loaded& loaded, const Level&, const Softmax&) const {
    return {loaded.x, loaded.y, to_compute(loaded.attention)};
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
template <typename T, typename Form>
class Sampler {
 public:
  using C = compute_t<T>;
  using Units = typename Form::Units;
  using Found = typename Form::Found;

  __device__ Sampler(const Operands<T, Form>& op, const Place& place, int first, const Units* units)
      : units_of_warp_(units) {
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
    pointers_ = op.form.pointers([&](const Strides& strides) { return offset(strides, place.batch); }).kept();
  }

  // Where this thread's samples of a batch begin in a tensor.
  __device__ int64_t offset(const Strides& strides, int batch) const {
    return batch * strides.batch + static_cast<int64_t>(level_number_) * strides.level +
        static_cast<int64_t>(point_) * strides.point;
  }

  // Calls `visit(unit, query, head, sample, inside)` for the units; `inside` counts the samples of the unit that are.
  template <typename Visit>
  __device__ __forceinline__ void for_each(const Operands<T, Form>& op, const Place& place, Visit visit) const {
    in_step(op, place, [&](bool exists, int unit, const Sample<C>& sample, const Found&, unsigned inside) {
      if (exists) {
        visit(unit, place.query(op, unit), place.head(op, unit), sample, __popc(inside & lanes_));
      }
    });
  }

  // Calls `visit(exists, unit, sample, found, inside)` in all threads of the warp at a time, of which some may have no sample;
  // `inside` are the threads whose sample is.
  template <typename Visit>
  __device__ __forceinline__ void in_step(const Operands<T, Form>& op, const Place& place, Visit visit) const {
    Loaded next = load(op, place, first_unit_);  // under way while the one before is visited
    int before = 0;
    do {
      const int unit = before + first_unit_;
      before += op.units_at_once;
      const bool exists = unit < units_;
      const Found found = op.form.find(next, level_, units_of_warp_->softmax(exists ? unit : 0));
      Sample<C> sample;
      sample.level = level_;
      sample.x = pixel_position(found.x, level_.width);
      sample.y = pixel_position(found.y, level_.height);
      sample.attention = found.attention;
      if (before < op.units()) {
        next = load(op, place, before + first_unit_);
      }
      sample.inside = exists & !level_.empty() & touches_level(sample.x, sample.y, level_.width, level_.height);
      sample.number = number_;
      const unsigned inside = __ballot_sync(ALL_LANES, sample.inside);
      sample.rank = __popc(inside & lanes_before_);
      visit(exists, unit, sample, found, inside);
    } while (before < op.units());
  }

  // In all threads of the warp at a time: the sum over those that visit samples of the same unit.
  __device__ __forceinline__ C sum_over_unit(const Operands<T, Form>& op, C value) const {
    for (int step = 1; step < op.samples_at_once.divisor; step *= 2) {
      const C further = __shfl_down_sync(ALL_LANES, value, step);
      value += number_ + step < op.samples_at_once.divisor ? further : 0;
    }
    return __shfl_sync(ALL_LANES, value, static_cast<int>(threadIdx.x % WARP) - number_);
  }

 private:
  using Loaded = typename Form::Loaded;

  // Where there is no such unit, the first one's.
  __device__ __forceinline__ Loaded load(const Operands<T, Form>& op, const Place& place, int unit) const {
    unit = unit < units_ ? unit : 0;
    const int query = place.query(op, unit), head = place.head(op, unit);
    return op.form.load(pointers_, [&](const Strides& strides) { return strides.offset(query, head); }, LoadOnce());
  }

  unsigned lanes_, lanes_before_;  // of the warp, that visit samples of the same unit; those of them before this one
  int units_;                      // of the warp, that exist
  int first_unit_;                 // that this thread visits; beyond the last if none
  int number_, level_number_, point_;
  Level level_;
  typename Form::Pointers pointers_;
  const Units* units_of_warp_;
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

// What a warp keeps in shared memory.
template <typename T, int SLOTS, typename Form>
struct Staged : Footprints<T, SLOTS>, Form::Units {};

// Stages what a sampler visits.
template <typename T, typename Form, int SLOTS>
__device__ __forceinline__ void stage(
    const Operands<T, Form>& op,
    const Place& place,
    const Sampler<T, Form>& sampler,
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

// Fills in the sizes, which the kernels' operands have in common.
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

// For lanes of `vec` channels of so many bytes each, and warps that stage `slots` samples: more than WARP, so that there is one for
// each unit where every lane is a unit of its own.
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

template <typename T, typename Form>
Operands<T, Form> operands(
    const Sizes& sizes, const Tensor& value, const LevelTable& levels, const Form& form, int vec, int slots) {
  Operands<T, Form> op = {divide(sizes, vec, sizeof(T), slots, value.get_device_index())};
  op.value = static_cast<const T*>(value.const_data_ptr());
  op.form = form;
  op.levels = levels;
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
