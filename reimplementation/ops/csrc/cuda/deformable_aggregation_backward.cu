// Deformable aggregation on CUDA, backward.
//
// With s[row, g] the product of group g of a feature row and of the output's gradient, and u[row, g] the sum of
// corner weight * group weight over all corners of the query's samples that lie on that row:
//
//   gradient of a weight    = sum over its sample's corners of corner weight * s[row of the corner, g]
//   gradient of a location  = the same with the slopes of the corner weights, summed over g with the weights
//   gradient of a row       = u[row, g] * the output's gradient
//
// All of a query's samples meet the features through s and u alone, so each distinct row is read once and added to once,
// however many corners lie on it: key points of one box crowd into few pixels, above all in the coarse levels. One block
// owns one query:
//
//   1. its threads compact the visible pairs; one thread per sample computes the footprint and enters its four
//      rows in a hash table in shared memory; each row heads a chain of its corners;
//   2. one thread per row and group follows the row's chain for u;
//   3. teams take the distinct rows in turn: gather the row, sum s over the lanes of a group, and add u * gradient to
//      the row, atomically and in vectors of 16 bytes where the GPU can;
//   4. a few lanes per sample put the gradients of weights and location together from s.
//
// Step 3 moves 2 * C elements a distinct row; the rest happens in shared memory. Only the row gradients, which different
// queries add to, depend on the order of atomics.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "deformable_aggregation.cuh"
#include "deterministic_backward.cuh"

namespace reimplementation::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int MAX_GROUPS = 8;     // groups in shared memory at a time: a *pass*
constexpr int STAGED_LEVELS = 8;  // levels of a pair staged together
constexpr int MIN_BLOCKS = 4;     // a multiprocessor's: warps that wait for atomics need others to take over
constexpr int NOWHERE = -1;


// Samples in shared memory at a time; what they need has to fit in the 48 KB that every GPU has.
template <typename T>
constexpr int STAGED_SAMPLES = sizeof(T) == 8 ? 64 : 128;

template <typename T, typename W>
struct Gradients {
  const T* output;           // (batch, queries, channels)
  compute_t<T>* features;    // zeroed, or null where not needed; so are the others
  compute_t<T>* locations;
  W* weights;
  int64_t location_strides[5];
  int64_t weight_strides[6];
  int pass_groups;           // groups of a pass
  int row_stride, sums_at;   // where the sums of a distinct row's groups lie: s from 0, u from sums_at
  int group_steps;           // doubling steps that sum a group's lanes
};

template <typename T>
struct Shared {
  static constexpr int SAMPLES = STAGED_SAMPLES<T>;
  static constexpr int CORNERS = 4 * SAMPLES;
  static constexpr int TABLE = 2 * CORNERS;  // a hash table that is never more than half full

  VisiblePairs<T, THREADS> pairs;
  Four<T> axis_weights[SAMPLES];  // x[0], x[1], y[0], y[1]
  Four<T> axis_slopes[SAMPLES];   // likewise
  T grad_x[SAMPLES], grad_y[SAMPLES];

  int table_rows[TABLE];       // the row entered at a place, or NOWHERE
  short table_entries[TABLE];  // its entry among the distinct rows
  int num_rows;
  int rows[CORNERS];           // the distinct rows
  int chains[CORNERS];         // the last corner entered for each, or NOWHERE
  short next_corner[CORNERS];  // the corner entered before in the same chain, or NOWHERE
  short corner_rows[CORNERS];  // the entry of each corner's row; NOWHERE for a corner outside its level

  T weights[SAMPLES * MAX_GROUPS];
  T row_sums[CORNERS * MAX_GROUPS];  // of each distinct row: u, and s, which may take its place
};

// Enters a row in the table; returns its place.
template <typename T>
__device__ int enter_row(Shared<T>& shared, int row) {
  int place = (static_cast<unsigned>(row) * 2654435769u) >> (32 - __ffs(Shared<T>::TABLE) + 1);  // Fibonacci hashing
  while (true) {
    const int found = atomicCAS(&shared.table_rows[place], NOWHERE, row);
    if (found == NOWHERE) {
      const int entry = atomicAdd(&shared.num_rows, 1);
      shared.table_entries[place] = static_cast<short>(entry);
      shared.rows[entry] = row;
      shared.chains[entry] = NOWHERE;
      return place;
    }
    if (found == row) {
      return place;
    }
    place = (place + 1) % Shared<T>::TABLE;
  }
}

template <typename T>
__device__ __forceinline__ T corner_weight(const Shared<T>& shared, int corner) {
  const Four<T>& axis = shared.axis_weights[corner / 4];
  return axis[2 + corner / 2 % 2] * axis[corner % 2];
}

