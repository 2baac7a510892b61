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
//   2. one thread per tile lists it, with the four ranges, while samples are put in order. *Crowded* tiles go to a block of
//      several warps, which share the samples out; of others each team takes one of its own, beside the crowded ones
//      (tiles.cuh has both steps, and what becomes of pixels that are no tile's own);
//   3. teams walk their samples, as many at a time as they have lanes: each lane turns one location into corner weights and
//      pixels of the tile, then all lanes read one sample's row of the output's gradient after the other. Samples with
//      the same anchor come one after the other, and add up in registers; another anchor has its four sums fetched from
//      shared memory, after those of the last one went there.
//
// Traffic: for each sample one row of the output's gradient, mostly from L2, where atomics would move four; and the
// features' gradient is written once, in its own dtype, zeros included. What is left to wait for is shared memory.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <optional>

#include "feature_gradient/feature_gradient.cuh"
#include "feature_gradient/prefix_sums.cuh"
#include "feature_gradient/tiles.cuh"

namespace reimplementation::feature_gradient {

constexpr int ELSEWHERE = PIXELS;  // where the sums for pixels of other tiles go, and for those outside the level
constexpr int IN_FLIGHT = 4;       // rows of the output's gradient under way together
constexpr int BLOCKS_AT_ONCE = 8;  // on a multiprocessor of kernels with a fixed number of them
constexpr unsigned MOST_COUNTED = 1u << 19;  // samples: counting the smaller ones ends soon, wherever they fall

// Channels that a lane takes where there are many.
template <typename T>
constexpr int VECTOR = sizeof(T) == 8 ? 2 : 4;

// How many groups the channels of a team are in, at most, if they are whole groups or lie within one: the lane that
// prepares a sample then finds its weights for all lanes of the team. Where they are ANY_GROUPS, each lane finds those of
// its own channels.
constexpr int ANY_GROUPS = 0, ONE_GROUP = 1, FEW_GROUPS = 4;

// A warp's part of step 3's shared memory. A lane holds VEC neighbouring channels.
template <typename T, typename Key, int VEC, int GROUPS>
struct Sums {
  Vector<T, VEC> pixels[PIXELS + 1][WARP];  // the last for what lies elsewhere
  // Samples that the lanes have prepared, and the next ones.
  Four<T> corner_weights[2][WARP];
  unsigned corner_pixels[2][WARP];  // four pixels of the tile, a byte each
  int queries[2][WARP];
  Key keys[2][GROUPS == ANY_GROUPS ? WARP : 1];  // of their weights
  Four<T> weights[2][GROUPS == FEW_GROUPS ? WARP : 1];
};

constexpr unsigned ALL_ELSEWHERE = ELSEWHERE * 0x01010101u;

// Of a location in a tile's level: what each corner weighs, and its pixel of the tile, a byte each.
template <typename C>
__device__ __forceinline__ void place_corners(
    const Tile& tile,
    int width,
    int height,
    C location_x,
    C location_y,
    bool exists,
    Four<C>& corners,
    unsigned& pixels) {
  const auto x = bilinear_axis(pixel_position(location_x, width), width);
  const auto y = bilinear_axis(pixel_position(location_y, height), height);
  corners = corner_weights(x, y);
  unsigned in_row[2], row[2];
  bool column_here[2], row_here[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    in_row[i] = x.index[i] - tile.x;
    row[i] = y.index[i] - tile.y;
    column_here[i] = x.slope[i] != 0 && in_row[i] < TILE_WIDTH;
    row_here[i] = exists && y.slope[i] != 0 && row[i] < TILE_HEIGHT;
  }
  pixels = 0;
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const bool here = column_here[corner % 2] && row_here[corner / 2];
    pixels |= (here ? row[corner / 2] * TILE_WIDTH + in_row[corner % 2] : ELSEWHERE) << 8 * corner;
  }
}

