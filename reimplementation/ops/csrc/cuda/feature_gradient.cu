// The gradient of the features without atomics: every pixel's gradient has one owner, which adds its terms.
//
// A sample touches four pixels; its *anchor* is the top left one of those inside the level. Levels are cut into *tiles* of
// 4 x 4 pixels. A *team* of lanes that spans the channels, or a slice of them, adds a tile's samples up in shared memory:
//
//          +---+------+      the tile's own samples (anchor in the tile), and those of its neighbours whose
//          | d |  c   |      footprint reaches over the border: anchors in the last column of the tile to the
//          +---+------+      left (b), in the last row of the one above (c), in the corner between (d)
//          | b | tile |
//          +---+------+
//
//   1. one thread per sample writes its key: the tile, and the anchor's place in the tile. Places are numbered such that
//      b, c and d are ranges: within, last column, corner, last row. Counting the samples of each key gives them
//      ranks, and sums over the counts their order; where bits must repeat, samples of a key are ordered by number;
//   2. one thread per tile lists it, with the four ranges. *Crowded* tiles go to a block of several warps, which share the
//      samples out; of others each team takes one of its own;
//   3. teams walk their samples, as many at a time as they have lanes: each lane turns one location into corner weights and
//      pixels of the tile, then all lanes read one sample's row of the output's gradient after the other. Samples with
//      the same anchor come one after the other, and add up in registers; another anchor has its four sums fetched from
//      shared memory, after those of the last one went there.
//
// Traffic: for each sample one row of the output's gradient, mostly from L2, where atomics would move four; and the
// features' gradient is written once, in its own dtype, zeros included. What is left to wait for is shared memory.

#include "feature_gradient.cuh"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <optional>

#include "../common/corners.cuh"
#include "../common/launch.cuh"
#include "order.cuh"

namespace reimplementation::cuda {
namespace {

constexpr int THREADS = 128;  // of the kernels that prepare
constexpr int TILE_WIDTH = 4, TILE_HEIGHT = 4, PIXELS = TILE_WIDTH * TILE_HEIGHT;
constexpr int ELSEWHERE = PIXELS;  // where the sums for pixels of other tiles go, and for those outside the level
constexpr int IN_FLIGHT = 4;       // rows of the output's gradient under way together
constexpr int WARPS_AT_ONCE = 16;  // of step 3 on a multiprocessor, which has registers for so many
constexpr int LEAST_CROWDED = 64;  // samples from which several warps share a tile, if there is too little work for all
constexpr int MOST_CROWDED = 256;  // the same, if there is enough
constexpr int MOST_WARPS = 8;      // that share one
constexpr unsigned MOST_SETTLED = 1u << 19;  // samples: up to here counting the smaller ones ends soon, wherever they fall
constexpr int64_t WORKSPACE = int64_t{1} << 30;  // bytes; larger batches are taken in parts
constexpr unsigned ALL_LANES = 0xffffffffu;

// Channels that a lane takes where there are many.
template <typename T>
constexpr int VECTOR = sizeof(T) == 8 ? 2 : 4;

// Division of numbers below 2^31 by one that the host knows: a multiplication and a shift.
// After Granlund and Montgomery, Division by Invariant Integers using Multiplication (1994).
struct Divisor {
  unsigned divisor, factor, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<unsigned>(d)), shift(ceil_log2(d)) {
    factor = static_cast<unsigned>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  // Leaves the quotient in `number` and returns the remainder.
  __device__ __forceinline__ int split(unsigned& number) const {
    const unsigned whole = number;
    number = (__umulhi(whole, factor) + whole) >> shift;
    return static_cast<int>(whole - number * divisor);
  }
};

// A level's pixels, and the first of its tiles within an image. Levels on the very same pixels share their tiles.
struct alignas(16) Span {
  int start, height, width;
  unsigned first_tile;

  __device__ bool same_pixels(const Span& other) const {
    return start == other.start && height == other.height && width == other.width;
  }
  __device__ bool contains(int row) const {
    return row >= start && row - start < height * width;
  }
  __device__ unsigned tiles_across() const {
    return (width + TILE_WIDTH - 1) / TILE_WIDTH;
  }
  __device__ unsigned tiles() const {
    return tiles_across() * ((height + TILE_HEIGHT - 1) / TILE_HEIGHT);
  }
};

// A tile of an image, and its samples in the order of their keys: its own, and those of the tiles to the left, above, and
// above left that reach over the border.
struct alignas(16) Tile {
  int image, level, x, y;  // the first pixel
  int4 end, shift;         // of the four: the first position behind, and what takes a position to the order of the keys