// Footprints of samples (pairs first_pair, ... x levels first_level, ...), numbered level by level, and their rows.
template <typename T, typename W>
__device__ void stage(
    const Operands<T, W>& op,
    int first_pair,
    int num_pairs,
    int first_level,
    int num_levels,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  for (int i = threadIdx.x; i < Shared<C>::TABLE; i += THREADS) {
    shared.table_rows[i] = NOWHERE;
  }
  if (threadIdx.x == 0) {
    shared.num_rows = 0;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const int entry = first_pair + i % num_pairs;
    const Pair pair(shared.pairs.number[entry], op.num_points);
    const Level level =
        op.levels[static_cast<int64_t>(pair.cam) * op.num_levels + first_level + i / num_pairs];
    Axis<C> x = {}, y = {};
    Four<int> rows = {};
    if (!level.empty()) {
      x = bilinear_axis(pixel_position(shared.pairs.x[entry], level.width), level.width);
      y = bilinear_axis(pixel_position(shared.pairs.y[entry], level.height), level.height);
      rows = corner_rows(level, x, y);
    }
    shared.axis_weights[i] = {x.weight[0], x.weight[1], y.weight[0], y.weight[1]};
    shared.axis_slopes[i] = {x.slope[0], x.slope[1], y.slope[0], y.slope[1]};
    shared.grad_x[i] = shared.grad_y[i] = 0;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const bool inside = x.slope[corner % 2] != 0 && y.slope[corner / 2] != 0;
      shared.corner_rows[4 * i + corner] =
          static_cast<short>(inside ? enter_row(shared, rows[corner]) : NOWHERE);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 4 * num_pairs * num_levels; i += THREADS) {
    if (shared.corner_rows[i] != NOWHERE) {
      const int entry = shared.table_entries[shared.corner_rows[i]];
      shared.corner_rows[i] = static_cast<short>(entry);
      shared.next_corner[i] = static_cast<short>(atomicExch(&shared.chains[entry], i));
    }
  }
}

// The weights of the staged samples in groups first_group, ..., first_group + num_groups - 1, `stride` apart a sample.
template <typename T, typename W>
__device__ void stage_weights(
    const Operands<T, W>& op,
    const W* weights,
    int first_pair,
    int num_pairs,
    int first_level,
    int num_levels,
    int first_group,
    int num_groups,
    int stride,
    Shared<compute_t<T>>& shared) {
  for (int i = threadIdx.x; i < num_pairs * num_levels * num_groups; i += THREADS) {
    const int sample = i / num_groups;
    const int group = i - sample * num_groups;
    const int level = sample / num_pairs;
    const Pair pair(shared.pairs.number[first_pair + sample - level * num_pairs], op.num_points);
    shared.weights[sample * stride + group] = to_compute(
        weights[pair.weights(op.weight_strides, first_level + level) + (first_group + group) * op.weight_strides[5]]);
  }
}

// The pairs that no camera sees have gradients too: zero.
template <typename T, typename W>
__device__ void zero_invisible_pairs(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    compute_t<T>* grad_locations,
    W* grad_weights,
    int first,
    const bool* visible) {
  const int pairs = min(THREADS, op.num_points * op.num_cams - first);
  const int num_groups = op.channels / op.group_channels;
  const int lane = threadIdx.x % WARP;
  for (int i = threadIdx.x / WARP; i < pairs; i += THREADS / WARP) {
    if (visible[i]) {
      continue;
    }
    const Pair pair(first + i, op.num_points);
    for (int j = lane; grad.weights != nullptr && j < op.num_levels * num_groups; j += WARP) {
      const int level = j / num_groups;
      grad_weights[pair.weights(grad.weight_strides, level) + (j - level * num_groups) * grad.weight_strides[5]] =
          from_compute<W>(0);
    }
    if (grad.locations != nullptr && lane < 2) {
      grad_locations[pair.location(grad.location_strides) + lane * grad.location_strides[4]] = 0;
    }
  }
}

// Step 2: u of every distinct row.
template <typename T, typename W>
__device__ void sum_corner_weights(const Gradients<T, W>& grad, int num_groups, Shared<compute_t<T>>& shared) {
  for (int i = threadIdx.x; i < shared.num_rows * num_groups; i += THREADS) {
    const int entry = i / num_groups;
    const int group = i - entry * num_groups;
    compute_t<T> sum = 0;
    for (int corner = shared.chains[entry]; corner != NOWHERE; corner = shared.next_corner[corner]) {
      sum += corner_weight(shared, corner) * shared.weights[corner / 4 * grad.pass_groups + group];
    }
    shared.row_sums[entry * grad.row_stride + grad.sums_at + group] = sum;
  }
}