// A team adds samples first, ..., end - 1 of a tile to its sums; no team of the warp has more than `most`. Each lane prepares
// one sample at a time; while a team adds these, the next ones' operands and the output's gradients are on their way.
template <typename T, typename Weights, int VEC, int GROUPS>
__device__ __forceinline__ void add_samples(
    const Part<T, Weights>& part,
    const Tile& tile,
    int first,
    int end,
    int most,
    int first_channel,
    int channel,
    Sums<compute_t<T>, typename Weights::Key, VEC, GROUPS>& sums) {
  using C = compute_t<T>;
  const int lane = threadIdx.x % WARP;
  const int lanes = 1 << part.log2_lanes;
  const int in_team = lane & (lanes - 1), first_lane = lane - in_team;
  const int width = part.spans[tile.level].width, height = part.spans[tile.level].height;
  const C* const locations = part.locations + part.image_offset(tile.image, part.location_strides);
  const T* const output = part.grad_output + part.image_offset(tile.image, part.output_strides) + channel;
  // The weights of this lane's channels, or else of all of the team's.
  const auto weights = part.weights_of(tile.image, GROUPS == ANY_GROUPS ? channel : first_channel);
  const int last_group = (part.channels - 1 - first_channel) / part.group_channels.divisor;
  const int group = (channel - first_channel) / part.group_channels.divisor;

  // A lane's next sample: `begin` loads what `finish` needs later. Where a team has no more, it reads its last one again,
  // and where it has none, that of number 0.
  C location_x, location_y;
  typename Weights::Value of_groups[GROUPS == ANY_GROUPS ? 1 : GROUPS];
  auto sample_at = [&](int step) { return end > 0 ? part.sorted[tile.at(min(first + step + in_team, end - 1))] : 0; };
  auto begin = [&](int buffer, unsigned sample) {
    const Place place(part, sample);
    const C* location = locations + place.offset(part.location_steps);
    location_x = location[0];
    location_y = location[part.location_steps[4]];
    const typename Weights::Key key = part.weights.key(place);
    sums.queries[buffer][lane] = place.query;
    if constexpr (GROUPS == ANY_GROUPS) {
      sums.keys[buffer][lane] = key;
    } else {
#pragma unroll
      for (int i = 0; i < GROUPS; ++i) {
        of_groups[i] = weights.load(key, place.query, min(i, last_group));
      }
    }
  };
  auto finish = [&](int buffer, bool exists) {
    Four<C> corners;
    unsigned pixels;
    place_corners(tile, width, height, location_x, location_y, exists, corners, pixels);
    if constexpr (GROUPS == ONE_GROUP) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        corners[corner] *= to_compute(of_groups[0]);
      }
    } else if constexpr (GROUPS == FEW_GROUPS) {
      sums.weights[buffer][lane] = {
          to_compute(of_groups[0]), to_compute(of_groups[1]), to_compute(of_groups[2]), to_compute(of_groups[3])};
    }
    sums.corner_weights[buffer][lane] = corners;
    sums.corner_pixels[buffer][lane] = pixels;
  };
  Vector<T, VEC> loaded[IN_FLIGHT];
  typename Weights::Value loaded_weights[GROUPS == ANY_GROUPS ? IN_FLIGHT : 1];
  auto load = [&](int buffer, int i) {
#pragma unroll
    for (int j = 0; j < IN_FLIGHT; ++j) {
      const uint64_t query = static_cast<unsigned>(sums.queries[buffer][first_lane + i + j]);
      loaded[j] = load_vector<VEC>(output + query * part.output_row);
      if constexpr (GROUPS == ANY_GROUPS) {
        loaded_weights[j] = weights.load(sums.keys[buffer][first_lane + i + j], static_cast<int>(query), 0);
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
        C weight = 1;
        if constexpr (GROUPS == ANY_GROUPS) {
          weight = to_compute(loaded_weights[j]);
        } else if constexpr (GROUPS == FEW_GROUPS) {
          weight = sums.weights[buffer][first_lane + i + j][group];
        }
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          terms[j][v] = GROUPS == ONE_GROUP ? loaded[j][v] : loaded[j][v] * weight;
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

// A team writes its share of a tile's pixels, from what `teams` of them have added up for the tile.
template <typename T, typename Weights, int VEC, int GROUPS>
__device__ __forceinline__ void write_tile(
    const Part<T, Weights>& part,
    const Tile& tile,
    int samples,
    int team,
    int teams,
    int in_team,
    int channel,
    bool crowded,
    Sums<compute_t<T>, typename Weights::Key, VEC, GROUPS>* const sums) {
  using C = compute_t<T>;
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

// Step 3. A block takes units as it gets to them: of crowded tiles one, which its teams share, of others one a team; and a
// slice of the channels.
template <typename T, typename Weights, int VEC, int GROUPS>
__global__ void __launch_bounds__(MOST_WARPS* WARP, WARPS_AT_ONCE / MOST_WARPS)
    sum_tiles(const __grid_constant__ Part<T, Weights> part, bool crowded) {
  using C = compute_t<T>;
  extern __shared__ __align__(32) char memory[];
  auto* const sums = reinterpret_cast<Sums<C, typename Weights::Key, VEC, GROUPS>*>(memory);
  __shared__ unsigned taken;
  Findings& found = *part.found;
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int in_team = lane & ((1 << part.log2_lanes) - 1);
  const int block_team = threadIdx.x >> part.log2_lanes, block_teams = blockDim.x >> part.log2_lanes;
  // Of a tile, and how many tiles the block works on.
  const int team = crowded ? block_team : 0, teams = crowded ? block_teams : 1, at_once = crowded ? 1 : block_teams;
  const unsigned tiles = found.overlap ? 0 : crowded ? found.very_crowded + found.crowded : found.light;
  const unsigned units = (tiles + at_once - 1) / at_once * part.slices.divisor;
  for (unsigned unit = blockIdx.x; unit < units;) {
    unsigned next = 0;
    if (threadIdx.x == 0) {
      next = gridDim.x + atomicAdd(crowded ? &found.next_crowded : &found.next_light, 1);
    }
    unsigned first_entry = unit;
    const int slice = part.slices.split(first_entry);
    const int first_channel = (slice << part.log2_lanes) * VEC, channel = first_channel + in_team * VEC;
    const unsigned entry = min(first_entry * at_once + (crowded ? 0 : block_team), tiles - 1);
    const bool exists = crowded || first_entry * at_once + block_team < tiles;
    const Tile tile = crowded
        ? part.crowded[entry < found.very_crowded ? entry : part.most_crowded - 1 - (entry - found.very_crowded)]
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
          part, tile, share * team, min(share * (team + 1), samples), most, first_channel,
          min(channel, part.channels - VEC), sums[warp]);
    }
    __syncthreads();
    if (exists && channel < part.channels && (samples > 0 || !part.add)) {
      write_tile(part, tile, samples, team, teams, in_team, channel, crowded, sums);
    }
    if (threadIdx.x == 0) {
      taken = next;
    }
    __syncthreads();
    unit = taken;
  }
}

inline unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>((threads + THREADS - 1) / THREADS);
}

template <int VEC, int GROUPS, typename T, typename Weights>
void launch_sums(const Part<T, Weights>& part, int device, cudaStream_t stream, SideStream& beside) {
  using C = compute_t<T>;
  const auto kernel = sum_tiles<T, Weights, VEC, GROUPS>;
  constexpr int warp_bytes = sizeof(Sums<C, typename Weights::Key, VEC, GROUPS>);
  const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int most_bytes = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int warps = std::clamp((most_bytes - 1024) / warp_bytes, 2, MOST_WARPS);
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, warps * warp_bytes),
      "sum_tiles does not get its shared memory");

  // Side by side: the last crowded tiles keep few multiprocessors busy.
  const cudaStream_t crowded = beside.fork();
  kernel<<<multiprocessors * WARPS_AT_ONCE / warps, warps * WARP, warps * warp_bytes, crowded>>>(part, true);
  check_launch("sum_tiles of the crowded");
  sum_rest<<<multiprocessors * BLOCKS_AT_ONCE, THREADS, 0, crowded>>>(part);
  check_launch("sum_rest");
  kernel<<<multiprocessors * WARPS_AT_ONCE, WARP, warp_bytes, stream>>>(part, false);
  check_launch("sum_tiles");
  beside.join();
}