  __device__ __forceinline__ int samples() const {
    return end.w;
  }
  // The place in the order of the keys of the sample at a position among all of the tile's.
  __device__ __forceinline__ int at(int position) const {
    return position +
        (position < end.x       ? shift.x
             : position < end.y ? shift.y
             : position < end.z ? shift.z
                                : shift.w);
  }
};

// What the kernels find out on the way.
struct Plan {
  unsigned tiles;                           // of an image
  bool overlap;                             // levels share some of their pixels, not all: these have no single owner
  bool gaps;                                // some rows belong to no level
  unsigned light, crowded, very_crowded;    // tiles listed
  unsigned next_light, next_crowded;        // units of work that somebody has taken, beyond each block's first
};

// What the kernels of one part of the batch read and write. An *image* is a batch element's head: it has rows of its own.
template <typename T, typename W>
struct Part {
  const T* grad_output;
  const compute_t<T>* locations;
  const W* weights;
  T* grad_features;
  int64_t location_strides[2], weight_strides[2], feature_strides[2], output_strides[2];  // batch and head
  int location_steps[5], weight_steps[5];         // query, point, camera, level; from x to y, or from group to group
  unsigned feature_row, output_row;               // elements from a row to the next
  Divisor levels, cams, points, queries, heads, group_channels;
  int images, rows, channels;
  unsigned samples;
  int log2_lanes;                 // of a team in step 3
  Divisor slices;                 // what a team holds of the channels is a slice
  bool unit_square, add;          // add to the gradient that an earlier part wrote

  int num_levels;                 // cams * levels
  Span* spans;                    // of the levels
  Plan* plan;
  uint32_t* places;               // by key: how many samples, then how many before; the last is of all keys
  uint32_t* sorted;               // the samples that count, in the order of their keys
  unsigned crowded_from;          // samples from which several warps share a tile
  Tile *light, *crowded;          // lists of tiles; very crowded ones fill theirs from the front, others from the end
  unsigned most_tiles, most_crowded;  // room in these lists

  // From a sample's first weight to that of a channel.
  __device__ __forceinline__ int64_t group_offset(int channel) const {
    unsigned group = channel;
    group_channels.split(group);
    return static_cast<int64_t>(group) * weight_steps[4];
  }
  // From an operand's first element to those of an image.
  __device__ __forceinline__ int64_t image_offset(int image, const int64_t (&strides)[2]) const {
    unsigned batch = image;
    const int head = heads.split(batch);
    return static_cast<int>(batch) * strides[0] + head * strides[1];
  }
};

// A sample's place in the operands.
struct Place {
  int image, query, point, cam, level;

  template <typename T, typename W>
  __device__ __forceinline__ Place(const Part<T, W>& part, unsigned sample) {
    level = part.levels.split(sample);
    cam = part.cams.split(sample);
    point = part.points.split(sample);
    query = part.queries.split(sample);
    image = static_cast<int>(sample);
  }

  // From an image's first element.
  __device__ __forceinline__ int64_t offset(const int (&steps)[5]) const {
    return static_cast<int64_t>(query) * steps[0] + static_cast<int64_t>(point) * steps[1] +
        static_cast<int64_t>(cam) * steps[2] + static_cast<int64_t>(level) * steps[3];
  }
};

// The two axes of a sample's footprint, if it counts at all.
template <typename T>
struct Footprint {
  Axis<T> x, y;
  bool counts = false;

  template <typename P>
  __device__ __forceinline__ Footprint(const P& part, const Place& place, const Span& span) {
    const T* location = part.locations + part.image_offset(place.image, part.location_strides) +
        place.offset(part.location_steps);
    const T location_x = location[0], location_y = location[part.location_steps[4]];
    const T pixel_x = pixel_position(location_x, span.width), pixel_y = pixel_position(location_y, span.height);
    counts = span.height > 0 &&
        (part.unit_square ? inside_unit_square(location_x, location_y)
                          : touches_level(pixel_x, pixel_y, span.width, span.height));
    if (counts) {
      x = bilinear_axis(pixel_x, span.width);
      y = bilinear_axis(pixel_y, span.height);
    }
  }

