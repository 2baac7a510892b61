// The backward of both ops without sums by atomics: every gradient has one owner, which adds its terms in a fixed order. This
// takes longer than the default kernels where few samples are seen, or channels are few; docs/kernels.md has the figures.
//
// A sample reads the four pixels of its footprint. Its *anchor* is the top left one of those inside the level. The samples of
// a *bin* share their anchor; then a pixel's gradient is a sum over four bins, its own and those of its neighbours to
// the left, above, and above left:
//
//   1. one thread per sample writes the number of its bin; a stable sort by these numbers makes each bin a range;
//   2. a team of lanes, which spans the channels, owns a strip of neighbouring pixels. It walks the bins of the
//      strip's row and of the row above from left to right, and reads for each sample the output's gradient once for
//      the two pixels that it touches in this row:
//
//          row above    | bin | bin | bin |      the bottom corners of their samples lie in the strip
//          the strip    | bin | bin | bin |      the top corners
//                         ... [cur] [next]       sums of two pixels in registers; moving on writes one of them
//
//      the pixels' own features are in registers too, so that their products with the output's gradient, which the
//      gradients of weights and locations are made of, need no other read;
//   3. a few lanes per location put the gradients of weights and locations together from those products.
//
// Traffic: features are read once and their gradient is written once, in the features' dtype, in order. For each sample, two
// rows of the output's gradient are read, mostly from L2: half of what the forward gathers.

#include "deterministic_backward.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>

#include "../common/corners.cuh"
#include "../common/launch.cuh"
#include "sort.cuh"

namespace reimplementation::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 4;  // a multiprocessor's: it leaves the registers that loads in flight need
constexpr int IN_FLIGHT = 4;   // samples whose loads are under way together
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int64_t WORKSPACE = int64_t{1} << 29;  // bytes; larger batches are taken in parts
constexpr int64_t MOST_SAMPLES = int64_t{1} << 28;

// A level, and the number of its first bin within an image.
struct alignas(16) Span {
  int start, height, width, first_bin;
};

// What the kernels of one part of the batch read and write. An *image* is a batch element's head: it has rows of its own.
template <typename T, typename W>
struct Part {
  const T* features;
  const T* grad_output;
  const compute_t<T>* locations;
  const W* weights;
  T* grad_features;              // or null where not needed; so are the others
  compute_t<T>* grad_locations;
  W* grad_weights;
  SampleStrides location_strides, weight_strides, grad_location_strides, grad_weight_strides;
  int64_t feature_strides[3], output_strides[3];  // batch, head, and row or query
  int images, heads, queries, points, cams, levels, rows;
  int channels, groups, group_channels;
  bool unit_square;
  bool add;                      // to the features' gradient that an earlier part wrote

  const Span* spans;             // cams * levels, and one more that begins where the last ends
  int2* bins;                    // first and end among the sorted samples, by image and bin
  uint32_t nowhere;              // the bin of samples that count for nothing, above all others
  compute_t<T>* products;        // (sample, corner, group): the pixel's features times the output's gradient

  __device__ int num_levels() const {
    return cams * levels;
  }
  __device__ int num_bins() const {
    return spans[num_levels()].first_bin;
  }
  __device__ bool needs_products() const {
    return products != nullptr;
  }
};

// A sample's place in the order of its part.
struct SamplePlace {
  int image, query, point, cam, level;

  template <typename T, typename W>
  __device__ SamplePlace(const Part<T, W>& part, unsigned sample) {
    const unsigned pair = sample / part.levels;
    const unsigned key_point = pair / part.cams;
    const unsigned owner = key_point / part.points;
    level = sample - pair * part.levels;
    cam = pair - key_point * part.cams;
    point = key_point - owner * part.points;
    image = owner / part.queries;
    query = owner - image * part.queries;
  }

  __device__ int64_t offset(const SampleStrides& strides, int heads) const {
    const int batch = image / heads;
    return batch * strides[0] + (image - batch * heads) * strides[1] + query * strides[2] + point * strides[3] +
        cam * strides[4] + level * strides[5];
  }
};

// The two axes of a sample's footprint, if it counts at all.
template <typename T>
struct Footprint {
  Axis<T> x, y;
  bool counts = false;

  __device__ Footprint(const T* location, int64_t next, const Span& span, bool unit_square) {
    if (span.height == 0) {
      return;
    }
    const T px = pixel_position(location[0], span.width), py = pixel_position(location[next], span.height);
    counts = unit_square ? inside_unit_square(location[0], location[next])
                         : touches_level(px, py, span.width, span.height);
    if (counts) {
      x = bilinear_axis(px, span.width);
      y = bilinear_axis(py, span.height);
    }
  }

  __device__ int anchor(int width) const {
    return y.index[0] * width + x.index[0];
  }
};

template <typename T>
__device__ bool inside(const Axis<T>& axis, int pixel) {
  return axis.slope[pixel] != 0;
}

// Step 1. One warp lists the levels.
__global__ void list_levels(LevelTable levels, int num_levels, Span* spans) {
  int end = 0;
  for (int first = 0; first <= num_levels; first += WARP) {
    const int i = first + threadIdx.x;
    const Level level = i < num_levels ? levels[i] : Level{0, 0, 0};
    const int pixels = level.height * level.width;
    int before = pixels;
    for (int step = 1; step < WARP; step *= 2) {
      const int other = __shfl_up_sync(ALL_LANES, before, step);
      before += threadIdx.x >= step ? other : 0;
    }
    if (i <= num_levels) {
      spans[i] = {level.start, level.height, level.width, end + before - pixels};
    }
    end += __shfl_sync(ALL_LANES, before, WARP - 1);
  }
}

