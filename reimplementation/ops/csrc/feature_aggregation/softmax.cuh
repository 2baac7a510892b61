// The softmax of the logits on CUDA: what makes weights of them, and what takes the weights' gradients back.
//
// A query's logits are its own and the cameras', (cameras, levels, points, groups) together, but for each group one sum
// over all of them is enough. Where no pair is left out, the cameras' part of it,
//
//   log sum over cameras of exp(camera's logit),
//
// is the same for all queries: a small kernel finds it beforehand, and then each query has one exponential a sample
// where it would have one for each camera.
#pragma once

#include <limits>
#include <optional>

#include "feature_aggregation/operands.cuh"

namespace reimplementation::feature_aggregation {

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
  __device__ __forceinline__ C log_of_sum() const {
    return largest + log(sum);
  }

 private:
  __device__ __forceinline__ static C scale(C from, C to) {
    return from == to ? C(1) : exponential(from - to);
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

  // How many results of a group are left in `partial`, in shared memory with room for THREADS, when all threads have
  // put theirs there. A `Result` merges with another one, and is read from another lane: where the groups are as many
  // as a power of two, lanes that are so far apart hold the same group, and merge first.
  template <typename Result>
  __device__ __forceinline__ int put(Result result, Result* partial) const {
    if (count <= WARP && (count & (count - 1)) == 0) {
      for (int distance = count; distance < WARP; distance *= 2) {
        result.merge(result.from_lane(distance));
      }
      if (threadIdx.x % WARP < count) {
        partial[threadIdx.x / WARP * count + threadIdx.x % WARP] = result;
      }
      return THREADS / WARP;
    }
    if (first < step) {
      partial[threadIdx.x] = result;
    }
    return step;
  }
  // What is left of a group, merged, once all threads have put theirs there.
  template <typename Result>
  __device__ __forceinline__ Result merged(int group, int left, const Result* partial) const {
    Result result = partial[group];
    for (int i = 1; i < left; ++i) {
      result.merge(partial[i * count + group]);
    }
    return result;
  }
};

// For threads below `count`: the softmax of group first_group + threadIdx.x of a query.
template <int THREADS, typename T, typename L>
__device__ __forceinline__ Softmax<compute_t<T>> find_softmax(
    const Inputs<T, L>& in, const Query<T, L>& query, int first_group, int count, Softmax<compute_t<T>>* partial) {
  using C = compute_t<T>;
  constexpr int AT_ONCE = 4;  // logits under way together
  const Share<THREADS> share(count);
  const int samples = in.num_levels * in.num_points;
  Softmax<C> softmax = Softmax<C>::of_nothing();
  for (int cam = 0; cam < (query.combined == nullptr ? in.num_cams : 1); ++cam) {
    for (int first = share.first; first < samples; first += share.step * AT_ONCE) {
      C logits[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int sample = first + i * share.step, place = sample * in.num_groups + first_group + share.group;
        logits[i] = -std::numeric_limits<C>::infinity();
        if (sample < samples) {
          if (query.combined != nullptr) {
            logits[i] = to_compute(query.logits[place]) + query.combined[place];
          } else if (!query.hides(cam * in.num_points + sample % in.num_points)) {
            logits[i] = query.logit(cam, in.row, place);
          }
        }
      }
      softmax.add(logits);
    }
  }
  const int left = share.put(softmax, partial);
  __syncthreads();
  return threadIdx.x < count ? share.merged(threadIdx.x, left, partial) : softmax;
}

// What all cameras' logits add to a place of a query's: (batch, row), where they have a term of their own and no query
// leaves pairs out.
std::optional<Tensor> combine_cameras(
    const Sizes& sizes, const ReadableOperands& readable, bool visible_only, cudaStream_t stream);

// Finds `in.statistics` before the kernel whose blocks share queries: none of them sees all logits.
template <typename T, typename L>
void find_statistics(const Sizes& sizes, const Inputs<T, L>& in, const Tensor& statistics, cudaStream_t stream);

}  // namespace reimplementation::feature_aggregation