// Step 3 for the channels first_channel, ... below end_channel of a pass: s of every distinct row, and its gradient.
template <typename T, typename W, int VEC, int NV>
__device__ __forceinline__ void walk_rows(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    const T* features,
    const T* grad_output,
    compute_t<T>* grad_features,
    int first_group,
    int first_channel,
    int end_channel,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const int lanes = op.lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const int team = threadIdx.x >> op.log2_lanes;
  const int teams = THREADS >> op.log2_lanes;
  const unsigned team_mask = lanes == WARP ? 0xffffffffu : ((1u << lanes) - 1) << (threadIdx.x % WARP & ~(lanes - 1));
  const bool needs_dots = grad.locations != nullptr || grad.weights != nullptr;

  int channel[NV], group[NV], same_group[NV];
  bool live[NV], head[NV], begins_group[NV];
  C gradient[NV][VEC];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
    channel[k] = first_channel + (k * lanes + lane) * VEC;
    live[k] = channel[k] < end_channel;
    channel[k] = live[k] ? channel[k] : end_channel - VEC;
    group[k] = channel[k] / op.group_channels - first_group;
    begins_group[k] = channel[k] % op.group_channels == 0;
    const Vector<T, VEC> loaded = load_vector<VEC>(grad_output + channel[k]);
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      gradient[k][v] = live[k] ? loaded[v] : C(0);
    }
    // Which lanes hold the same group: a lane adds those `1 << step` above it where the bit is set.
    const int group_here = live[k] ? group[k] : NOWHERE;
    const int group_before = __shfl_up_sync(team_mask, group_here, 1, lanes);
    head[k] = live[k] && (lane == 0 || group_before != group_here);
    same_group[k] = 0;
    for (int step = 0; step < grad.group_steps; ++step) {
      const int group_above = __shfl_down_sync(team_mask, group_here, 1 << step, lanes);
      same_group[k] |= (lane + (1 << step) < lanes && group_above == group_here) << step;
    }
  }

  Vector<T, VEC> fetched[NV];
  auto fetch = [&](int entry) {
    if (needs_dots && entry < shared.num_rows) {
#pragma unroll
      for (int k = 0; k < NV; ++k) {
        fetched[k] =
            load_vector<VEC>(features + static_cast<int64_t>(shared.rows[entry]) * op.channels + channel[k]);
      }
    }
  };
  fetch(team);
  for (int entry = team; entry < shared.num_rows; entry += teams) {
    const int64_t row = static_cast<int64_t>(shared.rows[entry]) * op.channels;
    Vector<T, VEC> values[NV];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      values[k] = fetched[k];
    }
    fetch(entry + teams);  // in flight while this row is worked on
    C* sums = shared.row_sums + entry * grad.row_stride;
    if (grad.features != nullptr) {
#pragma unroll
      for (int k = 0; k < NV; ++k) {
        const C sum = sums[grad.sums_at + group[k]];
        C terms[VEC];
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          terms[v] = sum * gradient[k][v];
        }
        if (live[k]) {
          atomic_add_vector(grad_features + row + channel[k], terms);
        }
      }
      __syncwarp(team_mask);  // u has been read: s may take its place
    }
    if (needs_dots) {
#pragma unroll
      for (int k = 0; k < NV; ++k) {
        C dot = 0;
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          dot += values[k][v] * gradient[k][v];
        }
        for (int step = 0; step < grad.group_steps; ++step) {
          const C above = __shfl_down_sync(team_mask, dot, 1 << step, lanes);
          dot += (same_group[k] >> step & 1) ? above : C(0);
        }
        if (head[k]) {
          sums[group[k]] = begins_group[k] ? dot : sums[group[k]] + dot;
        }
        __syncwarp(team_mask);  // the next vector may hold more of the same group
      }
    }
  }
}

