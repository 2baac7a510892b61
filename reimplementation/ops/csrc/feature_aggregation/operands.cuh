// What the kernels of deformable feature aggregation share on CUDA: operands, logits, and the visible pairs.
//
// A *pair* is a key point in a camera, a *sample* a pair in a level.
#pragma once

#include <type_traits>

#include "cuda/corners.cuh"
#include "cuda/divisor.cuh"
#include "cuda/exponential.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "feature_aggregation/op.h"
#include "sampling/pairs.cuh"

namespace reimplementation::feature_aggregation {

using namespace cuda;
using sampling::Pair;
using sampling::Points;
using sampling::Shares;

// Everything is contiguous. A *row* are the logits of a query and a camera: (num_levels, num_points, num_groups).
template <typename T, typename L>
struct Inputs {
  using C = compute_t<T>;

  const T* features;            // (batch, rows, channels)
  Cameras<C> cameras;           // of the whole batch
  const C* key_points;          // (batch, queries, points, 3)
  const L* logits;              // (batch, queries, one row or one for each camera)
  const L* camera_logits;       // (batch, cams, row), or null: each camera has a row of each query
  const C* combined;            // (batch, row), or null: softmax.cuh says what
  const C* statistics;          // (batch, queries, groups, 2): see op.h
  const bool* keep;             // (batch, queries, cams, points), or null
  const unsigned char* hidden;  // likewise: pairs that the softmax leaves out
  LevelTable levels;
  Divisor queries;  // their number
  Shares shares;    // of a query's key points
  int num_cams, num_points, num_levels, num_groups;
  int channels, group_channels;  // channels of a group share a weight
  int row;                       // logits of a row
  C kept_scale;                  // of the weights, where some pairs were dropped

  __device__ __forceinline__ bool has_few_levels(int most) const {
    return static_cast<int64_t>(num_cams) * num_levels <= most;
  }
  // Rows of logits that a query has of its own.
  HOST_DEVICE int query_rows() const {
    return camera_logits == nullptr ? num_cams : 1;
  }
  // Of the first group's logit of a sample, in its row.
  __device__ __forceinline__ int place(int level, int point) const {
    return (level * num_points + point) * num_groups;
  }
  // The number of a pair among the flags of a query.
  __device__ __forceinline__ int flag(const Pair& pair) const {
    return pair.cam * num_points + pair.point;
  }
};

template <typename T, typename L>
Inputs<T, L> inputs_of(
    const Sizes& sizes,
    const Shares& shares,
    const ReadableOperands& readable,
    const std::optional<Tensor>& combined,
    const Tensor& statistics,
    const LevelTable& levels,
    const std::optional<Tensor>& hidden,
    double attn_drop) {
  using C = compute_t<T>;
  Inputs<T, L> in = {};
  in.features = static_cast<const T*>(readable.features.const_data_ptr());
  in.cameras = readable.cameras.cameras<C>();
  in.key_points = static_cast<const C*>(readable.cameras.key_points.const_data_ptr());
  in.logits = static_cast<const L*>(readable.logits.const_data_ptr());
  in.camera_logits = readable.camera_logits ? static_cast<const L*>(readable.camera_logits->const_data_ptr()) : nullptr;
  in.combined = combined ? static_cast<const C*>(combined->const_data_ptr()) : nullptr;
  in.statistics = static_cast<const C*>(statistics.const_data_ptr());
  in.keep = readable.keep ? static_cast<const bool*>(readable.keep->const_data_ptr()) : nullptr;
  in.hidden = hidden ? static_cast<const unsigned char*>(hidden->const_data_ptr()) : nullptr;
  in.levels = levels;
  in.queries = Divisor(sizes.num_queries);
  in.num_cams = static_cast<int>(sizes.num_cams);
  in.shares = shares;
  in.num_points = static_cast<int>(sizes.num_points);
  in.num_levels = static_cast<int>(sizes.num_levels);
  in.num_groups = static_cast<int>(sizes.num_groups);
  in.channels = static_cast<int>(sizes.channels);
  in.group_channels = static_cast<int>(sizes.group_channels());
  in.row = static_cast<int>(sizes.camera_width());
  in.kept_scale = static_cast<C>(readable.keep ? 1 / (1 - attn_drop) : 1);
  return in;
}

// Whether vectors of `vec` channels stay within a group and on their alignment.
template <typename T>
bool can_vectorize(const Sizes& sizes, const Tensor& features, int vec) {
  return sizes.group_channels() % vec == 0 && is_aligned(features, vec * sizeof(T));
}

inline int64_t count_queries(const Sizes& sizes) {
  return sampling::count_queries(sizes.batch, sizes.num_queries);
}

// Flags (batch, queries, cams, points) of the pairs that a softmax over visible pairs alone leaves out.
Tensor find_hidden(const Sizes& sizes, const ReadableOperands& readable, cudaStream_t stream);

// A query: where its operands begin.
template <typename T, typename L>
struct Query {
  using C = compute_t<T>;