  __device__ __forceinline__ bool inside(int corner) const {
    return x.slope[corner % 2] != 0 && y.slope[corner / 2] != 0;
  }
};

// The numbers of anchors in a tile: those whose footprints stay within, row by row; the last column, whose footprints reach
// the neighbour to the right; the corner, which reaches all three; the last row, which reaches the one below.
constexpr int LAST_COLUMN = (TILE_WIDTH - 1) * (TILE_HEIGHT - 1);
constexpr int CORNER = LAST_COLUMN + TILE_HEIGHT - 1;

__device__ __forceinline__ int place_in_tile(int x, int y) {
  if (x < TILE_WIDTH - 1) {
    return y < TILE_HEIGHT - 1 ? y * (TILE_WIDTH - 1) + x : CORNER + 1 + x;
  }
  return LAST_COLUMN + y;
}

// The first of an image's tile's keys. Where levels overlap there may be more tiles than keys; then tiles share theirs.
template <typename T, typename W>
__device__ __forceinline__ uint32_t first_key(const Part<T, W>& part, int image, unsigned tile) {
  const unsigned number = image * part.plan->tiles + tile;
  return (number < part.most_tiles ? number : number % part.most_tiles) * PIXELS;
}

// One warp lists the levels and their tiles.
template <typename T, typename W>
__global__ void list_levels(const Part<T, W> part, LevelTable levels) {
  const int lane = threadIdx.x;
  auto span_of = [&](int i) {
    const Level level = i < part.num_levels ? levels[i] : Level{0, 0, 0};
    return Span{level.start, level.height, level.width, 0};
  };
  bool overlap = false;
  unsigned tiles = 0;
  int pixels = 0;
  for (int first = 0; first < part.num_levels; first += WARP) {
    Span span = span_of(first + lane);
    const int end = span.start + span.height * span.width;
    int twin = first + lane;  // the first level with the same pixels
    for (int before = 0; before <= first; before += WARP) {
      const Span theirs = before == first ? span : span_of(before + lane);
      for (int i = 0; i < WARP && before + i < part.num_levels; ++i) {
        const Span other = {
            __shfl_sync(ALL_LANES, theirs.start, i), __shfl_sync(ALL_LANES, theirs.height, i),
            __shfl_sync(ALL_LANES, theirs.width, i), 0};
        if (before + i < twin && span.height > 0 && other.height > 0) {
          if (span.same_pixels(other)) {
            twin = before + i;
          } else {
            overlap |= span.start < other.start + other.height * other.width && other.start < end;
          }
        }
      }
    }
    const bool is_new = twin == first + lane;
    const unsigned own_tiles = is_new ? span.tiles() : 0;
    unsigned last = own_tiles;
    for (int step = 1; step < WARP; step *= 2) {
      const unsigned before = __shfl_up_sync(ALL_LANES, last, step);
      last += lane >= step ? before : 0;
    }
    span.first_tile = tiles + last - own_tiles;
    tiles += __shfl_sync(ALL_LANES, last, WARP - 1);
    pixels += is_new ? span.height * span.width : 0;
    const unsigned twins_here = __shfl_sync(ALL_LANES, span.first_tile, twin % WARP);
    if (!is_new) {
      span.first_tile = twin >= first ? twins_here : part.spans[twin].first_tile;
    }
    if (first + lane < part.num_levels) {
      part.spans[first + lane] = span;
    }
    __syncwarp();
  }
  overlap = __any_sync(ALL_LANES, overlap);
  for (int step = WARP / 2; step > 0; step /= 2) {
    pixels += __shfl_xor_sync(ALL_LANES, pixels, step);
  }
  if (lane == 0) {
    *part.plan = {};
    part.plan->tiles = tiles;
    part.plan->overlap = overlap;
    part.plan->gaps = !overlap && pixels < part.rows;
  }
}

// Step 1: the key of every sample, and its rank among those with the same key, in the order in which they come.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) find_keys(const Part<T, W> part, uint32_t* keys, uint32_t* ranks) {
  const unsigned sample = blockIdx.x * THREADS + threadIdx.x;
  if (sample >= part.samples) {
    return;
  }
  const Place place(part, sample);
  const Span span = part.spans[place.cam * part.levels.divisor + place.level];
  const Footprint<compute_t<T>> footprint(part, place, span);
  uint32_t key = part.most_tiles * PIXELS;  // of samples that count for nothing
  if (footprint.counts) {
    const int x = footprint.x.index[0], y = footprint.y.index[0];
    const unsigned tile = span.first_tile + y / TILE_HEIGHT * span.tiles_across() + x / TILE_WIDTH;
    key = first_key(part, place.image, tile) + place_in_tile(x % TILE_WIDTH, y % TILE_HEIGHT);
    ranks[sample] = atomicAdd(&part.places[key], 1);
  }
  keys[sample] = key;
}

// Puts the samples in the order of their keys; those with the same key in the order in which they were counted.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) order_samples(
    const Part<T, W> part, const uint32_t* keys, const uint32_t* ranks) {
  const unsigned sample = blockIdx.x * THREADS + threadIdx.x;
  if (sample < part.samples && keys[sample] < part.most_tiles * PIXELS) {
    part.sorted[part.places[keys[sample]] + ranks[sample]] = sample;
  }
}

// Puts those with the same key in the order of their numbers: each counts the smaller ones.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) settle_samples(
    const Part<T, W> part, const uint32_t* keys, const uint32_t* ordered) {
  const unsigned sample = blockIdx.x * THREADS + threadIdx.x;
  if (sample >= part.samples || keys[sample] >= part.most_tiles * PIXELS) {
    return;
  }
  const unsigned begin = part.places[keys[sample]], end = part.places[keys[sample] + 1];
  unsigned before = 0;
#pragma unroll 4
  for (unsigned i = begin; i < end; ++i) {
    before += ordered[i] < sample;
  }
  part.sorted[begin + before] = sample;
}

__global__ void __launch_bounds__(THREADS) number_samples(unsigned samples, uint32_t* numbers) {
  const unsigned sample = blockIdx.x * THREADS + threadIdx.x;
  if (sample < samples) {
    numbers[sample] = sample;
  }
}