// The bin of every sample; and all bins become empty.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) find_bins(
    const Part<T, W> part, unsigned samples, uint32_t* keys, uint32_t* values) {
  const unsigned sample = blockIdx.x * THREADS + threadIdx.x;
  const unsigned all_bins = static_cast<unsigned>(part.images) * part.num_bins();
  for (unsigned bin = sample; bin < all_bins; bin += gridDim.x * THREADS) {
    part.bins[bin] = {0, 0};
  }
  if (sample >= samples) {
    return;
  }
  const SamplePlace place(part, sample);
  const Span span = part.spans[place.cam * part.levels + place.level];
  const Footprint<compute_t<T>> footprint(
      part.locations + place.offset(part.location_strides, part.heads), part.location_strides[6], span,
      part.unit_square);
  keys[sample] = footprint.counts
      ? static_cast<unsigned>(place.image) * part.num_bins() + span.first_bin + footprint.anchor(span.width)
      : part.nowhere;
  values[sample] = sample;
}

// What a walk needs of a sample, in the order of the bins: all reads of it are in line.
template <typename T>
struct alignas(16) Record {
  T x[2], y[2];  // weights of the anchor's column and row, and of the next ones
  int query;
  unsigned sample_and_flags;
  int64_t weights;
};

enum RecordFlag : unsigned {
  HAS_RIGHT = 1u << 28,   // the column right of the anchor's is in the level
  HAS_BOTTOM = 1u << 29,
  ANCHOR_X = 1u << 30,    // the anchor's column is the footprint's second: its first is outside
  ANCHOR_Y = 1u << 31,
};
static_assert(MOST_SAMPLES <= HAS_RIGHT, "flags lie above the sample's number");

// The range of every bin among the sorted samples, and their records.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) list_records(
    const Part<T, W> part, const uint32_t* keys, const uint32_t* sorted, unsigned samples, Record<compute_t<T>>* records) {
  const unsigned i = blockIdx.x * THREADS + threadIdx.x;
  if (i >= samples || keys[i] == part.nowhere) {
    return;
  }
  if (i == 0 || keys[i - 1] != keys[i]) {
    part.bins[keys[i]].x = i;
  }
  if (i + 1 == samples || keys[i + 1] != keys[i]) {
    part.bins[keys[i]].y = i + 1;
  }
  const unsigned sample = sorted[i];
  const SamplePlace place(part, sample);
  const Span span = part.spans[place.cam * part.levels + place.level];
  const Footprint<compute_t<T>> footprint(
      part.locations + place.offset(part.location_strides, part.heads), part.location_strides[6], span,
      part.unit_square);
  const int x = inside(footprint.x, 0) ? 0 : 1, y = inside(footprint.y, 0) ? 0 : 1;
  Record<compute_t<T>> record;
  record.x[0] = footprint.x.weight[x];
  record.x[1] = footprint.x.weight[1];
  record.y[0] = footprint.y.weight[y];
  record.y[1] = footprint.y.weight[1];
  record.query = place.query;
  record.sample_and_flags = sample | (x == 0 && inside(footprint.x, 1) ? HAS_RIGHT : 0) |
      (y == 0 && inside(footprint.y, 1) ? HAS_BOTTOM : 0) | (x == 1 ? ANCHOR_X : 0) | (y == 1 ? ANCHOR_Y : 0);
  record.weights = place.offset(part.weight_strides, part.heads);
  records[i] = record;
}

// A team of lanes spans the channels: vector k of a lane holds VEC of them from first + (k * lanes + lane) * VEC.
struct Team {
  int lanes, log2_lanes;
  int group_lanes;  // that hold one group's channels, where these divide the lanes evenly; else 0
  int group_steps;  // doubling steps that sum a group's lanes, where they do not

  __host__ __device__ int in_block() const {
    return THREADS >> log2_lanes;
  }
};

// What a sample does in the strip's row: to the pixel below its anchor's column, and to the one right of it.
template <typename T>
struct alignas(16) Visit {
  T left, right;  // corner weights
  int query;
  int column;                       // of the left pixel, counted from the strip's first; -1 for the pixel before
  int left_product, right_product;  // sample * 4 + corner; NOT_HERE where the pixel is outside, or of another strip
  int64_t weights;
};

constexpr int NOT_HERE = -1;

// Neighbouring pixels of a strip: fewer where a lane holds much of a pixel.
template <typename T, int VEC, int NV>
constexpr int STRIP = std::min<int>(16, 256 / (sizeof(compute_t<T>) * VEC * NV));

// The bins that a strip's samples are in: this row's first, the one above it, this row's next, ...
template <int PIXELS>
struct StripBins {
  int first[2 * (PIXELS + 1)];   // sorted sample
  int before[2 * (PIXELS + 1)];  // samples in the bins before
};

// Visits from which a strip is *crowded*: a block walks it, not a team.
__host__ __device__ inline int crowded_visits(const Team& team) {
  return 8192 >> team.log2_lanes;
}

