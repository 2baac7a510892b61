// Deformable feature aggregation on CUDA, forward.
//
// One block owns one query:
//
//   1. its threads share out the logits, group by group, and merge what they found: the largest one, and the sum of the
//      exponentials;
//   2. they project the key points and compact the visible pairs in a fixed order;
//   3. one thread per sample turns the location into a footprint in shared memory: four rows, four weights; the threads
//      of step 1 put the weights of its groups beside it;
//   4. teams take the samples in turn: one broadcast read of the footprint, one coalesced gather per corner.
//
// Steps 2 and 4 are those of aggregation/forward.cu, and 4 is what takes the time. Neither locations nor weights are
// ever in global memory; what is kept for the backward are two numbers a group. No atomics: the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/levels.cuh"
#include "feature_aggregation/operands.cuh"

namespace reimplementation::feature_aggregation {
namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;         // a multiprocessor's: 72 registers, enough for two samples in flight
constexpr int STAGED_SAMPLES = 128;   // footprints in shared memory at a time, at most
constexpr int STAGED_WEIGHTS = 1024;  // and weights of theirs
constexpr int STAGED_LEVELS = 4;      // levels of a pair staged together
constexpr int MOST_GROUPS = STAGED_WEIGHTS / STAGED_LEVELS;  // of the channels that a block spans

// What teams share out: channels first, ..., first + lanes * NV * VEC - 1, in groups first_group, ... of which there
// are `groups`.
struct Span {
  int lanes, log2_lanes;
  int first_channel, first_group, groups;
};

template <typename C>
struct Samples {
  Four<C> corner_weights[STAGED_SAMPLES];
  Four<int> rows[STAGED_SAMPLES];  // the first is -1 where there is nothing to read
  int cams[STAGED_SAMPLES];
  int places[STAGED_SAMPLES];  // of the first group's logit in a camera's row
  C weights[STAGED_WEIGHTS];   // of the span's groups, sample by sample
};

template <typename C, int VEC, int NV>
struct Shared {
  Softmax<C> softmax[MOST_GROUPS];  // in the end the largest logit, and what takes exponentials to weights
  union {
    struct {
      VisiblePairs<C, THREADS> pairs;
      Samples<C> samples;
      Level levels[THREADS];  // of all cameras, where they are so few
    };
    Softmax<C> partial[THREADS];
    C team_sums[THREADS * NV * VEC];
  };

  __device__ Shared() {}
};

// Footprints of samples (pairs first_pair, ... x levels first_level, ...), numbered level by level. Returns whether one
// of them lies in an empty level.
template <typename T, typename L, int VEC, int NV>
__device__ __forceinline__ bool stage_footprints(
    const Inputs<T, L>& in,
    int first_pair,
    unsigned num_pairs,
    int first_level,
    unsigned num_levels,
    Shared<compute_t<T>, VEC, NV>& shared) {
  const auto& pairs = shared.pairs;
  auto& samples = shared.samples;
  bool any_empty = false;
  for (unsigned i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const unsigned staged_level = i / num_pairs;
    const int level_number = first_level + staged_level;
    const int entry = first_pair + i - staged_level * num_pairs;
    unsigned cam = pairs.number[entry];
    const int point = in.points.split(cam);
    const int64_t number = static_cast<int64_t>(cam) * in.num_levels + level_number;
    const Level level = in.has_few_levels(THREADS) ? shared.levels[number] : in.levels[number];
    samples.cams[i] = cam;
    samples.places[i] = (level_number * in.points.divisor + point) * in.num_groups;
    if (level.empty()) {
      samples.rows[i] = {-1, -1, -1, -1};
      any_empty = true;
      continue;
    }
    const auto x = bilinear_axis(pixel_position(pairs.x[entry], level.width), level.width);
    const auto y = bilinear_axis(pixel_position(pairs.y[entry], level.height), level.height);
    samples.corner_weights[i] = corner_weights(x, y);
    samples.rows[i] = corner_rows(level, x, y);
  }
  return any_empty;
}

template <typename T, typename L, int VEC, int NV>
__device__ __forceinline__ void stage_weights(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    const Span& span,
    int count,
    Shared<compute_t<T>, VEC, NV>& shared) {
  using C = compute_t<T>;
  auto& samples = shared.samples;
  for (int first_group = 0; first_group < span.groups; first_group += THREADS) {
    const Share<THREADS> share(min(THREADS, span.groups - first_group));
    const int group = first_group + share.group;
    const Softmax<C> softmax = shared.softmax[group];
    for (int sample = share.first; sample < count; sample += share.step) {
      const C logit = query.logit(samples.cams[sample], in.row, samples.places[sample] + span.first_group + group);
      samples.weights[sample * span.groups + group] = exponential(logit - softmax.largest) * softmax.sum;
    }
  }
}

// Gathers `COUNT` samples, `stride` apart, all loads before the first sum.
template <int COUNT, typename T, int VEC, int NV>
__device__ __forceinline__ void gather(
    const Samples<compute_t<T>>& samples,
    int sample,
    int stride,
    const T* const (&features)[NV],
    const int (&groups)[NV],
    int num_groups,
    int row_bytes,
    compute_t<T> (&sums)[NV][VEC]) {
  Vector<T, VEC> corners[COUNT][NV][4];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<int> rows = samples.rows[sample + i * stride];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        corners[i][k][corner] = load_vector<VEC>(row_address(features[k], rows[corner], row_bytes));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<compute_t<T>> corner_weights = samples.corner_weights[sample + i * stride];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      const compute_t<T> group_weight = samples.weights[(sample + i * stride) * num_groups + groups[k]];
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const compute_t<T> weight = corner_weights[corner] * group_weight;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          sums[k][v] += weight * corners[i][k][corner][v];
        }
      }
    }
  }
}

