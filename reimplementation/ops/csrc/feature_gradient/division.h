// How the gradient of the features divides its work: which part of a batch is worked on at a time, how large lists may become,
// and where in one piece of memory they lie. Only numbers, and nothing of CUDA.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <climits>
#include <cstdint>

namespace reimplementation::feature_gradient {

constexpr int TILE_WIDTH = 4, TILE_HEIGHT = 4, PIXELS = TILE_WIDTH * TILE_HEIGHT;
constexpr int LANES = 32;                          // that hold one channel each, at least
constexpr int WARPS_AT_ONCE = 16;                  // of step 3 on a multiprocessor, which has registers for so many
constexpr int64_t WORKSPACE = int64_t{1} << 30;    // bytes; larger batches are taken in parts
constexpr int64_t MOST_MERGED = int64_t{1} << 23;  // samples of several batch elements: merging runs ends soon
constexpr int64_t LEAST_CROWDED =
    64;  // samples from which several warps share a tile, if there is too little work for all
constexpr int64_t MOST_CROWDED = 256;  // the same, if there is enough

// A *sample* is numbered by (batch, head, query, point, camera, level); an *image* is a batch element's head.
struct Sizes {
  int64_t batch, heads, queries, points, cams, levels;
  int64_t rows;              // pixels of all cameras and levels
  int64_t channels, groups;  // of a head; each group of channels has its own weights

  int64_t query_samples() const {
    return heads * points * cams * levels;
  }
  int64_t num_levels() const {
    return cams * levels;
  }
  // At most: a level has a quarter as many as pixels and one more, or fewer.
  int64_t image_tiles() const {
    return rows / TILE_HEIGHT + num_levels();
  }
};

// Some batch elements and queries that are worked on together.
struct Share {
  int64_t batch, batches;  // the first, and how many
  int64_t query, queries;
};

// The largest share, and what it takes.
struct Division {
  int64_t batches, queries;
  int64_t samples, tiles, keys;
  int64_t crowded_from;  // samples from which several warps share a tile
  int64_t most_crowded;  // tiles that have so many
};

// Whole batch elements at a time, or some queries of one: as many as memory and 32 bits for a key allow. Of one query at a time
// each has its own first element, and nobody takes a step from query to query.
inline Division divide(const Sizes& sizes, bool deterministic, bool single_queries, int multiprocessors) {
  constexpr int64_t most_samples = WORKSPACE / (4 * sizeof(uint32_t)), most_keys = UINT_MAX - 1;
  const int64_t query_samples = sizes.query_samples();
  const int64_t batch_tiles = sizes.heads * sizes.image_tiles();
  const int64_t batch_units = batch_tiles * ((sizes.channels + LANES - 1) / LANES);
  STD_TORCH_CHECK(
      query_samples <= most_samples && batch_tiles < most_keys / PIXELS && sizes.heads * sizes.channels <= UINT_MAX &&
          batch_units < INT_MAX,
      "too large: heads * points * cameras * levels must be at most 2^26, heads * rows and heads * channels below "
      "2^30");

  Division most;
  most.queries = single_queries ? 1 : std::clamp<int64_t>(most_samples / query_samples, 1, sizes.queries);
  const int64_t wanted_samples = deterministic ? MOST_MERGED : most_samples;
  const int64_t batch_bytes = batch_tiles * PIXELS * int64_t{sizeof(uint32_t)};
  most.batches = std::clamp<int64_t>(
      std::min({wanted_samples / (query_samples * most.queries), WORKSPACE / batch_bytes, INT_MAX / batch_units}), 1,
      sizes.batch);
  most.samples = most.batches * most.queries * query_samples;
  most.tiles = most.batches * batch_tiles;
  most.keys = most.tiles * PIXELS + 1;  // one more, for samples that count for nothing
  most.crowded_from =
      std::clamp<int64_t>(most.samples / (multiprocessors * WARPS_AT_ONCE * 2), LEAST_CROWDED, MOST_CROWDED);
  // A tile may have each of its samples to itself, and those of three neighbours.
  most.most_crowded = std::min(most.tiles, 4 * most.samples / most.crowded_from);
  return most;
}

// Calls `work` with the shares, one after the other. Those of the same batch elements follow each other.
template <typename Work>
void for_each_share(const Sizes& sizes, const Division& most, const Work& work) {
  for (int64_t batch = 0; batch < sizes.batch; batch += most.batches) {
    for (int64_t query = 0; query < sizes.queries; query += most.queries) {
      work(
          Share{
              batch, std::min(most.batches, sizes.batch - batch), query,
              std::min(most.queries, sizes.queries - query)});
    }
  }
}

// One piece of memory, given away from its beginning on.
struct Memory {
  int64_t bytes = 0;

  // Where the next `count` things begin, that take so many bytes each.
  int64_t reserve(int64_t count, int64_t size) {
    constexpr int64_t ALIGNMENT = 256;
    const int64_t at = bytes;
    bytes += (count * size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
    return at;
  }
};

}  // namespace reimplementation::feature_gradient