// Sums over levels that share some of their pixels: pixel by pixel, each looks for its samples in all levels. Slow, and right.
template <typename T, typename W>
__device__ void sum_overlapping(const Part<T, W>& part) {
  using C = compute_t<T>;
  const int slices = (part.channels + WARP - 1) / WARP;
  const uint64_t units = static_cast<uint64_t>(part.images) * part.rows * slices;
  const int lane = threadIdx.x % WARP;
  for (uint64_t unit = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; unit < units;
       unit += gridDim.x * blockDim.x / WARP) {
    const uint64_t pixel = unit / slices;
    const int channel = static_cast<int>(unit - pixel * slices) * WARP + lane;
    const int image = static_cast<int>(pixel / part.rows);
    const int row = static_cast<int>(pixel - static_cast<uint64_t>(image) * part.rows);
    C sum = 0;
    for (int i = 0; i < part.num_levels; ++i) {
      const Span span = part.spans[i];
      int same = 0;
      while (!part.spans[same].same_pixels(span)) {
        ++same;
      }
      if (same < i || !span.contains(row)) {
        continue;
      }
      const int y = (row - span.start) / span.width, x = row - span.start - y * span.width;
      for (int neighbour = 0; neighbour < 4; ++neighbour) {
        const int left = neighbour % 2, up = neighbour / 2;
        if ((left && (x % TILE_WIDTH != 0 || x == 0)) || (up && (y % TILE_HEIGHT != 0 || y == 0))) {
          continue;
        }
        const unsigned tile = span.first_tile + (y / TILE_HEIGHT - up) * span.tiles_across() + x / TILE_WIDTH - left;
        const uint32_t key = first_key(part, image, tile);
        for (unsigned j = part.places[key]; j < part.places[key + PIXELS]; ++j) {
          const Place place(part, part.sorted[j]);
          const Footprint<C> footprint(part, place, span);
          // Tiles of overlapping levels may share their keys.
          if (place.image != image || !footprint.counts ||
              !part.spans[place.cam * part.levels.divisor + place.level].same_pixels(span)) {
            continue;
          }
          const Four<C> weights = corner_weights(footprint.x, footprint.y);
          for (int corner = 0; corner < 4; ++corner) {
            if (footprint.inside(corner) && footprint.x.index[corner % 2] == x &&
                footprint.y.index[corner / 2] == y && channel < part.channels) {
              const W weight = part.weights
                  [part.image_offset(image, part.weight_strides) + place.offset(part.weight_steps) +
                   part.group_offset(channel)];
              const T gradient = part.grad_output
                  [part.image_offset(image, part.output_strides) + static_cast<int64_t>(place.query) * part.output_row +
                   channel];
              sum += weights[corner] * to_compute(weight) * to_compute(gradient);
            }
          }
        }
      }
    }
    if (channel < part.channels) {
      T& gradient = part.grad_features
          [part.image_offset(image, part.feature_strides) + static_cast<int64_t>(row) * part.feature_row + channel];
      gradient = from_compute<T>(sum + (part.add ? to_compute(gradient) : C(0)));
    }
  }
}

// Rows that belong to no level.
template <typename T, typename W>
__device__ void zero_gaps(const Part<T, W>& part) {
  const uint64_t pixels = static_cast<uint64_t>(part.images) * part.rows;
  for (uint64_t pixel = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; pixel < pixels;
       pixel += gridDim.x * blockDim.x / WARP) {
    const int image = static_cast<int>(pixel / part.rows);
    const int row = static_cast<int>(pixel - static_cast<uint64_t>(image) * part.rows);
    bool covered = part.add;
    for (int i = 0; i < part.num_levels && !covered; ++i) {
      covered = part.spans[i].height > 0 && part.spans[i].contains(row);
    }
    T* gradient = part.grad_features + part.image_offset(image, part.feature_strides) +
        static_cast<int64_t>(row) * part.feature_row;
    for (int channel = threadIdx.x % WARP; !covered && channel < part.channels; channel += WARP) {
      gradient[channel] = from_compute<T>(0);
    }
  }
}

// Step 2. Where tiles cannot be used, and for rows outside of them, this kernel writes the gradient.
template <typename T, typename W>
__global__ void __launch_bounds__(THREADS) list_tiles(const __grid_constant__ Part<T, W> part) {
  Plan& plan = *part.plan;
  if (plan.overlap) {
    return sum_overlapping(part);
  }
  if (plan.gaps) {
    zero_gaps(part);
  }
  const unsigned number = blockIdx.x * THREADS + threadIdx.x;
  if (number >= part.images * plan.tiles) {
    return;
  }
  Tile tile;
  tile.image = static_cast<int>(number / plan.tiles);
  unsigned in_level = number - tile.image * plan.tiles;
  tile.level = 0;
  while (in_level - part.spans[tile.level].first_tile >= part.spans[tile.level].tiles()) {
    ++tile.level;
  }
  const Span span = part.spans[tile.level];
  in_level -= span.first_tile;
  const unsigned across = span.tiles_across();
  const unsigned row = in_level / across;
  tile.x = static_cast<int>(in_level - row * across) * TILE_WIDTH;
  tile.y = static_cast<int>(row) * TILE_HEIGHT;
  const uint32_t* places = part.places + static_cast<int64_t>(number) * PIXELS;
  const uint32_t *left = places - PIXELS, *above = places - static_cast<int64_t>(across) * PIXELS;
  int samples = 0;
  auto add = [&](int& end, int& shift, bool exists, const uint32_t* from, const uint32_t* to) {
    const int first = exists ? *from : 0;
    shift = first - samples;
    samples += exists ? *to - first : 0;
    end = samples;
  };
  add(tile.end.x, tile.shift.x, true, places, places + PIXELS);
  add(tile.end.y, tile.shift.y, tile.x > 0, left + LAST_COLUMN, left + CORNER + 1);
  add(tile.end.z, tile.shift.z, tile.y > 0, above + CORNER, above + PIXELS);
  add(tile.end.w, tile.shift.w, tile.x > 0 && tile.y > 0, above - PIXELS + CORNER, above - PIXELS + CORNER + 1);
  if (samples < part.crowded_from) {
    part.light[atomicAdd(&plan.light, 1)] = tile;
  } else if (samples < part.crowded_from * MOST_WARPS) {
    part.crowded[part.most_crowded - 1 - atomicAdd(&plan.crowded, 1)] = tile;
  } else {
    part.crowded[atomicAdd(&plan.very_crowded, 1)] = tile;
  }
}

