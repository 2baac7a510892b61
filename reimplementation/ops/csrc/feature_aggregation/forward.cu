// Deformable feature aggregation on CUDA, forward.
//
// One block owns one query, or, where queries are few, some of its key points:
//
//   1. its threads share out the logits, group by group, and merge what they found: the largest one, and the sum of the
//      exponentials. (Where blocks share a query, a kernel before this one did.)
//   2. they project the key points and compact the visible pairs in a fixed order;
//   3. one thread per sample turns the location into a footprint in shared memory: four rows, four weights; the threads
//      of step 1 put the weights of its groups beside it;
//   4. teams take the samples in turn (sampling/gather.cuh): one broadcast read of the footprint, one coalesced gather
//      per corner.
//
// Steps 2 and 4 are those of aggregation/forward.cu, and 4 is what takes the time. Neither locations nor weights are
// ever in global memory; what is kept for the backward are two numbers a group. No atomics: the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/levels.cuh"
#include "feature_aggregation/softmax.cuh"
#include "sampling/gather.cuh"
#include "sampling/shared_outputs.cuh"

namespace reimplementation::feature_aggregation {

using sampling::Gatherer;
using sampling::SharedOutputs;
using sampling::Span;
using sampling::Sums;

namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;         // a multiprocessor's: 72 registers, enough for two samples in flight
constexpr int STAGED_SAMPLES = 128;   // footprints in shared memory at a time, at most
constexpr int STAGED_WEIGHTS = 1024;  // and weights of theirs
constexpr int STAGED_LEVELS = 4;      // levels of a pair staged together
constexpr int MOST_GROUPS = STAGED_WEIGHTS / STAGED_LEVELS;  // of the channels that a block spans

// Where the first group's logits of a sample are: the query's, and the camera's if it has a term of its own.
struct Places {
  int of_query, of_camera;
};

template <typename C, int VEC, int NV>
struct Shared {
  Softmax<C> softmax[MOST_GROUPS];  // the largest logit, and what takes exponentials to weights
  union {
    struct {
      sampling::VisiblePairs<C, THREADS> pairs;
      sampling::Footprints<C, STAGED_SAMPLES> footprints;
      Places places[STAGED_SAMPLES];
      C weights[STAGED_WEIGHTS];  // of the span's groups, sample by sample
      Level levels[THREADS];      // of all cameras, where they are so few
    };
    Softmax<C> partial[THREADS];
    C team_sums[THREADS * NV * VEC];
  };

  __device__ Shared() {}
};

// The groups of a span.
struct Groups {
  int first, count;