// Step 1: leaves in shared memory what makes weights of logits, and writes what the backward needs of it.
template <typename T, typename L, int VEC, int NV>
__device__ __forceinline__ void prepare_weights(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    const Span& span,
    compute_t<T>* statistics,
    Shared<compute_t<T>, VEC, NV>& shared) {
  for (int first = 0; first < span.groups; first += THREADS) {
    const int count = min(THREADS, span.groups - first);
    find_softmax<THREADS>(in, query, span.first_group + first, count, shared.partial, shared.softmax + first);
  }
  for (int i = threadIdx.x; i < span.groups; i += THREADS) {
    const int group = span.first_group + i;
    if (group * in.group_channels >= span.first_channel) {  // else the block of the group's first channel does
      compute_t<T>* of_group = statistics + (query.number * in.num_groups + group) * 2;
      of_group[0] = shared.softmax[i].largest;
      of_group[1] = shared.softmax[i].sum;
    }
    shared.softmax[i].sum = in.kept_scale / shared.softmax[i].sum;
  }
  __syncthreads();
}

template <typename T, typename L, int VEC, int NV, int IN_FLIGHT>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) deformable_feature_aggregation_forward(
    const Inputs<T, L> in, Span span, T* __restrict__ output, compute_t<T>* __restrict__ statistics) {
  using C = compute_t<T>;
  __shared__ Shared<C, VEC, NV> shared;
  unsigned batch = blockIdx.x;
  in.queries.split(batch);
  const Query<T, L> query(in, blockIdx.x, batch);
  span.first_channel = (blockIdx.z * gridDim.y + blockIdx.y) * (span.lanes * NV * VEC);
  if (span.first_channel >= in.channels) {
    return;
  }
  span.first_group = span.first_channel / in.group_channels;
  span.groups =
      (min(span.first_channel + span.lanes * NV * VEC, in.channels) - 1) / in.group_channels - span.first_group + 1;
  prepare_weights(in, query, span, statistics, shared);

  const int lane = threadIdx.x & (span.lanes - 1);
  const int team = threadIdx.x >> span.log2_lanes;
  const int teams = THREADS >> span.log2_lanes;
  const T* features[NV];
  int groups[NV];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
    // Lanes beyond the last channel read it once more and write nothing.
    const int channel = min(span.first_channel + (k * span.lanes + lane) * VEC, in.channels - VEC);
    features[k] = in.features + batch * in.levels.num_rows * in.channels + channel;
    groups[k] = channel / in.group_channels - span.first_group;
  }
  const int last = THREADS - 1 - static_cast<int>(threadIdx.x);
  if (in.has_few_levels(THREADS) && last < in.num_cams * in.num_levels) {
    shared.levels[last] = in.levels[last];
  }

  const int row_bytes = in.channels * static_cast<int>(sizeof(T));
  const int most_samples = min(STAGED_SAMPLES, STAGED_WEIGHTS / span.groups);
  C sums[NV][VEC] = {};
  for (int first = 0; first < in.num_pairs(); first += THREADS) {
    const int visible = compact_visible_pairs(in, query, first, shared.pairs, [](int, const Location<C>&, bool) {});
    for (int level = 0; level < in.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, in.num_levels - level);
      const int pairs_at_once = most_samples / levels;
      for (int pair = 0; pair < visible; pair += pairs_at_once) {
        const int pairs = min(pairs_at_once, visible - pair);
        const int samples = pairs * levels;
        const bool any_empty = __syncthreads_or(stage_footprints(in, pair, pairs, level, levels, shared));
        stage_weights(in, query, span, samples, shared);
        __syncthreads();
        int sample = team;
        for (; !any_empty && sample + (IN_FLIGHT - 1) * teams < samples; sample += IN_FLIGHT * teams) {
          gather<IN_FLIGHT, T, VEC, NV>(shared.samples, sample, teams, features, groups, span.groups, row_bytes, sums);
        }
        for (; sample < samples; sample += teams) {
          if (!any_empty || shared.samples.rows[sample][0] >= 0) {
            gather<1, T, VEC, NV>(shared.samples, sample, teams, features, groups, span.groups, row_bytes, sums);
          }
        }
        __syncthreads();
      }
    }
  }

  __syncthreads();  // a query that nothing sees comes here straight from the compaction
  const int team_channels = span.lanes * NV * VEC;
