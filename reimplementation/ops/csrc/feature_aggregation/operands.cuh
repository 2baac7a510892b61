// What the kernels of deformable feature aggregation share on CUDA: operands, logits and their softmax, and the visible
// pairs.
//
// A *pair* is a key point in a camera, a *sample* a pair in a level. One block owns one query, or some after each
// other.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/corners.cuh"
#include "cuda/divisor.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "feature_aggregation/op.h"

namespace reimplementation::feature_aggregation {

using namespace cuda;

// Everything is contiguous. A *row* are the logits of a query and a camera: (num_levels, num_points, num_groups).
template <typename T, typename L>
struct Inputs {
  using C = compute_t<T>;

  const T* features;            // (batch, rows, channels)
  Cameras<C> cameras;           // of the whole batch
  const C* key_points;          // (batch, queries, points, 3)
  const L* logits;              // (batch, queries, one row or one for each camera)
  const L* camera_logits;       // (batch, cams, row), or null: each camera has a row of each query
  const bool* keep;             // (batch, queries, cams, points), or null
  const unsigned char* hidden;  // likewise: pairs that the softmax leaves out
  LevelTable levels;
  Divisor queries, points;  // their numbers
  int num_cams, num_levels, num_groups;
  int channels, group_channels;  // channels of a group share a weight
  int row;                       // logits of a row
  C kept_scale;                  // of the weights, where some pairs were dropped

  __device__ __forceinline__ int num_pairs() const {
    return points.divisor * num_cams;
  }
  __device__ __forceinline__ bool has_few_levels(int most) const {
    return static_cast<int64_t>(num_cams) * num_levels <= most;
  }
};

template <typename T, typename L>
Inputs<T, L> inputs_of(
    const Sizes& sizes,
    const ReadableOperands& readable,
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
  in.keep = readable.keep ? static_cast<const bool*>(readable.keep->const_data_ptr()) : nullptr;
  in.hidden = hidden ? static_cast<const unsigned char*>(hidden->const_data_ptr()) : nullptr;
  in.levels = levels;
  in.queries = Divisor(sizes.num_queries);
  in.points = Divisor(sizes.num_points);
  in.num_cams = static_cast<int>(sizes.num_cams);
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
  STD_TORCH_CHECK(
      sizes.batch * sizes.num_queries <= INT_MAX, "bs * num_queries must be below 2^31; got ", sizes.batch, " * ",
      sizes.num_queries);
  return sizes.batch * sizes.num_queries;
}

// Flags (batch, queries, cams, points) of the pairs that a softmax over visible pairs alone leaves out.
Tensor find_hidden(const Sizes& sizes, const ReadableOperands& readable, cudaStream_t stream);

__device__ __forceinline__ float exponential(float x) {
  return __expf(x);
}
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}

// A query: where its operands begin.
template <typename T, typename L>
struct Query {
  using C = compute_t<T>;

  int64_t number;  // through the batch
  int batch;
  const L* logits;
  const L* camera_logits;  // of the batch element, or null
  const C* key_points;
  const bool* keep;             // or null
  const unsigned char* hidden;  // or null

  __device__ __forceinline__ Query(const Inputs<T, L>& in, int64_t number, int batch) : number(number), batch(batch) {
    const int64_t rows = in.camera_logits == nullptr ? in.num_cams : 1;
    logits = in.logits + number * rows * in.row;
    camera_logits =
        in.camera_logits == nullptr ? nullptr : in.camera_logits + static_cast<int64_t>(batch) * in.num_cams * in.row;
    key_points = in.key_points + number * in.points.divisor * 3;
    keep = in.keep == nullptr ? nullptr : in.keep + number * in.num_pairs();
    hidden = in.hidden == nullptr ? nullptr : in.hidden + number * in.num_pairs();
  }

  // Whether the softmax leaves a pair out.
  __device__ __forceinline__ bool hides(int pair) const {
    return hidden != nullptr && hidden[pair];
  }
  // The logit at a place of a camera's row; `row` is the length of one.
  __device__ __forceinline__ C logit(int cam, int row, int place) const {
    const int in_camera = cam * row + place;
    return camera_logits == nullptr ? to_compute(logits[in_camera])
                                    : to_compute(logits[place]) + to_compute(camera_logits[in_camera]);
  }
};

// How a block's threads share out the samples of `count` <= THREADS groups: neighbours take neighbouring groups, which
// lie side by side.
template <int THREADS>
struct Share {
  int count, group;
  int first, step;  // samples; there are none for threads that are left over

  __device__ __forceinline__ explicit Share(int count) : count(count), step(THREADS / count) {
    first = threadIdx.x / count;
    group = threadIdx.x - first * count;
    first = first < step ? first : INT_MAX;
  }

  // The results of all threads, group by group, in `results` in shared memory; `partial` has room for THREADS. A
  // `Result` merges with another one, and is read from another lane. Where the groups are as many as a power of two,
  // lanes that are so far apart hold the same group, and merge first.
  template <typename Result>
  __device__ __forceinline__ void merge(Result result, Result* partial, Result* results) const {
    int left = step;
    if (count <= WARP && (count & (count - 1)) == 0) {
      for (int distance = count; distance < WARP; distance *= 2) {
        result.merge(result.from_lane(distance));
      }
      left = THREADS / WARP;
      if (threadIdx.x % WARP < count) {
        partial[threadIdx.x / WARP * count + threadIdx.x % WARP] = result;
      }
    } else if (first < step) {
      partial[threadIdx.x] = result;
    }
    __syncthreads();
    if (threadIdx.x < count) {
      Result total = partial[threadIdx.x];
      for (int i = 1; i < left; ++i) {
        total.merge(partial[i * count + threadIdx.x]);
      }
      results[threadIdx.x] = total;
    }
    __syncthreads();
  }
};

