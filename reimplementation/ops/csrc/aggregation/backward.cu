// Deformable aggregation on CUDA, backward.
//
// feature_gradient.cu has the features' gradient. Here are those of weights and locations, which come from the products of
// a sample's four pixels with the output's gradient, group by group:
//
//   gradient of a weight    = sum over corners of corner weight * product of its group
//   gradient of a location  = the same with the slopes of the corner weights, summed over levels and, with weights, groups
//
// One block owns one query, as in the forward:
//
//   1. its threads compact the visible pairs; one thread per sample turns the location into a footprint;
//   2. teams take the samples in turn: one coalesced gather per corner, multiplied with the output's gradient, which stays
//      in registers. The lanes of a group sum its products by halves, so that each lane ends with one of them:
//
//        lanes of a group   0        1        2        3          a lane passes on the half that it need not keep
//        products           a b c d  a b c d  a b c d  a b c d
//                           a b      a b      c d      c d
//                           a        b        c        d
//
//   3. a few lanes per sample put its gradients together, one lane a group.
//
// What remains is the traffic of the gathers, as in the forward. No atomics: the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "aggregation/operands.cuh"
#include "cuda/levels.cuh"
#include "feature_gradient/feature_gradient.cuh"

namespace reimplementation::aggregation {

using feature_gradient::FeatureGradient;
using feature_gradient::SampledOp;

namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;     // a multiprocessor's: many warps, each waiting for the gathers of one sample
constexpr int MAX_GROUPS = 8;     // groups in shared memory at a time: a *pass*
constexpr int STAGED_LEVELS = 8;  // levels of a pair staged together
constexpr int NOWHERE = -1;

// Samples in shared memory at a time; what they need has to fit in the 48 KB that every GPU has.
template <typename T>
constexpr int STAGED_SAMPLES = sizeof(T) == 8 ? 64 : 128;

template <typename T, typename W>
struct Gradients {
  const T* output;          // (batch, queries, channels)
  compute_t<T>* locations;  // zeroed, or null where not needed; so are the weights
  W* weights;
  int64_t location_strides[5];
  int64_t weight_strides[6];
  int pass_groups;  // groups of a pass
  int group_lanes;  // that hold one group's vectors, where the sum by halves fits them; else 0
  int group_steps;  // doubling steps that sum a group's lanes otherwise
};

template <typename T>
struct Shared {
  static constexpr int SAMPLES = STAGED_SAMPLES<T>;

  VisiblePairs<T, THREADS> pairs;
  Four<T> axis_weights[SAMPLES];  // x[0], x[1], y[0], y[1]
  Four<T> axis_slopes[SAMPLES];   // likewise
  Four<int> rows[SAMPLES];        // of the corners; the first is NOWHERE where the level cannot be sampled
  T grad_x[SAMPLES], grad_y[SAMPLES];
  Four<T> products[SAMPLES * MAX_GROUPS];  // by corner: a pixel's features times the output's gradient
};

// Step 1: footprints of samples (pairs first_pair, ... x levels first_level, ...), numbered level by level.
template <typename T, typename W>
__device__ void stage(
    const Operands<T, W>& op,
    int first_pair,
    int num_pairs,
    int first_level,
    int num_levels,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  for (int i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const int entry = first_pair + i % num_pairs;
    const Pair pair(shared.pairs.number[entry], op.points);
    const Level level = op.levels[static_cast<int64_t>(pair.cam) * op.num_levels + first_level + i / num_pairs];
    Axis<C> x = {}, y = {};
    Four<int> rows = {NOWHERE, NOWHERE, NOWHERE, NOWHERE};
    if (!level.empty()) {
      x = bilinear_axis(pixel_position(shared.pairs.x[entry], level.width), level.width);
      y = bilinear_axis(pixel_position(shared.pairs.y[entry], level.height), level.height);
      rows = corner_rows(level, x, y);
    }
    shared.axis_weights[i] = {x.weight[0], x.weight[1], y.weight[0], y.weight[1]};
    shared.axis_slopes[i] = {x.slope[0], x.slope[1], y.slope[0], y.slope[1]};
    shared.rows[i] = rows;
    shared.grad_x[i] = shared.grad_y[i] = 0;
  }
}

// What a lane holds of a pass, and which of the products it ends with.
template <typename T, int VEC, int NV>
struct Lane {
  const T* features[NV];
  compute_t<T> gradient[NV][VEC];  // of the output
  int group[NV];                   // within the pass; NOWHERE for a lane beyond the last channel
  // For `sum_by_halves`: which value it ends with, 4 * k + corner, and that one's group; NOWHERE where another lane has it too.
  int kept, kept_group;
  // For `sum_by_segments`.
  bool head[NV];          // the first lane of its group
  bool begins_group[NV];  // it holds the group's first channel
  int same_group[NV];     // bit `step` tells whether the lane `1 << step` above holds the same group
  unsigned team_mask;

