// Deformable aggregation on CUDA, backward.
//
// feature_gradient.cu has the features' gradient. Here are those of weights and locations, which come from the products of
// a sample's four pixels with the output's gradient, group by group:
//
//   gradient of a weight    = sum over corners of corner weight * product of its group
//   gradient of a location  = the same with the slopes of the corner weights, summed over levels and, with weights, groups
//
// One block owns one query, or, where queries are few, some of its key points:
//
//   1. its threads compact the visible pairs; one thread per sample turns the location into a footprint;
//   2. teams take the samples in turn: one coalesced gather per corner, multiplied with the output's gradient, which stays
//      in registers, and summed over each group (sampling/group_products.cuh);
//   3. a few lanes per sample put its gradients together, one lane a group.
//
// What remains is the traffic of the gathers, as in the forward. No atomics: the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "aggregation/operands.cuh"
#include "cuda/levels.cuh"
#include "feature_gradient/feature_gradient.cuh"
#include "sampling/group_products.cuh"

namespace reimplementation::aggregation {

using feature_gradient::FeatureGradient;
using feature_gradient::SampledOp;
using sampling::MAX_GROUPS;
using sampling::Teams;

namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;     // a multiprocessor's: many warps, each waiting for the gathers of one sample
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
};

template <typename T>
struct Shared {
  static constexpr int SAMPLES = STAGED_SAMPLES<T>;

  sampling::VisiblePairs<T, THREADS> pairs;
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
    const Pair pair = shared.pairs.pair[entry];
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
    int pass_groups,
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
      const Four<C> products = shared.products[sample * pass_groups + lane];
      const int level = sample / num_pairs;
      const Pair pair = shared.pairs.pair[first_pair + sample - level * num_pairs];
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
            [op.weight_offset(pair, first_level + level, grad.weight_strides) +
             (first_group + lane) * grad.weight_strides[5]] = from_compute<W>(grad_weight);
      }
      location_gradient(axes, slopes, dots, grad_x, grad_y);
      // A level that cannot be sampled has no gradient, whatever its weight: 0 * NaN would be one.
      const C weight = shared.rows[sample][0] == NOWHERE
          ? C(0)
          : to_compute(
                weights
                    [op.weight_offset(pair, first_level + level, op.weight_strides) +
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
    deformable_aggregation_backward_kernel(const Operands<T, W> op, const Gradients<T, W> grad, const Teams teams) {
  using C = compute_t<T>;
  __shared__ Shared<C> shared;
  unsigned number = blockIdx.x;
  const Points points = op.shares.take(number);
  unsigned batch = number;
  const int query = op.queries.split(batch);
  const C* locations = op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  const W* weights = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1];
  const T* features = op.features + batch * op.levels.num_rows * op.channels;
  const T* grad_output = grad.output + static_cast<int64_t>(number) * op.channels;
  C* grad_locations = grad.locations + batch * grad.location_strides[0] + query * grad.location_strides[1];
  W* grad_weights = grad.weights + batch * grad.weight_strides[0] + query * grad.weight_strides[1];
  const int num_groups = op.channels / op.group_channels;

  const int numbers = op.shares.numbers_by_camera(op.cams);
  for (int first = 0; first < numbers; first += THREADS) {
    const Pair own = op.shares.pair_by_camera(points, first + threadIdx.x);
    const bool exists = own.cam < op.cams && own.point < points.end;
    const int visible = compact_visible_pairs(op, locations, own, exists, shared.pairs);
    for (int level = 0; level < op.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - level);
      const int pairs_at_once = STAGED_SAMPLES<C> / levels;
      for (int pair = 0; pair < visible; pair += pairs_at_once) {
        const int pairs = min(pairs_at_once, visible - pair);
        const int samples = pairs * levels;
        stage(op, pair, pairs, level, levels, shared);
        __syncthreads();
        for (int group = 0; group < num_groups; group += teams.pass_groups) {
          const int groups = min(teams.pass_groups, num_groups - group);
          sampling::multiply_samples<VEC, NV, THREADS>(
              teams, features, grad_output, group, groups, shared.rows, samples, shared.products);
          __syncthreads();
          finish_samples(
              op, grad, weights, grad_weights, pair, pairs, level, levels, group, groups, teams.pass_groups, shared);
          __syncthreads();
        }
        if (grad.locations != nullptr && threadIdx.x < pairs) {
          C x = 0, y = 0;
          for (int i = 0; i < levels; ++i) {
            x += shared.grad_x[i * pairs + threadIdx.x];
            y += shared.grad_y[i * pairs + threadIdx.x];
          }
          C* location =
              grad_locations + op.location_offset(shared.pairs.pair[pair + threadIdx.x], grad.location_strides);
          const int64_t next = grad.location_strides[4];
          location[0] = level == 0 ? x : location[0] + x;
          location[next] = level == 0 ? y : location[next] + y;
        }
        __syncthreads();
      }
    }
  }
}

template <int VEC, int NV, typename T, typename W>
void launch(const Sizes& sizes, const Operands<T, W>& op, const Gradients<T, W>& grad, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(count_queries(sizes) * op.shares.blocks.divisor);
  deformable_aggregation_backward_kernel<T, W, VEC, NV>
      <<<blocks, THREADS, 0, stream>>>(op, grad, sampling::teams_of<VEC, NV>(op.channels, op.group_channels));
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
      const Shares shares = Shares::of<THREADS>(
          count_queries(sizes), sizes.num_points, sizes.num_cams, MIN_BLOCKS, features.get_device_index());
      const auto op = operands<T, W>(sizes, shares, features, levels.table(), sampling_location, weights);
      constexpr int VEC = 16 / sizeof(T);
      if (can_vectorize<T>(sizes, features, VEC) && can_vectorize<T>(sizes, grad, VEC)) {
        launch<VEC, sizeof(T) == 2 ? 1 : 2>(sizes, op, gradients, stream);
      } else {
        launch<1, 4>(sizes, op, gradients, stream);
      }
    });
  }
  return {features_gradient ? features_gradient->finish() : gradient_of(features, false), grad_locations, grad_weights};
}

}  // namespace reimplementation::aggregation