// Sums N values, each over groups of `width` >= N lanes. Every lane ends with the sum of one of them, in the first.
template <int N, typename T>
__device__ __forceinline__ void sum_one_of(int lane, int width, T (&values)[N]) {
  int step = width / 2;
#pragma unroll
  for (int half = N / 2; half > 0; half /= 2) {
    // Half of the lanes pass on what they need not keep.
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T passed = upper ? values[i] : values[i + half];
      values[i] = (upper ? values[i + half] : values[i]) + __shfl_xor_sync(ALL_LANES, passed, step);
    }
    step /= 2;
  }
  for (; step > 0; step /= 2) {
    values[0] += __shfl_xor_sync(ALL_LANES, values[0], step);
  }
}

// Where a lane's channels are, and which of the sums that its group of lanes makes it keeps.
template <int VEC, int NV>
struct Lane {
  int number;
  int channel[NV], group[NV];
  int64_t weights[NV];  // from a sample's weights to its groups'
  bool live[NV];        // lanes beyond the last channel read it once more, and write nothing
  int side, product;    // of the sum it keeps: left or right, and the group, or NOT_HERE

  template <typename T, typename W>
  __device__ Lane(const Part<T, W>& part, const Team& team, int lane, int first) : number(lane) {
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      channel[k] = first + (k * team.lanes + lane) * VEC;
      live[k] = channel[k] < part.channels;
      channel[k] = min(channel[k], part.channels - VEC);
      group[k] = channel[k] / part.group_channels;
      weights[k] = group[k] * part.weight_strides[6];
    }
    side = 0;
    product = NOT_HERE;
    if (team.group_lanes >= 2 * NV) {
      // As `sum_one_of` leaves them: each halving of the lanes halves the values.
      int which = 0;
      for (int half = NV, step = team.group_lanes / 2; half > 0; half /= 2, step /= 2) {
        which += lane & step ? half : 0;
      }
      side = which / NV;
      const int its_channel = first + (which % NV * team.lanes + lane) * VEC;
      if ((lane & (team.group_lanes / (2 * NV) - 1)) == 0 && its_channel < part.channels) {
        product = its_channel / part.group_channels;
      }
    }
  }
};

// Sums the lanes' parts of the products of the output's gradient with two pixels, by groups, and writes them.
// dots: of the left pixel's vectors, then of the right one's.
template <int VEC, int NV, typename T, typename W>
__device__ __forceinline__ void put_products(
    const Part<T, W>& part,
    const Team& team,
    const Lane<VEC, NV>& lane,
    int left_product,
    int right_product,
    compute_t<T> (&dots)[2 * NV]) {
  using C = compute_t<T>;
  if (team.group_lanes >= 2 * NV) {
    sum_one_of(lane.number, team.group_lanes, dots);
    const int corner = lane.side == 0 ? left_product : right_product;
    if (corner != NOT_HERE && lane.product != NOT_HERE) {
      part.products[static_cast<int64_t>(corner) * part.groups + lane.product] = dots[0];
    }
    return;
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const int corner = side == 0 ? left_product : right_product;
    C* place = part.products + static_cast<int64_t>(max(corner, 0)) * part.groups;
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      C dot = dots[side * NV + k];
      const int own_group = lane.live[k] ? lane.group[k] : NOT_HERE;
      for (int step = 0; step < team.group_steps; ++step) {
        const C above = __shfl_down_sync(ALL_LANES, dot, 1 << step, team.lanes);
        const int group_above = __shfl_down_sync(ALL_LANES, own_group, 1 << step, team.lanes);
        dot += lane.number + (1 << step) < team.lanes && group_above == own_group ? above : C(0);
      }
      const int group_before = __shfl_up_sync(ALL_LANES, own_group, 1, team.lanes);
      if (corner != NOT_HERE && lane.live[k] && (lane.number == 0 || group_before != own_group)) {
        const bool begins_group = lane.channel[k] % part.group_channels == 0;
        place[lane.group[k]] = begins_group ? dot : place[lane.group[k]] + dot;
      }
      __syncwarp();  // the next vector may hold more of the same group
    }
  }
}