// Step 4: the gradients of the staged samples' weights, and what the groups of this pass add to their locations.
template <typename T, typename W>
__device__ void finish_samples(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
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
      C dots[4], grad_weight = 0;
      bool inside = false;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const int entry = shared.corner_rows[4 * sample + corner];
        inside |= entry != NOWHERE;
        dots[corner] = entry == NOWHERE ? C(0) : shared.row_sums[entry * grad.row_stride + lane];
        grad_weight += corner_weight(shared, 4 * sample + corner) * dots[corner];
      }
      if (grad.weights != nullptr) {
        const int level = sample / num_pairs;
        const Pair pair(shared.pairs.number[first_pair + sample - level * num_pairs], op.num_points);
        grad_weights
            [pair.weights(grad.weight_strides, first_level + level) + (first_group + lane) * grad.weight_strides[5]] =
                from_compute<W>(grad_weight);
      }
      location_gradient(shared.axis_weights[sample], shared.axis_slopes[sample], dots, grad_x, grad_y);
      // A level that cannot be sampled has no gradient, whatever its weight: 0 * NaN would be one.
      const C weight = inside ? shared.weights[sample * grad.pass_groups + lane] : C(0);
      grad_x *= weight;
      grad_y *= weight;
    }
    if (grad.locations != nullptr) {
#pragma unroll
      for (int step = MAX_GROUPS / 2; step > 0; step /= 2) {
        grad_x += __shfl_xor_sync(0xffffffffu, grad_x, step);
        grad_y += __shfl_xor_sync(0xffffffffu, grad_y, step);
      }
      if (live && lane == 0) {
        shared.grad_x[sample] += grad_x;
        shared.grad_y[sample] += grad_y;
      }
    }
  }
}