  __device__ __forceinline__ Groups(const Span& span, int group_channels)
      : first(span.first / group_channels),
        count((span.end - 1) / group_channels - first + 1) {}
};

// Step 1: leaves in shared memory what makes weights of logits, and writes what the backward needs of it.
template <typename T, typename L, int VEC, int NV>
__device__ __forceinline__ void prepare_weights(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    const Span& span,
    const Groups& groups,
    compute_t<T>* statistics,
    Shared<compute_t<T>, VEC, NV>& shared) {
  using C = compute_t<T>;
  if (in.shares.blocks.divisor > 1) {
    for (int i = threadIdx.x; i < groups.count; i += THREADS) {
      const C* of_group = query.statistics + (groups.first + i) * 2;
      shared.softmax[i] = {of_group[0], in.kept_scale / of_group[1]};
    }
    __syncthreads();
    return;
  }
  for (int first = 0; first < groups.count; first += THREADS) {
    const int count = min(THREADS, groups.count - first);
    const Softmax<C> softmax = find_softmax<THREADS>(in, query, groups.first + first, count, shared.partial);
    if (threadIdx.x < count) {
      const int group = groups.first + first + threadIdx.x;
      shared.softmax[first + threadIdx.x] = {softmax.largest, in.kept_scale / softmax.sum};
      if (group * in.group_channels >= span.first) {  // else the block of the group's first channel does
        C* of_group = statistics + (query.number * in.num_groups + group) * 2;
        of_group[0] = softmax.largest;
        of_group[1] = softmax.sum;
      }
    }
    __syncthreads();
  }
}

// Step 3 for samples (pairs first_pair, ... x levels first_level, ...), numbered level by level. Returns whether one of
// them lies in an empty level.
template <typename T, typename L, int VEC, int NV>
__device__ __forceinline__ bool stage_footprints(
    const Inputs<T, L>& in,
    int first_pair,
    unsigned num_pairs,
    int first_level,
    unsigned num_levels,
    Shared<compute_t<T>, VEC, NV>& shared) {
  bool any_empty = false;
  for (unsigned i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const unsigned staged_level = i / num_pairs;
    const int level_number = first_level + staged_level;
    const int entry = first_pair + i - staged_level * num_pairs;
    const Pair pair = shared.pairs.pair[entry];
    const int64_t number = static_cast<int64_t>(pair.cam) * in.num_levels + level_number;
    const Level level = in.has_few_levels(THREADS) ? shared.levels[number] : in.levels[number];
    any_empty |= shared.footprints.set(i, level, shared.pairs.x[entry], shared.pairs.y[entry]);
    const int place = in.place(level_number, pair.point), in_camera = pair.cam * in.row + place;
    shared.places[i] = {in.camera_logits == nullptr ? in_camera : place, in_camera};
  }
  return any_empty;
}

template <typename T, typename L, int VEC, int NV>
__device__ __forceinline__ void stage_weights(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    const Groups& groups,
    int samples,
    Shared<compute_t<T>, VEC, NV>& shared) {
  using C = compute_t<T>;
  for (int first = 0; first < groups.count; first += THREADS) {
    const Share<THREADS> share(min(THREADS, groups.count - first));
    const int group = first + share.group, number = groups.first + group;
    const Softmax<C> softmax = shared.softmax[group];
    for (int sample = share.first; sample < samples; sample += share.step) {
      const Places places = shared.places[sample];
      C logit = to_compute(query.logits[places.of_query + number]);
      if (query.camera_logits != nullptr) {
        logit += to_compute(query.camera_logits[places.of_camera + number]);
      }
      shared.weights[sample * groups.count + group] = exponential(logit - softmax.largest) * softmax.sum;
    }
  }
}

template <typename T, typename L, int VEC, int NV, int IN_FLIGHT>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) deformable_feature_aggregation_forward(
    const Inputs<T, L> in, int log2_lanes, const Sums<T> sums, compute_t<T>* __restrict__ statistics) {
  using C = compute_t<T>;
  __shared__ Shared<C, VEC, NV> shared;
  unsigned number = blockIdx.x;
  const Points points = in.shares.take(number);
  unsigned batch = number;
  in.queries.split(batch);
  const Query<T, L> query(in, number, static_cast<int>(batch));
  const Span span = Span::of_block<NV * VEC>(log2_lanes, in.channels);
  if (span.first >= in.channels) {
    return;
  }
  const Groups groups(span, in.group_channels);
  prepare_weights(in, query, span, groups, statistics, shared);
  Gatherer<T, VEC, NV, THREADS> gatherer(span, in.features + batch * in.levels.num_rows * in.channels, in.channels);
  int in_groups[NV];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
    in_groups[k] = gatherer.channels[k] / in.group_channels - groups.first;
  }

  const int last = THREADS - 1 - static_cast<int>(threadIdx.x);
  if (in.has_few_levels(THREADS) && last < in.num_cams * in.num_levels) {
    shared.levels[last] = in.levels[last];
  }
  const int most_samples = min(STAGED_SAMPLES, STAGED_WEIGHTS / groups.count);
  const int numbers = in.shares.numbers_by_camera(in.num_cams);
  for (int first = 0; first < numbers; first += THREADS) {
    const int visible = compact_visible_pairs(in, query, points, first, shared.pairs);
    for (int level = 0; level < in.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, in.num_levels - level);
      const int pairs_at_once = most_samples / levels;
      for (int pair = 0; pair < visible; pair += pairs_at_once) {
        const int pairs = min(pairs_at_once, visible - pair);
        const bool any_empty = __syncthreads_or(stage_footprints(in, pair, pairs, level, levels, shared));
        stage_weights(in, query, groups, pairs * levels, shared);
        __syncthreads();
        gatherer.template add<IN_FLIGHT>(shared.footprints, pairs * levels, any_empty, [&](int sample, int k) {
          return shared.weights[sample * groups.count + in_groups[k]];
        });
        __syncthreads();
      }
    }
  }
  __syncthreads();  // a query that nothing sees comes here straight from the compaction
  gatherer.finish(
      span, shared.team_sums, [&](int channel, C sum) { sums.write(number, blockIdx.x, in.channels, channel, sum); });
}