// A warp's part of step 3's shared memory. A lane holds VEC neighbouring channels.
template <typename T, int VEC, bool ONE_GROUP>
struct Sums {
  Vector<T, VEC> pixels[PIXELS + 1][WARP];  // the last for what lies elsewhere
  // Samples that the lanes have prepared, and the next ones.
  Four<T> corner_weights[2][WARP];
  unsigned corner_pixels[2][WARP];  // four pixels of the tile, a byte each
  int queries[2][WARP];
  int64_t weights[2][ONE_GROUP ? 2 : WARP];
};

constexpr unsigned ALL_ELSEWHERE = ELSEWHERE * 0x01010101u;

// A team adds samples first, ..., end - 1 of a tile to its sums; no team of the warp has more than `most`. Each lane prepares
// one sample at a time; while a team adds these, the next ones' operands and the output's gradients are on their way.
template <typename T, typename W, int VEC, bool ONE_GROUP>
__device__ __forceinline__ void add_samples(
    const Part<T, W>& part,
    const Tile& tile,
    int first,
    int end,
    int most,
    int channel,
    Sums<compute_t<T>, VEC, ONE_GROUP>& sums) {
  using C = compute_t<T>;
  const int lane = threadIdx.x % WARP;
  const int lanes = 1 << part.log2_lanes;
  const int in_team = lane & (lanes - 1), first_lane = lane - in_team;
  const int width = part.spans[tile.level].width, height = part.spans[tile.level].height;
  const C* const locations = part.locations + part.image_offset(tile.image, part.location_strides);
  const T* const output = part.grad_output + part.image_offset(tile.image, part.output_strides) + channel;
  const W* const weights = part.weights + part.image_offset(tile.image, part.weight_strides) +
      part.group_offset(channel);

  // A lane's next sample: `begin` loads what `finish` needs later. Where a team has no more, it reads its last one again,
  // and where it has none, that of number 0.
  C location_x, location_y;
  W weight;
  auto sample_at = [&](int step) {
    return end > 0 ? part.sorted[tile.at(min(first + step + in_team, end - 1))] : 0;
  };
  auto begin = [&](int buffer, unsigned sample) {
    const Place place(part, sample);
    const C* location = locations + place.offset(part.location_steps);
    location_x = location[0];
    location_y = location[part.location_steps[4]];
    const int64_t offset = place.offset(part.weight_steps);
    sums.queries[buffer][lane] = place.query;
    if (ONE_GROUP) {
      weight = weights[offset];
    } else {
      sums.weights[buffer][lane] = offset;
    }
  };
  auto finish = [&](int buffer, bool exists) {
    const auto x = bilinear_axis(pixel_position(location_x, width), width);
    const auto y = bilinear_axis(pixel_position(location_y, height), height);
    Four<C> corners = corner_weights(x, y);
    unsigned in_row[2], row[2];
    bool column_here[2], row_here[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      in_row[i] = x.index[i] - tile.x;
      row[i] = y.index[i] - tile.y;
      column_here[i] = x.slope[i] != 0 && in_row[i] < TILE_WIDTH;
      row_here[i] = exists && y.slope[i] != 0 && row[i] < TILE_HEIGHT;
    }
    unsigned pixels = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (ONE_GROUP) {
        corners[corner] *= to_compute(weight);
      }
      const bool here = column_here[corner % 2] && row_here[corner / 2];
      pixels |= (here ? row[corner / 2] * TILE_WIDTH + in_row[corner % 2] : ELSEWHERE) << 8 * corner;
    }
    sums.corner_weights[buffer][lane] = corners;
    sums.corner_pixels[buffer][lane] = pixels;
  };
  Vector<T, VEC> loaded[IN_FLIGHT];
  W loaded_weights[ONE_GROUP ? 1 : IN_FLIGHT];
  auto load = [&](int buffer, int i) {
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j) {
      const uint64_t query = static_cast<unsigned>(sums.queries[buffer][first_lane + i + j]);
      loaded[j] = load_vector<VEC>(output + query * part.output_row);
      if (!ONE_GROUP) {
        loaded_weights[j] = weights[sums.weights[buffer][first_lane + i + j]];
      }
    }
  };
  // The sums of the four pixels that the last sample touched: the next one touches the same four, as often as not.
  unsigned current = ALL_ELSEWHERE;
  Vector<C, VEC> run[4] = {};
  auto pixel = [&](int corner) -> Vector<C, VEC>& { return sums.pixels[current >> 8 * corner & 0xff][lane]; };
  auto put_down = [&] {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      pixel(corner) = run[corner];
    }
  };
  auto take_up = [&](unsigned pixels) {
    current = pixels;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      run[corner] = pixel(corner);
    }
  };

  begin(0, sample_at(0));
  unsigned next_sample = most > lanes ? sample_at(lanes) : 0;
  finish(0, first + in_team < end);
  __syncwarp();
  load(0, 0);
  int buffer = 0;
  for (int step = 0; step < most; step += lanes) {
    const bool more = step + lanes < most;
    if (more) {
      begin(buffer ^ 1, next_sample);
      if (step + 2 * lanes < most) {
        next_sample = sample_at(step + 2 * lanes);
      }
      __syncwarp();
    }
    const int count = min(lanes, most - step);
    for (int i = 0; i < count; i += IN_FLIGHT) {
      C terms[IN_FLIGHT][VEC];
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; ++j) {
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          terms[j][v] = ONE_GROUP ? loaded[j][v] : loaded[j][v] * to_compute(loaded_weights[ONE_GROUP ? 0 : j]);
        }
      }
      if (i + IN_FLIGHT < count) {
        load(buffer, i + IN_FLIGHT);
      } else if (more) {
        load(buffer ^ 1, 0);
      }
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; ++j) {
        const unsigned pixels = sums.corner_pixels[buffer][first_lane + i + j];
        if (pixels != current) {
          put_down();
          take_up(pixels);
        }
        const Four<C> corners = sums.corner_weights[buffer][first_lane + i + j];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            run[corner].values[v] += corners[corner] * terms[j][v];
          }
        }
      }
    }
    buffer ^= 1;
    if (more) {
      finish(buffer, first + step + lanes + in_team < end);
    }
    __syncwarp();
  }
  put_down();
}