  int64_t number;  // through the batch
  int batch;
  const L* logits;
  const L* camera_logits;  // of the batch element, or null
  const C* combined;       // likewise
  const C* statistics;
  const C* key_points;
  const bool* keep;             // or null
  const unsigned char* hidden;  // or null

  Query() = default;
  __device__ __forceinline__ Query(const Inputs<T, L>& in, int64_t number, int batch) : number(number), batch(batch) {
    const int64_t pairs = static_cast<int64_t>(in.num_points) * in.num_cams;
    logits = in.logits + number * in.query_rows() * in.row;
    camera_logits =
        in.camera_logits == nullptr ? nullptr : in.camera_logits + static_cast<int64_t>(batch) * in.num_cams * in.row;
    combined = in.combined == nullptr ? nullptr : in.combined + static_cast<int64_t>(batch) * in.row;
    statistics = in.statistics + number * in.num_groups * 2;
    key_points = in.key_points + number * in.num_points * 3;
    keep = in.keep == nullptr ? nullptr : in.keep + number * pairs;
    hidden = in.hidden == nullptr ? nullptr : in.hidden + number * pairs;
  }

  // Whether the softmax leaves a pair out.
  __device__ __forceinline__ bool hides(int flag) const {
    return hidden != nullptr && hidden[flag];
  }
  // The logit at a place of a camera's row; `row` is the length of one.
  __device__ __forceinline__ C logit(int cam, int row, int place) const {
    const int in_camera = cam * row + place;
    return camera_logits == nullptr ? to_compute(logits[in_camera])
                                    : to_compute(logits[place]) + to_compute(camera_logits[in_camera]);
  }
};

// Fills `found` with the visible ones of a block's pairs number first, ..., first + THREADS - 1; returns how many they
// are. Dropped pairs count as unseen, and so do those whose weight is zero.
template <int THREADS, typename T, typename L>
__device__ int compact_visible_pairs(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    const Points& points,
    int first,
    sampling::VisiblePairs<compute_t<T>, THREADS>& found) {
  using C = compute_t<T>;
  const Pair pair = in.shares.pair_by_camera(points, first + threadIdx.x);
  Location<C> location = {0, 0};
  bool visible = false;
  if (pair.cam < in.num_cams && pair.point < points.end) {
    const C* point = query.key_points + 3 * pair.point;
    const C position[3] = {point[0], point[1], point[2]};
    location = in.cameras.of_sample(query.batch, in.num_cams).locate(pair.cam, position);
    visible = inside_unit_square(location.x, location.y) && (query.keep == nullptr || query.keep[in.flag(pair)]) &&
        !query.hides(in.flag(pair));
  }
  return sampling::compact(visible, pair, location.x, location.y, found);
}

}  // namespace reimplementation::feature_aggregation