template <typename T, typename W, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) deformable_aggregation_backward_kernel(
    const Operands<T, W> op, const Gradients<T, W> grad) {
  using C = compute_t<T>;
  __shared__ Shared<C> shared;
  const int64_t batch = static_cast<int>(blockIdx.x) / op.num_queries;  // 32 bits: a 64-bit division is slow
  const int64_t query = blockIdx.x - batch * op.num_queries;
  const C* locations = op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  const W* weights = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1];
  const int64_t features = batch * op.levels.num_rows * op.channels;
  const T* grad_output = grad.output + static_cast<int64_t>(blockIdx.x) * op.channels;
  C* grad_locations = grad.locations + batch * grad.location_strides[0] + query * grad.location_strides[1];
  W* grad_weights = grad.weights + batch * grad.weight_strides[0] + query * grad.weight_strides[1];
  const int num_groups = op.channels / op.group_channels;

  for (int first = 0; first < op.num_points * op.num_cams; first += THREADS) {
    const int visible = compact_visible_pairs(op, locations, first, shared.pairs);
    zero_invisible_pairs(op, grad, grad_locations, grad_weights, first, shared.pairs.visible);

    for (int level = 0; level < op.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - level);
      const int pairs_at_once = STAGED_SAMPLES<C> / levels;
      for (int pair = 0; pair < visible; pair += pairs_at_once) {
        const int pairs = min(pairs_at_once, visible - pair);
        stage(op, pair, pairs, level, levels, shared);
        for (int group = 0; group < num_groups; group += grad.pass_groups) {
          const int groups = min(grad.pass_groups, num_groups - group);
          stage_weights(op, weights, pair, pairs, level, levels, group, groups, grad.pass_groups, shared);
          __syncthreads();
          if (grad.features != nullptr) {
            sum_corner_weights(grad, groups, shared);
            __syncthreads();
          }
          const int end_channel = (group + groups) * op.group_channels;
          for (int channel = group * op.group_channels; channel < end_channel; channel += op.lanes * NV * VEC) {
            walk_rows<T, W, VEC, NV>(
                op, grad, op.features + features, grad_output, grad.features + features, group, channel, end_channel,
                shared);
          }
          __syncthreads();
          if (grad.locations != nullptr || grad.weights != nullptr) {
            finish_samples(op, grad, grad_weights, pair, pairs, level, levels, group, groups, shared);
          }
          __syncthreads();
        }
        if (grad.locations != nullptr && threadIdx.x < pairs) {
          C x = 0, y = 0;
          for (int i = 0; i < levels; ++i) {
            x += shared.grad_x[i * pairs + threadIdx.x];
            y += shared.grad_y[i * pairs + threadIdx.x];
          }
          C* location =
              grad_locations + Pair(shared.pairs.number[pair + threadIdx.x], op.num_points).location(grad.location_strides);
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
    const DeformableAggregationSizes& sizes,
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
  // A group that takes several goes is the only one of its pass: there is room for u beside s.
  const bool several_goes = grad.pass_groups * op.group_channels > op.lanes * VEC * NV;
  grad.sums_at = several_goes ? 1 : 0;
  grad.row_stride = several_goes ? 2 : grad.pass_groups;
  grad.group_steps = ceil_log2(std::min(op.lanes, std::max(1, op.group_channels / VEC)));
  deformable_aggregation_backward_kernel<T, W, VEC, NV><<<query_blocks(sizes), THREADS, 0, stream>>>(op, grad);
  check_launch("deformable_aggregation_backward");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> deformable_aggregation_backward(
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
  const auto sizes = check_deformable_aggregation(
      feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_queries, sizes.channels});
  STD_TORCH_CHECK(
      grad_output.scalar_type() == feature_maps.scalar_type(), "grad_output must have the features' dtype");
  check_same_device("grad_output", grad_output, feature_maps);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());

  auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  if (deterministic && !sizes.nothing_to_sample()) {
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
    op.features = torch::stable::contiguous(feature_maps);
    op.grad_output = torch::stable::contiguous(grad_output);
    op.locations = sampling_location;
    op.weights = weights;
    op.grad_features = needs_feature_maps ? torch::stable::empty_like(op.features) : none(op.features);
    op.grad_locations = needs_sampling_location ? torch::stable::empty_like(sampling_location) : none(op.features);
    op.grad_weights = needs_weights ? torch::stable::empty_like(weights) : none(op.features);
    const Tensor shapes = readable_metadata(spatial_shape, op.features);
    const Tensor starts = readable_metadata(scale_start_index, op.features);
    op.level_table = level_table(shapes, starts, sizes.num_rows);
    auto location_strides = [](const Tensor& t) -> SampleStrides {
      return {t.stride(0), 0, t.stride(1), t.stride(2), t.stride(3), 0, t.stride(4)};
    };
    auto weight_strides = [](const Tensor& t) -> SampleStrides {
      return {t.stride(0), 0, t.stride(1), t.stride(2), t.stride(3), t.stride(4), t.stride(5)};
    };
    op.location_strides = location_strides(sampling_location);
    op.weight_strides = weight_strides(weights);
    op.grad_location_strides = needs_sampling_location ? location_strides(op.grad_locations) : SampleStrides{};
    op.grad_weight_strides = needs_weights ? weight_strides(op.grad_weights) : SampleStrides{};
    deterministic_backward(op);
    return {op.grad_features, op.grad_locations, op.grad_weights};
  }
  const ScalarType compute = compute_type(feature_maps);
  const Tensor features = torch::stable::contiguous(feature_maps);
  const Tensor grad = torch::stable::contiguous(grad_output);
  Tensor grad_features = needs_feature_maps
      ? torch::stable::new_zeros(features, {sizes.batch, sizes.num_rows, sizes.channels}, compute)
      : none(features);
  Tensor grad_locations = needs_sampling_location ? torch::stable::empty_like(sampling_location) : none(sampling_location);
  Tensor grad_weights = needs_weights ? torch::stable::empty_like(weights) : none(weights);

  if (sizes.nothing_to_sample()) {
    torch::stable::zero_(grad_locations);
    torch::stable::zero_(grad_weights);
  } else if (needs_feature_maps || needs_sampling_location || needs_weights) {
    const Tensor shapes = readable_metadata(spatial_shape, features);
    const Tensor starts = readable_metadata(scale_start_index, features);
    const LevelTable levels = level_table(shapes, starts, sizes.num_rows);
    const cudaStream_t stream = current_stream(features.get_device_index());

    dispatch_types(features, weights, [&](auto* t, auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using W = std::remove_pointer_t<decltype(w)>;
      Gradients<T, W> gradients = {};
      gradients.output = static_cast<const T*>(grad.const_data_ptr());
      if (needs_feature_maps) {
        gradients.features = static_cast<compute_t<T>*>(grad_features.mutable_data_ptr());
      }
      if (needs_sampling_location) {
        gradients.locations = static_cast<compute_t<T>*>(grad_locations.mutable_data_ptr());
        copy_strides(grad_locations, gradients.location_strides);
      }
      if (needs_weights) {
        gradients.weights = static_cast<W*>(grad_weights.mutable_data_ptr());
        copy_strides(grad_weights, gradients.weight_strides);
      }
      // Half features come 8 bytes a lane, so that the float32 atomics of neighbouring lanes are neighbours.
      constexpr int VEC = sizeof(T) == 8 ? 2 : 4;
      if (can_vectorize<T>(sizes, features, VEC) && can_vectorize<T>(sizes, grad, VEC)) {
        launch<T, W, VEC, 2>(sizes, features, levels, sampling_location, weights, gradients, stream);
      } else {
        launch<T, W, 1, 4>(sizes, features, levels, sampling_location, weights, gradients, stream);
      }
    });
  }
  if (needs_feature_maps && feature_maps.scalar_type() != compute) {
    grad_features = torch::stable::to(grad_features, feature_maps.scalar_type());
  }
  return {grad_features, grad_locations, grad_weights};
}

}  // namespace reimplementation::cuda
