// Which samples each tile of a level's pixels takes its gradient from: steps 1 and 2 of feature_gradient.cu, whose head has
// the terms; and step 3 where there are no tiles. Everything here is found out on the device, from level shapes that the
// host need not know.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/corners.cuh"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "feature_gradient/division.h"
#include "shared/levels.h"

namespace reimplementation::feature_gradient {

using namespace cuda;

constexpr int THREADS = 128;   // of the kernels here
constexpr int MOST_WARPS = 8;  // that share a crowded tile

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
    return position + (position < end.x ? shift.x : position < end.y ? shift.y : position < end.z ? shift.z : shift.w);
  }
};

// What the kernels find out on the way.
struct Findings {
  unsigned tiles;                         // of an image
  bool overlap;                           // levels share some of their pixels, not all: these have no single owner
  bool gaps;                              // some rows belong to no level
  unsigned light, crowded, very_crowded;  // tiles listed
  unsigned next_light, next_crowded;      // units of work that somebody has taken, beyond each block's first
};

// What the kernels of one part of the batch read and write; `Weights` is what weights.cuh says. An *image* is a batch element's head: it has rows of its own.
template <typename T, typename Weights>
struct Part {
  const T* grad_output;
  const compute_t<T>* locations;
  Weights weights;
  T* grad_features;
  int64_t location_strides[2], feature_strides[2], output_strides[2];  // batch and head
  int location_steps[5];                                               // query, point, camera, level; from x to y
  unsigned feature_row, output_row;                                    // elements from a row to the next
  Divisor levels, cams, points, queries, heads, group_channels;
  int images, rows, channels;
  unsigned samples;
  int log2_lanes;         // of a team in step 3
  Divisor slices;         // what a team holds of the channels is a slice
  bool unit_square, add;  // add to the gradient that an earlier part wrote

  int num_levels;  // cams * levels
  Span* spans;     // of the levels
  Findings* found;
  uint32_t* places;       // by key: how many samples, then how many before; the last is of all keys
  uint32_t* sorted;       // the samples that count, in the order of their keys
  unsigned crowded_from;  // samples from which several warps share a tile
  Tile *light, *crowded;  // lists of tiles; very crowded ones fill theirs from the front, others from the end
  unsigned most_tiles, most_crowded;  // room in these lists