// Step 2. A team owns a strip; the teams of a warp walk theirs in step, one that is done or has none idles. Those that are crowded it puts on a list, and leaves to the second launch: where CROWDED, a
// block owns one pixel, its teams share the visits out and add their sums at the end.
template <bool CROWDED, typename T, typename W, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) walk_strips(
    const Part<T, W> part, const Record<compute_t<T>>* __restrict__ records, const Team team, int strips, int* crowded) {
  using C = compute_t<T>;
  using Sums = Vector<C, VEC>;
  using Pixel = Vector<T, VEC>;
  constexpr int PIXELS = STRIP<T, VEC, NV>;
  static_assert(2 * (PIXELS + 1) <= 2 * WARP, "what the search for a visit's bin, and a mask of pixels, have room for");
  const int lanes = team.lanes, teams = team.in_block();
  const int my_lane = threadIdx.x & (lanes - 1);
  const int my_team = threadIdx.x >> team.log2_lanes;
  const int first_lane = threadIdx.x % WARP & ~(lanes - 1);
  const unsigned own_lanes = lanes == WARP ? ALL_LANES : (1u << lanes) - 1;

  extern __shared__ __align__(16) char memory[];
  Visit<C>* visits = reinterpret_cast<Visit<C>*>(memory) + my_team * lanes;
  StripBins<PIXELS>& bins =
      reinterpret_cast<StripBins<PIXELS>*>(memory + THREADS * sizeof(Visit<C>))[CROWDED ? 0 : my_team];
  unsigned* touched_by_team = reinterpret_cast<unsigned*>(&bins + 1);  // CROWDED: which pixels a team has sums of
  const int row_vectors = lanes * NV;
  Sums* team_sums = reinterpret_cast<Sums*>(touched_by_team + THREADS);  // CROWDED: (team, vector)
  auto sync = [&] {
    if constexpr (CROWDED) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  };

  int number = blockIdx.x;
  bool owns = true;  // a strip, all of it
  if constexpr (CROWDED) {
    if (number / PIXELS >= crowded[0]) {
      return;
    }
    number = crowded[1 + number / PIXELS];
  } else {
    number = number * teams + my_team;
    owns = number < part.images * strips;
    number = owns ? number : 0;
  }
  const int image = number / strips;
  const int first_row = (number - image * strips) * PIXELS + (CROWDED ? blockIdx.x % PIXELS : 0);
  const int end_row = min(first_row + (CROWDED ? 1 : PIXELS), part.rows);
  if (first_row >= end_row) {
    return;
  }
  const int batch = image / part.heads, head = image - batch * part.heads;
  const int64_t image_features = batch * part.feature_strides[0] + head * part.feature_strides[1];
  const T* features = part.features + image_features;
  T* grad_features = part.grad_features + image_features;
  const T* grad_output = part.grad_output + batch * part.output_strides[0] + head * part.output_strides[1];
  const int row_bytes = static_cast<int>(part.feature_strides[2] * sizeof(T));  // a query's, too
  const int2* image_bins = part.bins + static_cast<int64_t>(image) * part.num_bins();
  const bool needs_features = part.grad_features != nullptr, needs_products = part.needs_products();
  const unsigned written_before = part.add ? ~0u : 0;

  for (int first_channel = 0; first_channel < part.channels; first_channel += row_vectors * VEC) {
    const Lane<VEC, NV> lane(part, team, my_lane, first_channel);
    unsigned written = written_before;

    for (int first_level = 0; first_level < part.num_levels(); first_level += lanes) {
      Span own = {};
      if (first_level + my_lane < part.num_levels()) {
        own = part.spans[first_level + my_lane];
      }
      const bool meets =
          owns && own.height > 0 && own.start < end_row && own.start + own.height * own.width > first_row;
      unsigned found = __ballot_sync(ALL_LANES, meets) >> first_lane & own_lanes;
      while (__any_sync(ALL_LANES, found != 0)) {
        const bool in_level = found != 0 && owns;
        const int source = max(__ffs(found) - 1, 0);
        found &= found - 1;
        const int start = __shfl_sync(ALL_LANES, own.start, source, lanes);
        const int width = __shfl_sync(ALL_LANES, own.width, source, lanes);
        const int level_pixels = __shfl_sync(ALL_LANES, own.height, source, lanes) * width;
        const int first_bin = __shfl_sync(ALL_LANES, own.first_bin, source, lanes);

        const int first = max(first_row - start, 0);  // of the strip's pixels, counted in the level
        const int count = in_level ? min(end_row - start, level_pixels) - first : 0;
        const int before = in_level && first % width != 0;  // the pixel before has samples that reach in
        const int num_bins = 2 * (count + before);
        for (int i = CROWDED ? threadIdx.x : my_lane; i < num_bins; i += CROWDED ? THREADS : lanes) {
          const int bin = first - before + i / 2 - (i % 2 ? width : 0);
          const int2 range = bin >= 0 ? image_bins[first_bin + bin] : int2{0, 0};
          bins.first[i] = range.x;
          bins.before[i] = range.y - range.x;
        }
        sync();
        int num_visits = 0;
        for (int i = 0; i < num_bins; ++i) {
          num_visits += bins.before[i];
        }
        if constexpr (!CROWDED) {
          if (num_visits > crowded_visits(team) && written == written_before && first_channel == 0) {
            if (my_lane == 0) {
              crowded[1 + atomicAdd(&crowded[0], 1)] = number;
            }
            owns = false;
            num_visits = 0;
          }
        }
        sync();
        if (!__any_sync(ALL_LANES, num_visits > 0)) {  // CROWDED: the same in all warps
          continue;
        }
        if (CROWDED ? threadIdx.x == 0 : my_lane == 0) {
          int sum = 0;
          for (int i = 0; i < num_bins; ++i) {
            const int samples = bins.before[i];
            bins.before[i] = sum;
            sum += samples;
          }
        }
        sync();

        const int to_first = start + first - first_row;  // from the strip's first row
        auto row_of = [&](auto* image_rows, int pixel) {
          return row_address(image_rows, first_row + to_first + pixel, row_bytes);
        };
        C left_sums[NV][VEC] = {}, right_sums[NV][VEC] = {};
        Pixel left_pixel[NV] = {}, right_pixel[NV] = {};
        unsigned touched = 0;
        int column = -2;
        auto put = [&](int pixel, const C(&sums)[NV][VEC]) {
          if (!needs_features || pixel < 0 || pixel >= count) {
            return;
          }
          touched |= 1u << pixel;
#pragma unroll
          for (int k = 0; k < NV; ++k) {
            if constexpr (CROWDED) {
              Sums vector;
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                vector.values[v] = sums[k][v];
              }
              team_sums[my_team * row_vectors + k * lanes + my_lane] = vector;
            } else if (lane.live[k]) {
              Pixel* place = reinterpret_cast<Pixel*>(row_of(grad_features, pixel) + lane.channel[k]);
              const bool add = written >> (to_first + pixel) & 1;
              Pixel rounded;
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                rounded.values[v] = from_compute<T>(add ? (*place)[v] + sums[k][v] : sums[k][v]);
              }
              *place = rounded;
            }
          }
        };
        auto read_pixel = [&](Pixel(&pixel)[NV], int place) {
          if (needs_products && place >= 0 && place < count) {
#pragma unroll
            for (int k = 0; k < NV; ++k) {
              pixel[k] = load_vector<VEC>(row_of(features, place) + lane.channel[k]);
            }
          }
        };
        int begin = 0, end = num_visits;
        if constexpr (CROWDED) {
          const int share = (num_visits + teams - 1) / teams;
          begin = min(my_team * share, num_visits);
          end = min(begin + share, num_visits);
        }
        for (int base = begin; __any_sync(ALL_LANES, base < end); base += lanes) {
          const int visits_here = min(lanes, max(end - base, 0));
          if (my_lane < visits_here) {
            int i = 0;
#pragma unroll
            for (int step = WARP; step > 0; step /= 2) {
              if (i + step < num_bins && bins.before[i + step] <= base + my_lane) {
                i += step;
              }
            }
            const Record<C> record = records[bins.first[i] + base + my_lane - bins.before[i]];
            const bool below = i % 2;
            const unsigned flags = record.sample_and_flags;
            const int product =
                (flags & (HAS_RIGHT - 1)) * 4 + (below || (flags & ANCHOR_Y) ? 2 : 0) + (flags & ANCHOR_X ? 1 : 0);
            const bool in_row = !below || (flags & HAS_BOTTOM);
            const C row_weight = below ? record.y[1] : record.y[0];
            Visit<C> visit;
            visit.column = i / 2 - before;
            const bool left = in_row && visit.column >= 0;
            const bool right = in_row && visit.column + 1 < count && (flags & HAS_RIGHT);
            visit.left = record.x[0] * row_weight;
            visit.right = record.x[1] * row_weight;
            visit.query = record.query;
            visit.left_product = left ? product : NOT_HERE;
            visit.right_product = right ? product + 1 : NOT_HERE;
            visit.weights = record.weights;
            visits[my_lane] = visit;
          }
          __syncwarp();

#pragma unroll 1
          for (int i = 0; __any_sync(ALL_LANES, i < visits_here); i += IN_FLIGHT) {
            Pixel loaded[IN_FLIGHT][NV];
            C weights[IN_FLIGHT][NV];
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; ++j) {
              if (i + j < visits_here) {
                const Visit<C>& visit = visits[i + j];
                const T* output_row = row_address(grad_output, visit.query, row_bytes);
                const W* sample_weights = part.weights + visit.weights;
#pragma unroll
                for (int k = 0; k < NV; ++k) {
                  loaded[j][k] = load_vector<VEC>(output_row + lane.channel[k]);
                  weights[j][k] = to_compute(sample_weights[lane.weights[k]]);
                }
              }
            }
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; ++j) {
              C dots[2 * NV] = {};
              int left_product = NOT_HERE, right_product = NOT_HERE;
              if (i + j < visits_here) {
                const Visit<C> visit = visits[i + j];
                left_product = visit.left_product;
                right_product = visit.right_product;
                if (visit.column != column) {
                  const bool next_door = visit.column == column + 1;
                  put(column, left_sums);
                  if (!next_door) {
                    put(column + 1, right_sums);
                    read_pixel(right_pixel, visit.column);
                  }
                  column = visit.column;
#pragma unroll
                  for (int k = 0; k < NV; ++k) {
                    left_pixel[k] = right_pixel[k];
#pragma unroll
                    for (int v = 0; v < VEC; ++v) {
                      left_sums[k][v] = next_door ? right_sums[k][v] : C(0);
                      right_sums[k][v] = 0;
                    }
                  }
                  read_pixel(right_pixel, column + 1);
                }
                if (left_product != NOT_HERE) {
#pragma unroll
                  for (int k = 0; k < NV; ++k) {
                    const C weight = visit.left * weights[j][k];
#pragma unroll
                    for (int v = 0; v < VEC; ++v) {
                      left_sums[k][v] += weight * loaded[j][k][v];
                      dots[k] += left_pixel[k][v] * loaded[j][k][v];
                    }
                    dots[k] = lane.live[k] ? dots[k] : C(0);
                  }
                }
                if (right_product != NOT_HERE) {
#pragma unroll
                  for (int k = 0; k < NV; ++k) {
                    const C weight = visit.right * weights[j][k];
#pragma unroll
                    for (int v = 0; v < VEC; ++v) {
                      right_sums[k][v] += weight * loaded[j][k][v];
                      dots[NV + k] += right_pixel[k][v] * loaded[j][k][v];
                    }
                    dots[NV + k] = lane.live[k] ? dots[NV + k] : C(0);
                  }
                }
              }
              if (needs_products) {
                put_products<VEC, NV>(part, team, lane, left_product, right_product, dots);
              }
            }
          }
          __syncwarp();
        }
        put(column, left_sums);
        put(column + 1, right_sums);
        if constexpr (CROWDED) {
          if (my_lane == 0) {
            touched_by_team[my_team] = touched;
          }
          __syncthreads();
          touched = 0;
          for (int t = 0; t < teams; ++t) {
            touched |= touched_by_team[t];
          }
          for (int i = threadIdx.x; needs_features && i < count * row_vectors; i += THREADS) {
            const int pixel = i / row_vectors;
            const int vector = i - pixel * row_vectors;
            const int to = first_channel + vector * VEC;
            if (!(touched >> pixel & 1) || to >= part.channels) {
              continue;
            }
            Pixel* place = reinterpret_cast<Pixel*>(row_of(grad_features, pixel) + to);
            C sums[VEC] = {};
            if (written >> (to_first + pixel) & 1) {
              const Pixel earlier = *place;
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                sums[v] = earlier[v];
              }
            }
            for (int t = 0; t < teams; ++t) {
              if (touched_by_team[t] >> pixel & 1) {
                const Sums terms = team_sums[t * row_vectors + vector];
#pragma unroll
                for (int v = 0; v < VEC; ++v) {
                  sums[v] += terms.values[v];
                }
              }
            }
            Pixel rounded;
#pragma unroll
            for (int v = 0; v < VEC; ++v) {
              rounded.values[v] = from_compute<T>(sums[v]);
            }
            *place = rounded;
          }
        }
        written |= in_level ? touched << to_first : 0;
        sync();
      }
    }
    for (int row = 0; owns && needs_features && first_row + row < end_row; ++row) {
      if (!(written >> row & 1) && (!CROWDED || my_team == 0)) {
        T* address = row_address(grad_features, first_row + row, row_bytes);
#pragma unroll
        for (int k = 0; k < NV; ++k) {
          if (lane.live[k]) {
            *reinterpret_cast<Pixel*>(address + lane.channel[k]) = Pixel{};
          }
        }
      }
    }
  }
}