// Step 3. A block takes units as it gets to them: of crowded tiles one, which its teams share, of others one a team; and a
// slice of the channels.
template <typename T, typename W, int VEC, bool ONE_GROUP>
__global__ void __launch_bounds__(MOST_WARPS * WARP, WARPS_AT_ONCE / MOST_WARPS)
    sum_tiles(const __grid_constant__ Part<T, W> part, bool crowded) {
  using C = compute_t<T>;
  extern __shared__ __align__(32) char memory[];
  auto* const sums = reinterpret_cast<Sums<C, VEC, ONE_GROUP>*>(memory);
  __shared__ unsigned taken;
  Plan& plan = *part.plan;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int in_team = lane & ((1 << part.log2_lanes) - 1);
  const int block_team = threadIdx.x >> part.log2_lanes, block_teams = blockDim.x >> part.log2_lanes;
  // Of a tile, and how many tiles the block works on.
  const int team = crowded ? block_team : 0, teams = crowded ? block_teams : 1, at_once = crowded ? 1 : block_teams;
  const unsigned tiles = plan.overlap ? 0 : crowded ? plan.very_crowded + plan.crowded : plan.light;
  const unsigned units = (tiles + at_once - 1) / at_once * part.slices.divisor;
  for (unsigned unit = blockIdx.x; unit < units;) {
    unsigned next = 0;
    if (threadIdx.x == 0) {
      next = gridDim.x + atomicAdd(crowded ? &plan.next_crowded : &plan.next_light, 1);
    }
    unsigned first_entry = unit;
    const int slice = part.slices.split(first_entry);
    const int channel = ((slice << part.log2_lanes) + in_team) * VEC;
    const unsigned entry = min(first_entry * at_once + (crowded ? 0 : block_team), tiles - 1);
    const bool exists = crowded || first_entry * at_once + block_team < tiles;
    const Tile tile = crowded
        ? part.crowded[entry < plan.very_crowded ? entry : part.most_crowded - 1 - (entry - plan.very_crowded)]
        : part.light[entry];
    const int samples = tile.samples();
    const int share = crowded ? (samples + teams - 1) / teams : samples;
    int most = share;  // of the warp's teams
    for (int step = WARP / 2; !crowded && step > 0; step /= 2) {
      most = max(most, __shfl_xor_sync(ALL_LANES, most, step));
    }
    if (most > 0) {
#pragma unroll
      for (int pixel = 0; pixel < PIXELS; ++pixel) {
        sums[warp].pixels[pixel][lane] = {};
      }
      add_samples(
          part, tile, share * team, min(share * (team + 1), samples), most, min(channel, part.channels - VEC), sums[warp]);
    }
    __syncthreads();
    if (exists && channel < part.channels && (samples > 0 || !part.add)) {
      const Span span = part.spans[tile.level];
      T* const gradients = part.grad_features + part.image_offset(tile.image, part.feature_strides) + channel;
#pragma unroll 2
      for (int pixel = team; pixel < PIXELS; pixel += teams) {
        const int x = tile.x + pixel % TILE_WIDTH, y = tile.y + pixel / TILE_WIDTH;
        if (x >= span.width || y >= span.height) {
          continue;
        }
        T* gradient = gradients + static_cast<int64_t>(span.start + y * span.width + x) * part.feature_row;
        Vector<C, VEC> total = {};
        for (int t = 0; t < teams && samples > 0; ++t) {
          const int thread = crowded ? (t << part.log2_lanes) + in_team : threadIdx.x;
          const Vector<C, VEC> term = sums[thread / WARP].pixels[pixel][thread % WARP];
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            total.values[v] += term[v];
          }
        }
        Vector<T, VEC> rounded;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          rounded.values[v] = from_compute<T>(total[v] + (part.add ? to_compute(gradient[v]) : C(0)));
        }
        *reinterpret_cast<Vector<T, VEC>*>(gradient) = rounded;
      }
    }
    if (threadIdx.x == 0) {
      taken = next;
    }
    __syncthreads();
    unit = taken;
  }
}

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + THREADS - 1) / THREADS);
}