#pragma unroll
  for (int k = 0; k < NV; ++k) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      shared.team_sums[team * team_channels + (k * span.lanes + lane) * VEC + v] = sums[k][v];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < team_channels && span.first_channel + i < in.channels; i += THREADS) {
    C sum = 0;
    for (int s = 0; s < teams; ++s) {
      sum += shared.team_sums[s * team_channels + i];
    }
    output[query.number * in.channels + span.first_channel + i] = from_compute<T>(sum);
  }
}

template <typename T, typename L, int VEC, int NV, int IN_FLIGHT>
void launch(
    const Sizes& sizes, const Inputs<T, L>& in, const Tensor& output, const Tensor& statistics, cudaStream_t stream) {
  static_assert(WARP * VEC * NV <= MOST_GROUPS, "a block may have a group for each of its channels");
  Span span = {};
  span.log2_lanes = log2_lanes(in.channels, VEC * NV);
  span.lanes = 1 << span.log2_lanes;
  const int block_channels = span.lanes * NV * VEC;
  const int64_t channel_blocks = (in.channels + block_channels - 1) / block_channels;
  const dim3 grid(
      static_cast<unsigned>(count_queries(sizes)), std::min(channel_blocks, MOST_BLOCKS),
      (channel_blocks + MOST_BLOCKS - 1) / MOST_BLOCKS);
  deformable_feature_aggregation_forward<T, L, VEC, NV, IN_FLIGHT><<<grid, THREADS, 0, stream>>>(
      in, span, static_cast<T*>(output.mutable_data_ptr()), static_cast<compute_t<T>*>(statistics.mutable_data_ptr()));
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
  std::optional<Tensor> hidden;
  if (visible_only) {
    hidden = find_hidden(sizes, readable, stream);
  }

  dispatch_types(readable.features, readable.logits, [&](auto* t, auto* l) {
    using T = std::remove_pointer_t<decltype(t)>;
    using L = std::remove_pointer_t<decltype(l)>;
    const auto in = inputs_of<T, L>(sizes, readable, levels.table(), hidden, attn_drop);
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, readable.features, VEC)) {
      launch<T, L, VEC, sizeof(T) == 2 ? 1 : 2, 2>(sizes, in, output, statistics, stream);
    } else {
      launch<T, L, 1, 4, 1>(sizes, in, output, statistics, stream);
    }
  });
  return {output, statistics};
}

}  // namespace reimplementation::feature_aggregation