  template <typename W>
  __device__ __forceinline__ Lane(
      const Operands<T, W>& op,
      const Gradients<T, W>& grad,
      const T* first_row,
      const T* grad_output,
      int first_group,
      int first_channel,
      int end_channel) {
    const int lanes = op.lanes;
    const int lane = threadIdx.x & (lanes - 1);
    team_mask = lanes == WARP ? ALL_LANES : ((1u << lanes) - 1) << (threadIdx.x % WARP & ~(lanes - 1));
    kept = 0;
    for (int half = 2 * NV, step = grad.group_lanes / 2; half > 0; half /= 2, step /= 2) {
      kept += lane & step ? half : 0;
    }
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      const int channel = first_channel + (k * lanes + lane) * VEC;
      const bool live = channel < end_channel;
      const int readable = live ? channel : end_channel - VEC;
      features[k] = first_row + readable;
      group[k] = live ? channel / op.group_channels - first_group : NOWHERE;
      const Vector<T, VEC> loaded = load_vector<VEC>(grad_output + readable);
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        gradient[k][v] = live ? loaded[v] : compute_t<T>(0);
      }
      const int group_before = __shfl_up_sync(team_mask, group[k], 1, lanes);
      head[k] = live && (lane == 0 || group_before != group[k]);
      begins_group[k] = channel % op.group_channels == 0;
      same_group[k] = 0;
      for (int step = 0; step < grad.group_steps; ++step) {
        const int group_above = __shfl_down_sync(team_mask, group[k], 1 << step, lanes);
        same_group[k] |= (lane + (1 << step) < lanes && group_above == group[k]) << step;
      }
    }
    kept_group = group[0];
#pragma unroll
    for (int k = 1; k < NV; ++k) {
      kept_group = kept / 4 == k ? group[k] : kept_group;
    }
    if (grad.group_lanes == 0 || lane & (grad.group_lanes / (4 * NV) - 1)) {
      kept_group = NOWHERE;
    }
  }
};

// Sums the products of a group's lanes where these are a power of two and hold no other group: each passes on the half of its
// products that it need not keep, until it has one. Adds that to the totals of its group, which its first channels begin.
template <typename T, typename W, int VEC, int NV>
__device__ __forceinline__ void sum_by_halves(
    const Gradients<T, W>& grad,
    const Lane<T, VEC, NV>& lane,
    bool first_channels,
    compute_t<T> (&products)[4 * NV],
    Four<compute_t<T>>* totals) {
  using C = compute_t<T>;
  int step = grad.group_lanes / 2;
#pragma unroll
  for (int half = 2 * NV; half > 0; half /= 2, step /= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const C passed = upper ? products[j] : products[j + half];
      products[j] = (upper ? products[j + half] : products[j]) + __shfl_xor_sync(lane.team_mask, passed, step);
    }
  }
  for (; step > 0; step /= 2) {
    products[0] += __shfl_xor_sync(lane.team_mask, products[0], step);
  }
  if (lane.kept_group != NOWHERE) {
    C& total = totals[lane.kept_group][lane.kept % 4];
    total = first_channels ? products[0] : total + products[0];
  }
}