template <int VEC, bool ONE_GROUP, typename T, typename W>
void launch_sums(Part<T, W> part, int device, cudaStream_t stream) {
  using C = compute_t<T>;
  const auto kernel = sum_tiles<T, W, VEC, ONE_GROUP>;
  constexpr int warp_bytes = sizeof(Sums<C, VEC, ONE_GROUP>);
  part.log2_lanes = std::clamp(ceil_log2((part.channels + VEC - 1) / VEC), ceil_log2(IN_FLIGHT), ceil_log2(WARP));
  const int team_channels = VEC << part.log2_lanes;
  part.slices = Divisor((part.channels + team_channels - 1) / team_channels);
  int multiprocessors = 0, most_bytes = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int warps = std::clamp((most_bytes - 1024) / warp_bytes, 2, MOST_WARPS);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, warps * warp_bytes);
  kernel<<<multiprocessors * WARPS_AT_ONCE / warps, warps * WARP, warps * warp_bytes, stream>>>(part, true);
  check_launch("sum_tiles of the crowded");
  kernel<<<multiprocessors * WARPS_AT_ONCE, WARP, warp_bytes, stream>>>(part, false);
  check_launch("sum_tiles");
}

// Launches all steps for one part of the batch. `samples` has room for four words a sample, three if not deterministic.
template <typename T, typename W>
void run_part(
    const SampledOp& op, const Part<T, W>& part, bool vectors, bool deterministic, uint32_t* samples, Scratch scratch,
    int device, cudaStream_t stream) {
  const int64_t keys = static_cast<int64_t>(part.most_tiles) * PIXELS + 1;  // one more, for samples that count for nothing
  const Pairs found = {samples, samples + part.samples};
  const Pairs spare = {samples + 2 * int64_t{part.samples}, samples + 3 * int64_t{part.samples}};
  Part<T, W> ordered = part;

  cudaMemsetAsync(part.places, 0, keys * sizeof(uint32_t), stream);
  list_levels<<<1, WARP, 0, stream>>>(part, op.level_table);
  check_launch("list_levels");
  find_keys<<<blocks_for(part.samples), THREADS, 0, stream>>>(part, found.keys, found.values);
  check_launch("find_keys");
  sum_before(part.places, keys, scratch, stream);
  if (deterministic && part.samples > MOST_SETTLED) {
    number_samples<<<blocks_for(part.samples), THREADS, 0, stream>>>(part.samples, found.values);
    check_launch("number_samples");
    ordered.sorted = sort_pairs(found, spare, part.samples, ceil_log2(keys), scratch, stream).values;
  } else {
    ordered.sorted = spare.keys;
    order_samples<<<blocks_for(part.samples), THREADS, 0, stream>>>(ordered, found.keys, found.values);
    check_launch("order_samples");
  }
  if (deterministic && part.samples <= MOST_SETTLED) {
    ordered.sorted = spare.values;
    settle_samples<<<blocks_for(part.samples), THREADS, 0, stream>>>(ordered, found.keys, spare.keys);
    check_launch("settle_samples");
  }
  list_tiles<<<blocks_for(part.most_tiles), THREADS, 0, stream>>>(ordered);
  check_launch("list_tiles");
  if (vectors && op.groups == 1) {
    launch_sums<VECTOR<T>, true>(ordered, device, stream);
  } else if (vectors) {
    launch_sums<VECTOR<T>, false>(ordered, device, stream);
  } else {
    launch_sums<1, false>(ordered, device, stream);
  }
}