// The same for channels in vectors or not, whatever groups they are in.
template <typename T, typename Weights>
void launch_sums(Part<T, Weights> part, bool vectors, int device, cudaStream_t stream, SideStream& beside) {
  const int vec = vectors ? VECTOR<T> : 1;
  part.log2_lanes = std::max(log2_lanes(part.channels, vec), ceil_log2(IN_FLIGHT));
  const int team_channels = vec << part.log2_lanes, group_channels = part.group_channels.divisor;
  part.slices = Divisor((part.channels + team_channels - 1) / team_channels);
  if (!vectors) {
    launch_sums<1, ANY_GROUPS>(part, device, stream, beside);
  } else if (group_channels == part.channels || group_channels % team_channels == 0) {
    launch_sums<VECTOR<T>, ONE_GROUP>(part, device, stream, beside);
  } else if (team_channels % group_channels == 0 && team_channels / group_channels <= FEW_GROUPS) {
    launch_sums<VECTOR<T>, FEW_GROUPS>(part, device, stream, beside);
  } else {
    launch_sums<VECTOR<T>, ANY_GROUPS>(part, device, stream, beside);
  }
}

// Words that a number for each sample takes, such that what comes next is aligned to 16 bytes.
inline int64_t words_for(int64_t samples) {
  return (samples + 3) / 4 * 4;
}