// Step 3: the gradients of one location, and of its samples' weights. The lanes share the groups out.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) finish_locations(const Part<T, W> part, unsigned locations, int log2_lanes) {
  using C = compute_t<T>;
  const int lanes = 1 << log2_lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const unsigned location = (blockIdx.x * (THREADS >> log2_lanes)) + (threadIdx.x >> log2_lanes);
  if (location >= locations) {
    return;
  }
  const int first_lane = threadIdx.x % WARP & ~(lanes - 1);
  const unsigned mask = lanes == WARP ? 0xffffffffu : ((1u << lanes) - 1) << first_lane;
  SamplePlace place(part, location * part.levels);
  const C* position = part.locations + place.offset(part.location_strides, part.heads);
  const W* weights = part.weights + place.offset(part.weight_strides, part.heads);
  const int64_t grad_location = place.offset(part.grad_location_strides, part.heads);
  const int64_t grad_weight = place.offset(part.grad_weight_strides, part.heads);
  const bool one_location = part.location_strides[5] == 0 && part.unit_square;  // for all levels

  if (part.unit_square && !inside_unit_square(position[0], position[part.location_strides[6]])) {
    for (int i = lane; part.grad_weights != nullptr && i < part.levels * part.groups; i += lanes) {
      const int level = i / part.groups;
      part.grad_weights
          [grad_weight + level * part.grad_weight_strides[5] +
           (i - level * part.groups) * part.grad_weight_strides[6]] = from_compute<W>(0);
    }
    if (part.grad_locations != nullptr && lane < 2) {
      for (int axis = lane; axis < 2; axis += lanes) {
        part.grad_locations[grad_location + axis * part.grad_location_strides[6]] = 0;
      }
    }
    return;
  }
  C grad_x = 0, grad_y = 0;
  for (int level = 0; level < part.levels; ++level) {
    const Span span = part.spans[place.cam * part.levels + level];
    const Footprint<C> footprint(
        position + level * part.location_strides[5], part.location_strides[6], span, part.unit_square);
    const C* products = part.products + (static_cast<int64_t>(location) * part.levels + level) * 4 * part.groups;
    for (int group = lane; group < part.groups; group += lanes) {
      C sum = 0;
      if (footprint.counts) {
        C dots[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          const bool is_inside = inside(footprint.x, corner % 2) && inside(footprint.y, corner / 2);
          dots[corner] = is_inside ? products[corner * part.groups + group] : C(0);
        }
        const Four<C> corners = corner_weights(footprint.x, footprint.y);
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          sum += corners[corner] * dots[corner];
        }
        C along_x, along_y;
        location_gradient(
            {footprint.x.weight[0], footprint.x.weight[1], footprint.y.weight[0], footprint.y.weight[1]},
            {footprint.x.slope[0], footprint.x.slope[1], footprint.y.slope[0], footprint.y.slope[1]}, dots, along_x,
            along_y);
        const C weight = to_compute(weights[level * part.weight_strides[5] + group * part.weight_strides[6]]);
        grad_x += weight * along_x;
        grad_y += weight * along_y;
      }
      if (part.grad_weights != nullptr) {
        part.grad_weights[grad_weight + level * part.grad_weight_strides[5] + group * part.grad_weight_strides[6]] =
            from_compute<W>(sum);
      }
    }
    if (part.grad_locations != nullptr && (!one_location || level + 1 == part.levels)) {
      for (int step = lanes / 2; step > 0; step /= 2) {
        grad_x += __shfl_xor_sync(mask, grad_x, step);
        grad_y += __shfl_xor_sync(mask, grad_y, step);
      }
      if (lane == 0) {
        C* place_here = part.grad_locations + grad_location + level * part.grad_location_strides[5];
        place_here[0] = grad_x;
        place_here[part.grad_location_strides[6]] = grad_y;
      }
      grad_x = grad_y = 0;
    }
  }
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + THREADS - 1) / THREADS);
}