// The largest logit so far, and the sum of the exponentials of how much smaller the others are.
template <typename C>
struct Softmax {
  C largest, sum;

  __device__ __forceinline__ static Softmax of_nothing() {
    return {-std::numeric_limits<C>::infinity(), 0};
  }
  // A NaN, or an infinite largest logit, makes the sum NaN; a logit of -inf counts for nothing.
  template <int N>
  __device__ __forceinline__ void add(const C (&logits)[N]) {
    C top = largest;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      top = logits[i] > top ? logits[i] : top;
    }
    C more = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      more += logits[i] == -std::numeric_limits<C>::infinity() ? C(0) : exponential(logits[i] - top);
    }
    sum = sum * scale(largest, top) + more;
    largest = top;
  }
  __device__ __forceinline__ void merge(const Softmax& other) {
    const C top = other.largest > largest ? other.largest : largest;
    sum = sum * scale(largest, top) + other.sum * scale(other.largest, top);
    largest = top;
  }
  __device__ __forceinline__ Softmax from_lane(int distance) const {
    return {__shfl_xor_sync(ALL_LANES, largest, distance), __shfl_xor_sync(ALL_LANES, sum, distance)};
  }

 private:
  __device__ __forceinline__ static C scale(C from, C to) {
    return from == to ? C(1) : exponential(from - to);
  }
};

// The softmax of groups first_group, ..., first_group + count - 1 of a query, into `results` in shared memory.
template <int THREADS, typename T, typename L>
__device__ __forceinline__ void find_softmax(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    int first_group,
    int count,
    Softmax<compute_t<T>>* partial,
    Softmax<compute_t<T>>* results) {
  using C = compute_t<T>;
  constexpr int CAMERAS_AT_ONCE = 3;
  const Share<THREADS> share(count);
  const int samples = in.num_levels * in.points.divisor;
  Softmax<C> softmax = Softmax<C>::of_nothing();
#pragma unroll 2
  for (int sample = share.first; sample < samples; sample += share.step) {
    const int place = sample * in.num_groups + first_group + share.group;
    unsigned level = sample;
    const int point = query.hidden == nullptr ? 0 : in.points.split(level);
    for (int cam = 0; cam < in.num_cams; cam += CAMERAS_AT_ONCE) {
      C logits[CAMERAS_AT_ONCE];
#pragma unroll
      for (int i = 0; i < CAMERAS_AT_ONCE; ++i) {
        const bool counts = cam + i < in.num_cams && !query.hides((cam + i) * in.points.divisor + point);
        logits[i] = counts ? query.logit(cam + i, in.row, place) : -std::numeric_limits<C>::infinity();
      }
      softmax.add(logits);
    }
  }
  share.merge(softmax, partial, results);
}

// The visible ones among THREADS of a query's pairs; pairs are numbered camera by camera.
template <typename C, int THREADS>
struct VisiblePairs {
  C x[THREADS], y[THREADS];
  int number[THREADS];
  int warp_counts[THREADS / WARP];
};

// Fills `found` with the visible ones of pairs first, ..., first + THREADS - 1 in their order; returns how many they
// are. Dropped pairs count as unseen, and so do those whose weight is zero. Calls `visit(number, x, y, visible)` for
// each pair.
template <int THREADS, typename T, typename L, typename Visit>
__device__ int compact_visible_pairs(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    int first,
    VisiblePairs<compute_t<T>, THREADS>& found,
    const Visit& visit) {
  using C = compute_t<T>;
  const int number = first + threadIdx.x;
  const int warp = threadIdx.x / WARP;
  Location<C> location = {0, 0};
  bool visible = false;
  if (number < in.num_pairs()) {
    unsigned cam = number;
    const C* point = query.key_points + in.points.split(cam) * 3;
    const C position[3] = {point[0], point[1], point[2]};
    location = in.cameras.of_sample(query.batch, in.num_cams).locate(cam, position);
    visible = inside_unit_square(location.x, location.y) && (query.keep == nullptr || query.keep[number]) &&
        !query.hides(number);
    visit(number, location, visible);
  }
  const unsigned seen = __ballot_sync(ALL_LANES, visible);
  __syncthreads();  // whoever still reads the pairs before these
  if (threadIdx.x % WARP == 0) {
    found.warp_counts[warp] = __popc(seen);
  }
  __syncthreads();
  int position = __popc(seen & ((1u << (threadIdx.x % WARP)) - 1));
  int count = 0;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    position += w < warp ? found.warp_counts[w] : 0;
    count += found.warp_counts[w];
  }
  if (visible) {
    found.x[position] = location.x;
    found.y[position] = location.y;
    found.number[position] = number;
  }
  __syncthreads();
  return count;
}

}  // namespace reimplementation::feature_aggregation