template <typename T, typename W>
Tensor run(
    const SampledOp& op,
    const Tensor& grad_output,
    const Tensor& grad_features,
    bool deterministic,
    cudaStream_t main,
    const SideStream* side) {
  const int64_t row = op.heads * op.channels;
  const int64_t query_samples = op.heads * op.points * op.cams * op.levels;
  const int64_t image_tiles = op.rows / TILE_HEIGHT + op.cams * op.levels;  // at most: a level has pixels / 4 + 1, or fewer
  Part<T, W> part = {};
  for (int i = 0; i < 2; ++i) {
    part.location_strides[i] = op.location_strides[i];
    part.weight_strides[i] = op.weight_strides[i];
  }
  for (int i = 0; i < 5; ++i) {
    part.location_steps[i] = static_cast<int>(op.location_strides[2 + i]);
    part.weight_steps[i] = static_cast<int>(op.weight_strides[2 + i]);
  }
  part.feature_strides[0] = op.rows * row;
  part.output_strides[0] = op.queries * row;
  part.feature_strides[1] = part.output_strides[1] = op.channels;
  part.feature_row = part.output_row = static_cast<unsigned>(row);
  part.levels = Divisor(op.levels);
  part.cams = Divisor(op.cams);
  part.points = Divisor(op.points);
  part.heads = Divisor(op.heads);
  part.group_channels = Divisor(op.channels / op.groups);
  part.rows = static_cast<int>(op.rows);
  part.num_levels = static_cast<int>(op.cams * op.levels);
  part.channels = static_cast<int>(op.channels);
  part.unit_square = op.unit_square;
  auto on_boundary = [](const Tensor& tensor) {
    return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (VECTOR<T> * sizeof(T)) == 0;
  };
  const bool vectors =
      op.channels / op.groups % VECTOR<T> == 0 && on_boundary(grad_output) && on_boundary(grad_features);

  // Whole batch elements at a time, or some queries of one: as many as memory and 32 bits for a key allow.
  constexpr int64_t most_samples = WORKSPACE / (4 * sizeof(uint32_t)), most_keys = UINT_MAX - 1;
  const int64_t batch_keys = op.heads * image_tiles * PIXELS;
  const int64_t batch_units = op.heads * image_tiles * ((op.channels + WARP - 1) / WARP);
  STD_TORCH_CHECK(
      query_samples <= most_samples && batch_keys < most_keys && row <= UINT_MAX && batch_units < INT_MAX,
      "too large: heads * points * cameras * levels must be at most 2^26, heads * rows and heads * channels below 2^30");
  const int64_t queries_at_once = std::clamp<int64_t>(most_samples / query_samples, 1, op.queries);
  const int64_t batches_at_once = std::clamp<int64_t>(
      std::min(
          {most_samples / (query_samples * op.queries), WORKSPACE / (batch_keys * int64_t{sizeof(uint32_t)}),
           INT_MAX / batch_units}),
      1, op.batch);
  const int64_t samples_at_once = batches_at_once * queries_at_once * query_samples;
  const int64_t tiles_at_once = batches_at_once * op.heads * image_tiles;
  const int64_t keys_at_once = tiles_at_once * PIXELS + 1;

  const int device = op.locations.get_device_index();
  int multiprocessors = 0;
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  part.crowded_from = static_cast<unsigned>(std::clamp<int64_t>(
      samples_at_once / (multiprocessors * WARPS_AT_ONCE * 2), LEAST_CROWDED, MOST_CROWDED));
  // A tile may have each of its samples to itself, and those of three neighbours.
  part.most_crowded = static_cast<unsigned>(std::min(tiles_at_once, 4 * samples_at_once / part.crowded_from));

  // One piece of memory for everything in between, all parts after each other; what fills it, as PyTorch does on request,
  // comes before the side stream begins.
  int64_t bytes = 0;
  auto reserve = [&](int64_t size) {
    const int64_t at = bytes;
    bytes += (size + 255) / 256 * 256;
    return at;
  };
  const int64_t scratch_bytes = std::max(
      sum_before_bytes(keys_at_once), deterministic ? sort_pairs_bytes(samples_at_once, ceil_log2(keys_at_once)) : 0);
  const int64_t samples_at = reserve(samples_at_once * (deterministic ? 4 : 3) * sizeof(uint32_t));
  const int64_t places_at = reserve(keys_at_once * sizeof(uint32_t));
  const int64_t light_at = reserve(tiles_at_once * sizeof(Tile));
  const int64_t crowded_at = reserve(part.most_crowded * sizeof(Tile));
  const int64_t spans_at = reserve(part.num_levels * sizeof(Span));
  const int64_t plan_at = reserve(sizeof(Plan));
  const int64_t scratch_at = reserve(scratch_bytes);
  const Tensor memory = torch::stable::new_empty(op.locations, {bytes}, ScalarType::Byte);
  char* const first = static_cast<char*>(memory.mutable_data_ptr());
  part.places = reinterpret_cast<uint32_t*>(first + places_at);
  part.light = reinterpret_cast<Tile*>(first + light_at);
  part.crowded = reinterpret_cast<Tile*>(first + crowded_at);
  part.spans = reinterpret_cast<Span*>(first + spans_at);
  part.plan = reinterpret_cast<Plan*>(first + plan_at);
  const Scratch scratch = {first + scratch_at, static_cast<size_t>(scratch_bytes)};
  const cudaStream_t stream = side == nullptr ? main : side->follow();

  for (int64_t batch = 0; batch < op.batch; batch += batches_at_once) {
    part.images = static_cast<int>(std::min(batches_at_once, op.batch - batch) * op.heads);
    part.most_tiles = static_cast<unsigned>(part.images * image_tiles);
    part.grad_features = static_cast<T*>(grad_features.mutable_data_ptr()) + batch * part.feature_strides[0];
    for (int64_t query = 0; query < op.queries; query += queries_at_once) {
      const int64_t queries = std::min(queries_at_once, op.queries - query);
      part.queries = Divisor(queries);
      part.samples = static_cast<unsigned>(part.images / op.heads * queries * query_samples);
      part.add = query > 0;
      part.grad_output = static_cast<const T*>(grad_output.const_data_ptr()) + batch * part.output_strides[0] +
          query * row;
      part.locations = static_cast<const compute_t<T>*>(op.locations.const_data_ptr()) +
          batch * op.location_strides[0] + query * op.location_strides[2];
      part.weights = static_cast<const W*>(op.weights.const_data_ptr()) + batch * op.weight_strides[0] +
          query * op.weight_strides[2];
      run_part(
          op, part, vectors, deterministic, reinterpret_cast<uint32_t*>(first + samples_at), scratch, device, stream);
    }
  }
  return memory;
}

}  // namespace

Tensor feature_gradient(
    const SampledOp& op,
    const Tensor& grad_output,
    const Tensor& grad_features,
    bool deterministic,
    cudaStream_t main,
    const SideStream* side) {
  std::optional<Tensor> memory;
  dispatch_types(grad_features, op.weights, [&](auto* t, auto* w) {
    memory = run<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(w)>>(
        op, grad_output, grad_features, deterministic, main, side);
  });
  return *memory;
}

}  // namespace reimplementation::cuda