template <typename T, typename W, int VEC, int NV, typename Scratch>
void launch_walk(
    const Part<T, W>& part, const Record<compute_t<T>>* records, int64_t samples, Scratch scratch, cudaStream_t stream) {
  using C = compute_t<T>;
  Team team = {};
  team.log2_lanes = std::min(5, ceil_log2((part.channels + VEC * NV - 1) / (VEC * NV)));
  team.lanes = 1 << team.log2_lanes;
  const int vectors = part.group_channels / VEC;
  if (part.group_channels % VEC == 0 && (vectors & (vectors - 1)) == 0 && vectors <= team.lanes) {
    team.group_lanes = vectors;
  }
  team.group_steps = ceil_log2(std::min(team.lanes, vectors + 2));
  constexpr int PIXELS = STRIP<T, VEC, NV>;
  const int strips = (part.rows + PIXELS - 1) / PIXELS;
  const int64_t all_strips = static_cast<int64_t>(part.images) * strips;
  const int64_t visits = 4 * samples;  // at most: two rows, and in each two strips where a footprint spans their border
  const int64_t most_crowded = std::min(all_strips, visits / crowded_visits(team));
  const Tensor crowded_memory = scratch((1 + most_crowded) * sizeof(int));
  int* crowded = static_cast<int*>(crowded_memory.mutable_data_ptr());
  cudaMemsetAsync(crowded, 0, sizeof(int), stream);

  const size_t visits_bytes = THREADS * sizeof(Visit<C>);
  walk_strips<false, T, W, VEC, NV>
      <<<static_cast<unsigned>((all_strips + team.in_block() - 1) / team.in_block()), THREADS,
         visits_bytes + team.in_block() * sizeof(StripBins<PIXELS>), stream>>>(part, records, team, strips, crowded);
  check_launch("walk_strips");
  if (most_crowded > 0) {
    const auto kernel = walk_strips<true, T, W, VEC, NV>;
    const size_t bytes = visits_bytes + sizeof(StripBins<PIXELS>) + THREADS * sizeof(unsigned) +
        NV * VEC * THREADS * sizeof(C);
    kernel<<<static_cast<unsigned>(most_crowded * PIXELS), THREADS, bytes, stream>>>(part, records, team, strips, crowded);
    check_launch("walk_strips of the crowded");
  }
}