// Launches steps 1 and 2 for one part of the batch: returns the part with its samples in order. `memory` has room for four
// times `words_for` its samples, three if not deterministic.
template <typename T, typename Weights>
Part<T, Weights> launch_order(
    Part<T, Weights> part,
    LevelTable levels,
    bool deterministic,
    uint32_t* memory,
    Scratch scratch,
    int device,
    cudaStream_t stream,
    SideStream& beside) {
  const int64_t keys =
      static_cast<int64_t>(part.most_tiles) * PIXELS + 1;  // one more, for samples that count for nothing
  const int64_t words = words_for(part.samples);
  uint32_t *const sample_keys = memory, *const ranks = memory + words, *const ordered = memory + 2 * words;

  const int64_t most_blocks = int64_t{BLOCKS_AT_ONCE} * device_attribute(cudaDevAttrMultiProcessorCount, device);
  const unsigned blocks = 1 + static_cast<unsigned>(std::min<int64_t>(blocks_for(keys), most_blocks));
  prepare<<<blocks, THREADS, 0, stream>>>(part, levels, keys);
  check_launch("prepare");
  find_keys<<<blocks_for(part.samples), THREADS, 0, stream>>>(part, sample_keys, ranks);
  check_launch("find_keys");
  sum_before(part.places, keys, scratch, stream);

  list_tiles<<<blocks_for(part.most_tiles), THREADS, 0, beside.fork()>>>(part);
  check_launch("list_tiles");
  part.sorted = ordered;
  order_samples<<<blocks_for(part.samples), THREADS, 0, stream>>>(part, sample_keys, ranks);
  check_launch("order_samples");
  if (deterministic) {
    part.sorted = memory + 3 * words;
    const unsigned chunks = (part.samples + CHUNK - 1) / CHUNK;
    const bool few = part.samples <= MOST_COUNTED;
    uint32_t* const runs = few ? nullptr : ranks;
    // Of few blocks the larger end sooner; of many the smaller find room beside the other gradients' kernel.
    settle_chunks<<<chunks, few ? CHUNK : THREADS, 0, stream>>>(part, sample_keys, ordered, runs);
    check_launch("settle_chunks");
    if (!few) {
      settle_runs<<<chunks, THREADS, 0, stream>>>(part, sample_keys, ordered, runs);
      check_launch("settle_runs");
    }
  }
  beside.join();
  return part;
}