// The same wherever groups begin and end among a team's lanes: each adds what the lane `1 << step` above has, if that holds the
// same group, until the group's first lane has all. Whoever holds a group's first channel begins its totals.
template <typename T, typename W, int VEC, int NV>
__device__ __forceinline__ void sum_by_segments(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    const Lane<T, VEC, NV>& lane,
    const compute_t<T> (&products)[4 * NV],
    Four<compute_t<T>>* totals) {
  using C = compute_t<T>;
#pragma unroll
  for (int k = 0; k < NV; ++k) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      C sum = products[4 * k + corner];
      for (int step = 0; step < grad.group_steps; ++step) {
        const C above = __shfl_down_sync(lane.team_mask, sum, 1 << step, op.lanes);
        sum += (lane.same_group[k] >> step & 1) ? above : C(0);
      }
      if (lane.head[k]) {
        C& total = totals[lane.group[k]][corner];
        total = lane.begins_group[k] ? sum : total + sum;
      }
    }
    __syncwarp(lane.team_mask);  // the next vector may hold more of the same group
  }
}

// Step 2 for one sample.
template <typename T, typename W, int VEC, int NV>
__device__ __forceinline__ void gather(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    const Lane<T, VEC, NV>& lane,
    int sample,
    bool first_channels,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const int row_bytes = op.channels * static_cast<int>(sizeof(T));
  const Four<int> rows = shared.rows[sample];
  Vector<T, VEC> corners[NV][4];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      corners[k][corner] = load_vector<VEC>(row_address(lane.features[k], max(rows[corner], 0), row_bytes));
    }
  }
  C products[4 * NV];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      C sum = 0;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        sum += corners[k][corner][v] * lane.gradient[k][v];
      }
      products[4 * k + corner] = sum;
    }
  }
  Four<C>* totals = shared.products + sample * grad.pass_groups;
  if (grad.group_lanes > 0) {
    sum_by_halves(grad, lane, first_channels, products, totals);
    return;
  }
  sum_by_segments(op, grad, lane, products, totals);
}

// Step 3: the gradients of the staged samples' weights, and what the groups of this pass add to their locations.
template <typename T, typename W>
__device__ void finish_samples(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    const W* weights,
    W* grad_weights,
    int first_pair,
    int num_pairs,
    int first_level,
    int num_levels,
    int first_group,
    int num_groups,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  static_assert(MAX_GROUPS == 8, "eight lanes a sample, one group each");
  const int lane = threadIdx.x % MAX_GROUPS;
  const int samples = num_pairs * num_levels;
  // All threads make the same number of rounds: the sum below needs whole warps.
  for (int first = 0; first < samples; first += THREADS / MAX_GROUPS) {
    const int sample = first + threadIdx.x / MAX_GROUPS;
    const bool live = sample < samples && lane < num_groups;
    C grad_x = 0, grad_y = 0;
    if (live) {
      const Four<C> slopes = shared.axis_slopes[sample], axes = shared.axis_weights[sample];
      const Four<C> products = shared.products[sample * grad.pass_groups + lane];
      const int level = sample / num_pairs;
      const Pair pair(shared.pairs.number[first_pair + sample - level * num_pairs], op.points);
      C dots[4], grad_weight = 0;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        // A pixel outside the level was read from its neighbour inside; a level that cannot be sampled has none inside.
        const bool inside = slopes[corner % 2] != 0 && slopes[2 + corner / 2] != 0;
        dots[corner] = inside ? products[corner] : C(0);
        grad_weight += axes[2 + corner / 2] * axes[corner % 2] * dots[corner];
      }
      if (grad.weights != nullptr) {
        grad_weights
            [pair.weights(grad.weight_strides, first_level + level) + (first_group + lane) * grad.weight_strides[5]] =
                from_compute<W>(grad_weight);
      }
      location_gradient(axes, slopes, dots, grad_x, grad_y);
      // A level that cannot be sampled has no gradient, whatever its weight: 0 * NaN would be one.
      const C weight = shared.rows[sample][0] == NOWHERE
          ? C(0)
          : to_compute(
                weights
                    [pair.weights(op.weight_strides, first_level + level) +
                     (first_group + lane) * op.weight_strides[5]]);
      grad_x *= weight;
      grad_y *= weight;
    }
    if (grad.locations != nullptr) {
#pragma unroll
      for (int step = MAX_GROUPS / 2; step > 0; step /= 2) {
        grad_x += __shfl_xor_sync(ALL_LANES, grad_x, step);
        grad_y += __shfl_xor_sync(ALL_LANES, grad_y, step);
      }
      if (live && lane == 0) {
        shared.grad_x[sample] += grad_x;
        shared.grad_y[sample] += grad_y;
      }
    }
  }
}