  // Those of an image, for the group that a channel is in.
  __device__ __forceinline__ auto weights_of(int image, int channel) const {
    unsigned batch = image, group = channel;
    const int head = heads.split(batch);
    group_channels.split(group);
    return weights.of_group(static_cast<int>(batch), head, static_cast<int>(group));
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

  template <typename T, typename Weights>
  __device__ __forceinline__ Place(const Part<T, Weights>& part, unsigned sample) {
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
    const T* location =
        part.locations + part.image_offset(place.image, part.location_strides) + place.offset(part.location_steps);
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
template <typename T, typename Weights>
__device__ __forceinline__ uint32_t first_key(const Part<T, Weights>& part, int image, unsigned tile) {
  const unsigned number = image * part.found->tiles + tile;
  return (number < part.most_tiles ? number : number % part.most_tiles) * PIXELS;
}

// A warp lists the levels and their tiles.
template <typename T, typename Weights>
__device__ void list_levels(const Part<T, Weights>& part, const LevelTable& levels) {
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
    const unsigned last = sum_up_to_lane(own_tiles);
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
    *part.found = {};
    part.found->tiles = tiles;
    part.found->overlap = overlap;
    part.found->gaps = !overlap && pixels < part.rows;
  }
}

// Before step 1: a warp lists the levels, and all blocks but its own set the counts of the samples of each key to zero.
template <typename T, typename Weights>
__global__ void __launch_bounds__(THREADS)
    prepare(const __grid_constant__ Part<T, Weights> part, LevelTable levels, int64_t keys) {
  if (blockIdx.x == 0 && threadIdx.x < WARP) {
    list_levels(part, levels);
  }
  if (blockIdx.x > 0) {
    for (int64_t key = int64_t{blockIdx.x - 1} * THREADS + threadIdx.x; key < keys;
         key += int64_t{gridDim.x - 1} * THREADS) {
      part.places[key] = 0;
    }
  }
}

// Step 1: the key of every sample, and its rank among those with the same key, in the order in which they come.
template <typename T, typename Weights>
__global__ void __launch_bounds__(THREADS) find_keys(const Part<T, Weights> part, uint32_t* keys, uint32_t* ranks) {
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
template <typename T, typename Weights>
__global__ void __launch_bounds__(THREADS)
    order_samples(const Part<T, Weights> part, const uint32_t* keys, const uint32_t* ranks) {
  const unsigned sample = blockIdx.x * THREADS + threadIdx.x;
  if (sample < part.samples && keys[sample] < part.most_tiles * PIXELS) {
    part.sorted[part.places[keys[sample]] + ranks[sample]] = sample;
  }
}

constexpr int CHUNK = 1024;  // samples that one block settles

// The samples with the key of one of them, as places in the order.
struct Range {
  unsigned begin, end;

  template <typename T, typename Weights>
  __device__ Range(const Part<T, Weights>& part, uint32_t key) : begin(part.places[key]),
                                                                 end(part.places[key + 1]) {}
  // Of those in a chunk.
  __device__ unsigned begin_in(unsigned chunk) const {
    return max(begin, chunk * CHUNK);
  }
  __device__ unsigned end_in(unsigned chunk) const {
    return min(end, (chunk + 1) * CHUNK);
  }
  __device__ bool is_in(unsigned chunk) const {
    return begin_in(chunk) == begin && end_in(chunk) == end;
  }
};

// How many of some samples are before a number; a block's threads read much the same ones.
__device__ __forceinline__ unsigned count_before(
    const uint32_t* samples, unsigned begin, unsigned end, uint32_t number) {
  unsigned before = 0, i = begin;
  for (; i < end && i % 4 != 0; ++i) {
    before += samples[i] < number;
  }
  for (; i + 4 <= end; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(samples + i);
    before += (four.x < number) + (four.y < number) + (four.z < number) + (four.w < number);
  }
  for (; i < end; ++i) {
    before += samples[i] < number;
  }
  return before;
}

// Puts samples with the same key in the order of their numbers: each counts the smaller ones. Where such a range reaches
// over the border of a chunk, each chunk's part of it becomes a run for `settle_runs`; without `runs`, where samples are
// few, it is settled here all the same.
template <typename T, typename Weights>
__global__ void __launch_bounds__(CHUNK)
    settle_chunks(const Part<T, Weights> part, const uint32_t* keys, const uint32_t* ordered, uint32_t* runs) {
  __shared__ __align__(16) uint32_t numbers[CHUNK];
  const unsigned samples = part.places[part.most_tiles * PIXELS];  // that count for something
  const unsigned first = blockIdx.x * CHUNK;
  for (unsigned i = threadIdx.x; i < CHUNK && first + i < samples; i += blockDim.x) {
    numbers[i] = ordered[first + i];
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < CHUNK && first + i < samples; i += blockDim.x) {
    const uint32_t number = numbers[i];
    const Range range(part, keys[number]);
    const bool whole = range.is_in(blockIdx.x);
    if (whole || runs != nullptr) {
      const unsigned begin = range.begin_in(blockIdx.x);
      const unsigned place = begin + count_before(numbers, begin - first, range.end_in(blockIdx.x) - first, number);
      (whole ? part.sorted : runs)[place] = number;
    } else {
      part.sorted[range.begin + count_before(ordered, range.begin, range.end, number)] = number;
    }
  }
}

// The same where they are in order.
__device__ __forceinline__ unsigned rank_in_run(
    const uint32_t* samples, unsigned begin, unsigned end, uint32_t number) {
  unsigned low = begin, high = end;
  while (low < high) {
    const unsigned middle = low + (high - low) / 2;
    if (samples[middle] < number) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low - begin;
}

// Merges the runs of each range: a sample's place is how many are smaller in its own run and in the others.
template <typename T, typename Weights>
__global__ void __launch_bounds__(THREADS)
    settle_runs(const Part<T, Weights> part, const uint32_t* keys, const uint32_t* ordered, const uint32_t* runs) {
  const unsigned samples = part.places[part.most_tiles * PIXELS];
  const unsigned chunk = blockIdx.x, first = chunk * CHUNK, end = min(first + CHUNK, samples);
  if (first >= samples) {
    return;
  }
  const Range head(part, keys[ordered[first]]), tail(part, keys[ordered[end - 1]]);
  for (unsigned i = first + threadIdx.x; i < end; i += blockDim.x) {
    const Range& range = i < head.end ? head : tail;
    if (i < range.begin || range.is_in(chunk)) {
      continue;
    }
    const uint32_t number = runs[i];
    unsigned place = range.begin + (i - range.begin_in(chunk));
    for (unsigned other = range.begin / CHUNK; other * CHUNK < range.end; ++other) {
      if (other != chunk) {
        place += rank_in_run(runs, range.begin_in(other), range.end_in(other), number);
      }
    }
    part.sorted[place] = number;
  }
}

// Sums over levels that share some of their pixels: pixel by pixel, each looks for its samples in all levels. Slow, and right.
template <typename T, typename Weights>
__device__ void sum_overlapping(const Part<T, Weights>& part) {
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
            if (footprint.inside(corner) && footprint.x.index[corner % 2] == x && footprint.y.index[corner / 2] == y &&
                channel < part.channels) {
              const auto weight = part.weights_of(image, channel).load(part.weights.key(place), place.query, 0);
              const T gradient = part.grad_output
                                     [part.image_offset(image, part.output_strides) +
                                      static_cast<int64_t>(place.query) * part.output_row + channel];
              sum += weights[corner] * to_compute(weight) * to_compute(gradient);
            }
          }
        }
      }
    }
    if (channel < part.channels) {
      T& gradient =
          part.grad_features
              [part.image_offset(image, part.feature_strides) + static_cast<int64_t>(row) * part.feature_row + channel];
      gradient = from_compute<T>(sum + (part.add ? to_compute(gradient) : C(0)));
    }
  }
}

// Rows that belong to no level.
template <typename T, typename Weights>
__device__ void zero_gaps(const Part<T, Weights>& part) {
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

// Step 3 for what is not tiles' own.
template <typename T, typename Weights>
__global__ void __launch_bounds__(THREADS) sum_rest(const __grid_constant__ Part<T, Weights> part) {
  if (part.found->overlap) {
    sum_overlapping(part);
  } else if (part.found->gaps) {
    zero_gaps(part);
  }
}

// Step 2.
template <typename T, typename Weights>
__global__ void __launch_bounds__(THREADS) list_tiles(const __grid_constant__ Part<T, Weights> part) {
  Findings& found = *part.found;
  const unsigned number = blockIdx.x * THREADS + threadIdx.x;
  if (found.overlap || number >= part.images * found.tiles) {
    return;
  }
  Tile tile;
  tile.image = static_cast<int>(number / found.tiles);
  unsigned in_level = number - tile.image * found.tiles;
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
    part.light[atomicAdd(&found.light, 1)] = tile;
  } else if (samples < part.crowded_from * MOST_WARPS) {
    part.crowded[part.most_crowded - 1 - atomicAdd(&found.crowded, 1)] = tile;
  } else {
    part.crowded[atomicAdd(&found.very_crowded, 1)] = tile;
  }
}

}  // namespace reimplementation::feature_gradient