// What all shares of the work have in common.
template <typename T, typename Weights>
Part<T, Weights> part_of(const SampledOp& op, const Division& most) {
  const int64_t row = op.heads * op.channels;
  Part<T, Weights> part = {};
  for (int i = 0; i < 2; ++i) {
    part.location_strides[i] = op.location_steps[i];
  }
  for (int i = 0; i < 5; ++i) {
    part.location_steps[i] = most.queries > 1 || i > 0 ? short_step(op.location_steps[2 + i]) : 0;
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
  part.num_levels = static_cast<int>(op.num_levels());
  part.channels = static_cast<int>(op.channels);
  part.unit_square = op.unit_square;
  part.crowded_from = static_cast<unsigned>(most.crowded_from);
  part.most_crowded = static_cast<unsigned>(most.most_crowded);
  return part;
}

// Gives `part` its share; all of its pointers but those to the features' gradient and to what it works in.
template <typename T, typename Weights>
void set_share(
    Part<T, Weights>& part,
    const SampledOp& op,
    const Weights& weights,
    const Share& share,
    const Tensor& grad_output) {
  part.images = static_cast<int>(share.batches * op.heads);
  part.most_tiles = static_cast<unsigned>(part.images * op.image_tiles());
  part.queries = Divisor(share.queries);
  part.samples = static_cast<unsigned>(share.batches * share.queries * op.query_samples());
  part.add = share.query > 0;
  part.grad_output = static_cast<const T*>(grad_output.const_data_ptr()) + share.batch * part.output_strides[0] +
      share.query * part.output_row;
  part.locations = static_cast<const compute_t<T>*>(op.locations.const_data_ptr()) +
      share.batch * op.location_steps[0] + share.query * op.location_steps[2];
  part.weights = weights.from(share.batch, share.query);
}

// One piece of memory for everything in between, which all shares use after each other.
template <typename T, typename Weights>
class Workspace {
 public:
  Workspace(const Division& most, bool deterministic, int64_t num_levels)
      : scratch_bytes_(sum_before_bytes(most.keys)),
        samples_(plan_.reserve(words_for(most.samples) * (deterministic ? 4 : 3), sizeof(uint32_t))),
        places_(plan_.reserve(most.keys, sizeof(uint32_t))),
        light_(plan_.reserve(most.tiles, sizeof(Tile))),
        crowded_(plan_.reserve(most.most_crowded, sizeof(Tile))),
        spans_(plan_.reserve(num_levels, sizeof(Span))),
        found_(plan_.reserve(1, sizeof(Findings))),
        scratch_(plan_.reserve(scratch_bytes_, 1)) {}

  // The memory, with `part`'s pointers into it.
  Tensor allocate_for(Part<T, Weights>& part, const Tensor& like) {
    const Tensor memory = allocate(like, {plan_.bytes}, ScalarType::Byte);
    first_ = static_cast<char*>(memory.mutable_data_ptr());
    part.places = reinterpret_cast<uint32_t*>(first_ + places_);
    part.light = reinterpret_cast<Tile*>(first_ + light_);
    part.crowded = reinterpret_cast<Tile*>(first_ + crowded_);
    part.spans = reinterpret_cast<Span*>(first_ + spans_);
    part.found = reinterpret_cast<Findings*>(first_ + found_);
    return memory;
  }

  uint32_t* samples() const {
    return reinterpret_cast<uint32_t*>(first_ + samples_);
  }
  Scratch scratch() const {
    return {first_ + scratch_, static_cast<size_t>(scratch_bytes_)};
  }

 private:
  Memory plan_;
  int64_t scratch_bytes_, samples_, places_, light_, crowded_, spans_, found_, scratch_;
  char* first_ = nullptr;
};

template <typename T, typename Weights>
void FeatureGradient::start(
    const SampledOp& op,
    const Weights& weights,
    const Tensor& grad_output,
    const Tensor& features,
    bool deterministic) {
  const int device = features.get_device_index(),
            multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const bool single_queries = op.location_steps[2] > INT_MAX || weights.has_long_query_steps();
  const Division most = divide(op, deterministic, single_queries, multiprocessors);
  constexpr int vector_bytes = VECTOR<T> * sizeof(T);
  const bool vectors = op.channels / op.groups % VECTOR<T> == 0 && is_aligned(grad_output, vector_bytes);

  // What fills new memory, as PyTorch does on request, comes before the side stream begins.
  Part<T, Weights> part = part_of<T, Weights>(op, most);
  Workspace<T, Weights> workspace(most, deterministic, op.num_levels());
  memory_ = workspace.allocate_for(part, op.locations);
  const cudaStream_t stream = side_ ? side_->fork() : stream_;
  SideStream beside(stream, device);

  for_each_share(op, most, [&](const Share& share) {
    set_share(part, op, weights, share, grad_output);
    Part<T, Weights> ordered = launch_order(
        part, op.level_table, deterministic, workspace.samples(), workspace.scratch(), device, stream, beside);
    if (!gradient_) {
      // Not before the first samples are being ordered: PyTorch may fill new memory, on its own stream.
      gradient_ = allocate_like(features);
      if (side_) {
        side_->fork();
      }
    }
    ordered.grad_features = static_cast<T*>(gradient_->mutable_data_ptr()) + share.batch * part.feature_strides[0];
    launch_sums(ordered, vectors, device, stream, beside);
  });
}

}  // namespace reimplementation::feature_gradient