template <typename T, typename W, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    deformable_aggregation_backward_kernel(const Operands<T, W> op, const Gradients<T, W> grad) {
  using C = compute_t<T>;
  __shared__ Shared<C> shared;
  unsigned batch = blockIdx.x;
  const int query = op.queries.split(batch);
  const C* locations = op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  const W* weights = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1];
  const T* features = op.features + batch * op.levels.num_rows * op.channels;
  const T* grad_output = grad.output + static_cast<int64_t>(blockIdx.x) * op.channels;
  C* grad_locations = grad.locations + batch * grad.location_strides[0] + query * grad.location_strides[1];
  W* grad_weights = grad.weights + batch * grad.weight_strides[0] + query * grad.weight_strides[1];
  const int num_groups = op.channels / op.group_channels;
  const int team = threadIdx.x >> op.log2_lanes;
  const int teams = THREADS >> op.log2_lanes;

  for (int first = 0; first < op.points.divisor * op.num_cams; first += THREADS) {
    const int visible = compact_visible_pairs(op, locations, first, shared.pairs);
    for (int level = 0; level < op.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - level);
      const int pairs_at_once = STAGED_SAMPLES<C> / levels;
      for (int pair = 0; pair < visible; pair += pairs_at_once) {
        const int pairs = min(pairs_at_once, visible - pair);
        const int samples = pairs * levels;
        stage(op, pair, pairs, level, levels, shared);
        __syncthreads();
        for (int group = 0; group < num_groups; group += grad.pass_groups) {
          const int groups = min(grad.pass_groups, num_groups - group);
          const int first_channel = group * op.group_channels, end_channel = first_channel + groups * op.group_channels;
          for (int channel = first_channel; channel < end_channel; channel += op.lanes * NV * VEC) {
            const Lane<T, VEC, NV> lane(op, grad, features, grad_output, group, channel, end_channel);
            for (int sample = team; sample < samples; sample += teams) {
              gather(op, grad, lane, sample, channel == first_channel, shared);
            }
          }
          __syncthreads();
          finish_samples(op, grad, weights, grad_weights, pair, pairs, level, levels, group, groups, shared);
          __syncthreads();
        }
        if (grad.locations != nullptr && threadIdx.x < pairs) {
          C x = 0, y = 0;
          for (int i = 0; i < levels; ++i) {
            x += shared.grad_x[i * pairs + threadIdx.x];
            y += shared.grad_y[i * pairs + threadIdx.x];
          }
          C* location =
              grad_locations + Pair(shared.pairs.number[pair + threadIdx.x], op.points).location(grad.location_strides);
          const int64_t next = grad.location_strides[4];
          location[0] = level == 0 ? x : location[0] + x;
          location[next] = level == 0 ? y : location[next] + y;
        }
        __syncthreads();
      }
    }
  }
}

template <typename T, typename W, int VEC, int NV>
void launch(
    const Sizes& sizes,
    const Tensor& features,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    Gradients<T, W> grad,
    cudaStream_t stream) {
  auto op = operands<T, W>(sizes, features, levels, locations, weights);
  // A pass takes whole groups: as many as a team of a warp spans, or one that takes several goes.
  grad.pass_groups = std::clamp<int>(
      WARP * VEC * NV / op.group_channels, 1, std::min<int>(MAX_GROUPS, op.channels / op.group_channels));
  set_team(op, grad.pass_groups * op.group_channels, VEC * NV);
  const int group_lanes = std::min(op.lanes, op.group_channels / VEC);  // at most, of one vector
  const int vector_channels = group_lanes * VEC;
  const bool whole_vectors = NV == 1 ? op.group_channels % vector_channels == 0 : op.group_channels == vector_channels;
  if (whole_vectors && group_lanes == 1 << ceil_log2(group_lanes) && group_lanes >= 4 * NV) {
    grad.group_lanes = group_lanes;
  } else {
    grad.group_steps = ceil_log2(group_lanes);
  }
  deformable_aggregation_backward_kernel<T, W, VEC, NV><<<query_blocks(sizes), THREADS, 0, stream>>>(op, grad);
  check_launch("deformable_aggregation_backward");
}