template <typename T>
bool on_boundary(const Tensor& tensor, int vec) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (vec * sizeof(T)) == 0;
}

template <typename T, typename W>
void run_part(const SampledOp& op, Part<T, W> part, int64_t bound, cudaStream_t stream) {
  using C = compute_t<T>;
  const int64_t locations =
      static_cast<int64_t>(part.images) * part.queries * part.points * part.cams;
  const int64_t samples = locations * part.levels;
  const int num_levels = part.cams * part.levels;
  const bool needs_products = part.grad_locations != nullptr || part.grad_weights != nullptr;
  auto scratch = [&](int64_t bytes) {
    return torch::stable::new_empty(op.features, {bytes}, torch::headeronly::ScalarType::Byte);
  };
  const Tensor spans = scratch((num_levels + 1) * sizeof(Span));
  const Tensor bins = scratch(bound * sizeof(int2));
  const Tensor pairs = scratch(4 * samples * sizeof(uint32_t));
  const Tensor products = scratch(needs_products ? samples * 4 * part.groups * sizeof(C) : 0);
  part.spans = static_cast<const Span*>(spans.const_data_ptr());
  part.bins = static_cast<int2*>(bins.mutable_data_ptr());
  part.nowhere = static_cast<uint32_t>(bound);
  part.products = needs_products ? static_cast<C*>(products.mutable_data_ptr()) : nullptr;

  list_levels<<<1, WARP, 0, stream>>>(op.level_table, num_levels, static_cast<Span*>(spans.mutable_data_ptr()));
  check_launch("list_levels");
  uint32_t* words = static_cast<uint32_t*>(pairs.mutable_data_ptr());
  const Pairs found = {words, words + samples}, spare = {words + 2 * samples, words + 3 * samples};
  find_bins<<<blocks_for(samples), THREADS, 0, stream>>>(
      part, static_cast<unsigned>(samples), found.keys, found.values);
  check_launch("find_bins");
  const Pairs sorted = sort_pairs(found, spare, samples, ceil_log2(bound + 1), op.features, stream);
  const Tensor record_memory = scratch(samples * sizeof(Record<C>));
  auto* records = static_cast<Record<C>*>(record_memory.mutable_data_ptr());
  list_records<<<blocks_for(samples), THREADS, 0, stream>>>(
      part, sorted.keys, sorted.values, static_cast<unsigned>(samples), records);
  check_launch("list_records");

  constexpr int VEC = 16 / sizeof(T);
  if (part.group_channels % VEC == 0 && on_boundary<T>(op.features, VEC) && on_boundary<T>(op.grad_output, VEC) &&
      on_boundary<T>(op.grad_features, VEC)) {
    if (sizeof(T) > 2 && part.channels > WARP * VEC) {
      launch_walk<T, W, VEC, sizeof(T) == 2 ? 1 : 2>(part, records, samples, scratch, stream);
    } else {
      launch_walk<T, W, VEC, 1>(part, records, samples, scratch, stream);
    }
  } else {
    launch_walk<T, W, 1, 4>(part, records, samples, scratch, stream);
  }
  if (needs_products) {
    const int log2_lanes = std::min(5, ceil_log2(part.groups));
    finish_locations<<<blocks_for(locations << log2_lanes), THREADS, 0, stream>>>(
        part, static_cast<unsigned>(locations), log2_lanes);
    check_launch("finish_locations");
  }
}