template <int VEC, int NV, int IN_FLIGHT, typename T, typename L>
void launch(
    const Sizes& sizes, const Inputs<T, L>& in, const Sums<T>& sums, const Tensor& statistics, cudaStream_t stream) {
  static_assert(WARP * VEC * NV <= MOST_GROUPS, "a block may have a group for each of its channels");
  const int lanes = log2_lanes(in.channels, VEC * NV);
  const dim3 grid =
      sampling::grid_of_spans(count_queries(sizes) * in.shares.blocks.divisor, in.channels, lanes, VEC * NV);
  deformable_feature_aggregation_forward<T, L, VEC, NV, IN_FLIGHT>
      <<<grid, THREADS, 0, stream>>>(in, lanes, sums, static_cast<compute_t<T>*>(statistics.mutable_data_ptr()));
  check_launch("deformable_feature_aggregation");
}

}  // namespace

std::tuple<Tensor, Tensor> forward_cuda(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh,
    const Tensor& logits,
    const std::optional<Tensor>& camera_logits,
    const std::optional<Tensor>& keep,
    double attn_drop,
    bool visible_only) {
  const Operands op{feature_maps, spatial_shape, scale_start_index, key_points, projection_mat,
                    image_wh,     logits,        camera_logits,     keep};
  const Sizes sizes = check(op, attn_drop);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());
  const std::initializer_list<int64_t> output_shape = {sizes.batch, sizes.num_queries, sizes.channels};
  const std::initializer_list<int64_t> statistics_shape = {sizes.batch, sizes.num_queries, sizes.num_groups, 2};
  if (sizes.nothing_to_sample()) {
    return {allocate_zeros(feature_maps, output_shape), allocate_zeros(key_points, statistics_shape)};
  }
  const ReadableOperands readable(op);
  const Tensor output = allocate(feature_maps, output_shape), statistics = allocate(key_points, statistics_shape);
  const cudaStream_t stream = current_stream(feature_maps.get_device_index());
  const DeviceLevels levels(spatial_shape, scale_start_index, readable.features, sizes.num_rows, stream);
  const Shares shares = Shares::of<THREADS>(
      count_queries(sizes), sizes.num_points, sizes.num_cams, MIN_BLOCKS, feature_maps.get_device_index());
  const SharedOutputs outputs(output, shares);
  std::optional<Tensor> hidden;
  if (visible_only) {
    hidden = find_hidden(sizes, readable, stream);
  }

  const std::optional<Tensor> combined = combine_cameras(sizes, readable, visible_only, stream);
  dispatch_types(readable.features, readable.logits, [&](auto* t, auto* l) {
    using T = std::remove_pointer_t<decltype(t)>;
    using L = std::remove_pointer_t<decltype(l)>;
    const auto in = inputs_of<T, L>(sizes, shares, readable, combined, statistics, levels.table(), hidden, attn_drop);
    if (shares.blocks.divisor > 1) {
      find_statistics(sizes, in, statistics, stream);
    }
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, readable.features, VEC)) {
      launch<VEC, sizeof(T) == 2 ? 1 : 2, 2>(sizes, in, outputs.sums<T>(), statistics, stream);
    } else {
      launch<1, 4, 1>(sizes, in, outputs.sums<T>(), statistics, stream);
    }
  });
  outputs.finish(stream);
  return {output, statistics};
}

}  // namespace reimplementation::feature_aggregation