SampledOp sampled_op(const Sizes& sizes, const LevelTable& levels, const Tensor& locations, const Tensor& weights) {
  SampledOp op = {};
  op.batch = sizes.batch;
  op.heads = 1;
  op.queries = sizes.num_queries;
  op.points = sizes.num_points;
  op.cams = sizes.num_cams;
  op.levels = sizes.num_levels;
  op.rows = sizes.num_rows;
  op.channels = sizes.channels;
  op.groups = sizes.num_groups;
  op.unit_square = true;
  op.level_table = levels;
  op.locations = with_short_steps(locations);
  op.weights = with_short_steps(weights);
  const auto of_location = [&](int64_t dim) { return step(op.locations, dim); };
  const auto of_weight = [&](int64_t dim) { return step(op.weights, dim); };
  op.location_steps = {of_location(0), 0, of_location(1), of_location(2), of_location(3), 0, of_location(4)};
  op.weight_steps = {of_weight(0), 0, of_weight(1), of_weight(2), of_weight(3), of_weight(4), of_weight(5)};
  return op;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights,
    bool needs_feature_maps,
    bool needs_sampling_location,
    bool needs_weights,
    bool deterministic) {
  const auto sizes = check(feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  check_gradient(grad_output, feature_maps, sizes);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());

  const Tensor features = as_contiguous(feature_maps);
  const Tensor grad = as_contiguous(grad_output);
  if (sizes.nothing_to_sample()) {
    return {
        zero_gradient_of(features, needs_feature_maps), zero_gradient_of(sampling_location, needs_sampling_location),
        zero_gradient_of(weights, needs_weights)};
  }
  const cudaStream_t stream = current_stream(features.get_device_index());
  const DeviceLevels levels(spatial_shape, scale_start_index, features, sizes.num_rows, stream);
  const bool needs_others = needs_sampling_location || needs_weights;
  std::optional<FeatureGradient> features_gradient;

  if (needs_feature_maps) {
    features_gradient.emplace(
        sampled_op(sizes, levels.table(), sampling_location, weights), grad, features, deterministic, needs_others,
        stream);
  }
  // The kernel writes only those of visible pairs. (After that: meanwhile they are filled.)
  Tensor grad_locations = zero_gradient_of(sampling_location, needs_sampling_location);
  Tensor grad_weights = zero_gradient_of(weights, needs_weights);
  if (needs_others) {
    dispatch_types(features, weights, [&](auto* t, auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using W = std::remove_pointer_t<decltype(w)>;
      Gradients<T, W> gradients = {};
      gradients.output = static_cast<const T*>(grad.const_data_ptr());
      if (needs_sampling_location) {
        gradients.locations = static_cast<compute_t<T>*>(grad_locations.mutable_data_ptr());
        copy_strides(grad_locations, gradients.location_strides);
      }
      if (needs_weights) {
        gradients.weights = static_cast<W*>(grad_weights.mutable_data_ptr());
        copy_strides(grad_weights, gradients.weight_strides);
      }
      constexpr int VEC = 16 / sizeof(T);
      if (can_vectorize<T>(sizes, features, VEC) && can_vectorize<T>(sizes, grad, VEC)) {
        launch<T, W, VEC, sizeof(T) == 2 ? 1 : 2>(
            sizes, features, levels.table(), sampling_location, weights, gradients, stream);
      } else {
        launch<T, W, 1, 4>(sizes, features, levels.table(), sampling_location, weights, gradients, stream);
      }
    });
  }
  return {features_gradient ? features_gradient->finish() : gradient_of(features, false), grad_locations, grad_weights};
}

}  // namespace reimplementation::aggregation