template <typename T, typename W>
void run(const SampledOp& op, cudaStream_t stream) {
  using C = compute_t<T>;
  auto data = [](const Tensor& tensor) { return tensor.numel() == 0 ? nullptr : tensor.mutable_data_ptr(); };
  Part<T, W> part = {};
  part.grad_locations = static_cast<C*>(data(op.grad_locations));
  part.grad_weights = static_cast<W*>(data(op.grad_weights));
  part.location_strides = op.location_strides;
  part.weight_strides = op.weight_strides;
  part.grad_location_strides = op.grad_location_strides;
  part.grad_weight_strides = op.grad_weight_strides;
  const int64_t row = op.heads * op.channels;
  part.feature_strides[0] = op.rows * row;
  part.output_strides[0] = op.queries * row;
  part.feature_strides[1] = part.output_strides[1] = op.channels;
  part.feature_strides[2] = part.output_strides[2] = row;
  part.heads = static_cast<int>(op.heads);
  part.points = static_cast<int>(op.points);
  part.cams = static_cast<int>(op.cams);
  part.levels = static_cast<int>(op.levels);
  part.rows = static_cast<int>(op.rows);
  part.channels = static_cast<int>(op.channels);
  part.groups = static_cast<int>(op.groups);
  part.group_channels = static_cast<int>(op.channels / op.groups);
  part.unit_square = op.unit_square;

  // Whole batch elements at a time, or some queries of one.
  const int64_t query_samples = op.heads * op.points * op.cams * op.levels;
  const int64_t query_bytes = query_samples * (4 * sizeof(uint32_t) + sizeof(Record<C>) + 4 * op.groups * sizeof(C));
  const int64_t image_bins = op.cams * op.levels * op.rows;
  const int64_t queries_at_once = std::clamp<int64_t>(
      std::min(WORKSPACE / query_bytes, MOST_SAMPLES / query_samples), 1, op.queries);
  const int64_t batches_at_once = std::clamp<int64_t>(
      std::min({WORKSPACE / (query_bytes * op.queries), MOST_SAMPLES / (query_samples * op.queries),
                INT_MAX / (op.heads * image_bins)}),
      1, op.batch);
  STD_TORCH_CHECK(
      query_samples <= MOST_SAMPLES && op.heads * image_bins < INT_MAX,
      "too large: heads * points * cameras * levels must be at most 2^28, heads * cameras * levels * rows below 2^31");
  for (int64_t batch = 0; batch < op.batch; batch += batches_at_once) {
    const int64_t batches = std::min(batches_at_once, op.batch - batch);
    part.images = static_cast<int>(batches * op.heads);
    part.features = static_cast<const T*>(op.features.const_data_ptr()) + batch * part.feature_strides[0];
    T* grad_features = static_cast<T*>(data(op.grad_features));
    part.grad_features = grad_features == nullptr ? nullptr : grad_features + batch * part.feature_strides[0];
    for (int64_t query = 0; query < op.queries; query += queries_at_once) {
      part.queries = static_cast<int>(std::min(queries_at_once, op.queries - query));
      auto at = [&](auto* pointer, const SampleStrides& strides) {
        return pointer == nullptr ? nullptr : pointer + batch * strides[0] + query * strides[2];
      };
      Part<T, W> here = part;
      here.add = query > 0;
      here.grad_output = static_cast<const T*>(op.grad_output.const_data_ptr()) + batch * part.output_strides[0] +
          query * part.output_strides[2];
      here.locations = at(static_cast<const C*>(op.locations.const_data_ptr()), part.location_strides);
      here.weights = at(static_cast<const W*>(op.weights.const_data_ptr()), part.weight_strides);
      here.grad_locations = at(part.grad_locations, part.grad_location_strides);
      here.grad_weights = at(part.grad_weights, part.grad_weight_strides);
      run_part(op, here, part.images * image_bins, stream);
    }
  }
}

}  // namespace

void deterministic_backward(const SampledOp& op) {
  const cudaStream_t stream = current_stream(op.features.get_device_index());
  dispatch_types(op.features, op.weights, [&](auto* t, auto* w) {
    run<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(w)>>(op, stream);
  });
}

}  // namespace reimplementation::cuda
