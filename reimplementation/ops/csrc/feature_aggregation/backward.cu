// Deformable feature aggregation on CUDA, backward: the gradients of key points, logits and cameras' logits. Those of
// the features are in features_gradient.cu.
//
// With w the weights, and u their gradients, a logit has the gradient w * (u - mean), where the mean is the sum of w *
// u over the group. A block owns one query, or, where cameras' logits need a gradient, some after each other:
//
//   1. its threads project the key points and compact the visible pairs; one thread per sample makes a footprint;
//   2. teams take the samples in turn and multiply their pixels with the output's gradient, group by group;
//   3. a few lanes per sample, one a group, find the weight again, and leave w * u in the block's *terms*, where each
//      logit of each camera has a place; so has the location of each pair, and gets its gradient there;
//   4. threads share out the logits: the sum of the terms of a group is its mean, and then every logit gets its
//      gradient, those of pairs that no camera sees too. A query's logit sums over the cameras. What a camera's logit
//      gets is summed over the block's queries, and then, in a second kernel, over the blocks;
//   5. a thread per key point takes its locations' gradients back through the projection.
//
// The terms are in shared memory where they fit, else in global memory that grows with the blocks, not with the
// queries. No atomics, and every sum has its order: the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/levels.cuh"
#include "feature_aggregation/features_gradient.cuh"
#include "feature_aggregation/group_products.cuh"
#include "feature_aggregation/operands.cuh"

namespace reimplementation::feature_aggregation {
namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;       // a multiprocessor's: many warps, each waiting for the gathers of one sample
constexpr int STAGED_LEVELS = 8;    // levels of a pair staged together
constexpr int STAGED_SAMPLES = 64;  // samples in shared memory at a time
constexpr int NOWHERE = -1;
constexpr int MOST_SHARED_TERMS = 12288;          // bytes, so that MIN_BLOCKS fit a multiprocessor
constexpr int64_t MOST_PARTS = int64_t{1} << 26;  // bytes of what blocks leave in global memory

template <typename T, typename L>
struct Gradients {
  using C = compute_t<T>;

  const T* output;      // (batch, queries, channels)
  const C* statistics;  // (batch, queries, groups, 2)
  C* key_points;        // like the operand, or null where not needed; so are the others
  L* logits;
  C* camera_parts;  // (batch, blocks, cams, row)
  C* terms;         // (batch, blocks, `count_terms`), or null: they are in shared memory
  Divisor blocks;   // of a batch element
};

// Of a query: one for each logit of each camera, and two for each pair.
HOST_DEVICE int count_terms(int num_cams, int row, int num_pairs) {
  return num_cams * row + 2 * num_pairs;
}

template <typename C>
struct Sum {
  C value;

  __device__ __forceinline__ void merge(const Sum& other) {
    value += other.value;
  }
  __device__ __forceinline__ Sum from_lane(int distance) const {
    return {__shfl_xor_sync(ALL_LANES, value, distance)};
  }
};

template <typename C>
struct Shared {
  VisiblePairs<C, THREADS> pairs;
  Four<C> axis_weights[STAGED_SAMPLES];  // x[0], x[1], y[0], y[1]
  Four<C> axis_slopes[STAGED_SAMPLES];   // likewise
  Four<int> rows[STAGED_SAMPLES];        // of the corners; the first is NOWHERE where the level cannot be sampled
  C grad_x[STAGED_SAMPLES], grad_y[STAGED_SAMPLES];
  union {
    Four<C> products[STAGED_SAMPLES * MAX_GROUPS];  // by corner: a pixel's features times the output's gradient
    struct {
      Sum<C> partial[THREADS], means[THREADS];
    };
  };

  __device__ Shared() {}
};

// The samples that are in shared memory together: pairs first_pair, ... x levels first_level, ..., numbered level by
// level.
struct Staged {
  int first_pair, pairs, first_level, levels;

  __device__ __forceinline__ int samples() const {
    return pairs * levels;
  }
};

// Step 1: footprints.
template <typename T, typename L>
__device__ void stage(const Inputs<T, L>& in, const Staged& staged, Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  for (int i = threadIdx.x; i < staged.samples(); i += THREADS) {
    const int entry = staged.first_pair + i % staged.pairs;
    unsigned cam = shared.pairs.number[entry];
    in.points.split(cam);
    const Level level = in.levels[static_cast<int64_t>(cam) * in.num_levels + staged.first_level + i / staged.pairs];
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

// Step 3: the terms of the staged samples, and what the groups of this pass add to their locations' gradients.
template <typename T, typename L>
__device__ void finish_samples(
    const Inputs<T, L>& in,
    const Query<T, L>& query,
    const compute_t<T>* statistics,
    const Staged& staged,
    int first_group,
    int num_groups,
    int pass_groups,
    compute_t<T>* terms,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  static_assert(MAX_GROUPS == 8, "eight lanes a sample, one group each");
  const int lane = threadIdx.x % MAX_GROUPS, group = first_group + lane;
  const C largest = lane < num_groups ? statistics[2 * group] : C(0);
  const C inverse_sum = lane < num_groups ? 1 / statistics[2 * group + 1] : C(0);
  // All threads make the same number of rounds: the sum below needs whole warps.
  for (int first = 0; first < staged.samples(); first += THREADS / MAX_GROUPS) {
    const int sample = first + threadIdx.x / MAX_GROUPS;
    const bool live = sample < staged.samples() && lane < num_groups;
    C grad_x = 0, grad_y = 0;
    if (live && shared.rows[sample][0] != NOWHERE) {
      const Four<C> slopes = shared.axis_slopes[sample], axes = shared.axis_weights[sample];
      const Four<C> products = shared.products[sample * pass_groups + lane];
      const int level = sample / staged.pairs;
      unsigned cam = shared.pairs.number[staged.first_pair + sample - level * staged.pairs];
      const int point = in.points.split(cam);
      const int place = ((staged.first_level + level) * in.points.divisor + point) * in.num_groups + group;
      const C weight = exponential(query.logit(cam, in.row, place) - largest) * inverse_sum;
      C dots[4], grad_weight = 0;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        // A pixel outside the level was read from its neighbour inside.
        const bool inside = slopes[corner % 2] != 0 && slopes[2 + corner / 2] != 0;
        dots[corner] = inside ? products[corner] : C(0);
        grad_weight += axes[2 + corner / 2] * axes[corner % 2] * dots[corner];
      }
      const C scaled = weight * in.kept_scale;
      terms[static_cast<int>(cam) * in.row + place] = scaled * grad_weight;
      location_gradient(axes, slopes, dots, grad_x, grad_y);
      grad_x *= scaled;
      grad_y *= scaled;
    }
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

// Steps 1 to 3: fills the terms of what is visible; the others are zero.
template <int VEC, int NV, typename T, typename L>
__device__ __forceinline__ void differentiate_samples(
    const Inputs<T, L>& in,
    const Teams& teams,
    const Query<T, L>& query,
    const T* grad_output,
    const compute_t<T>* statistics,
    compute_t<T>* terms,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const T* features = in.features + query.batch * in.levels.num_rows * in.channels;
  C* of_locations = terms + in.num_cams * in.row;
  const int team = threadIdx.x >> teams.log2_lanes, num_teams = THREADS >> teams.log2_lanes;
  for (int first = 0; first < in.num_pairs(); first += THREADS) {
    const int visible = compact_visible_pairs(in, query, first, shared.pairs, [](int, const Location<C>&, bool) {});
    for (int level = 0; level < in.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, in.num_levels - level);
      for (int pair = 0; pair < visible; pair += STAGED_SAMPLES / levels) {
        const Staged staged = {pair, min(STAGED_SAMPLES / levels, visible - pair), level, levels};
        stage(in, staged, shared);
        __syncthreads();
        for (int group = 0; group < in.num_groups; group += teams.pass_groups) {
          const int groups = min(teams.pass_groups, in.num_groups - group);
          const int first_channel = group * in.group_channels, end_channel = first_channel + groups * in.group_channels;
          for (int channel = first_channel; channel < end_channel; channel += teams.lanes * NV * VEC) {
            const Lane<T, VEC, NV> lane(teams, features, grad_output, group, channel, end_channel);
            for (int sample = team; sample < staged.samples(); sample += num_teams) {
              lane.multiply(
                  teams, shared.rows[sample], channel == first_channel, shared.products + sample * teams.pass_groups);
            }
          }
          __syncthreads();
          finish_samples(in, query, statistics, staged, group, groups, teams.pass_groups, terms, shared);
          __syncthreads();
        }
        if (threadIdx.x < staged.pairs) {
          C x = 0, y = 0;
          for (int i = 0; i < levels; ++i) {
            x += shared.grad_x[i * staged.pairs + threadIdx.x];
            y += shared.grad_y[i * staged.pairs + threadIdx.x];
          }
          C* of_location = of_locations + 2 * shared.pairs.number[pair + threadIdx.x];
          of_location[0] += x;
          of_location[1] += y;
        }
        __syncthreads();
      }
    }
  }
  __syncthreads();  // a query that nothing sees comes here straight from the compaction
}

// Step 4. The block's first query begins its parts of the cameras' gradients, further ones add to them.
template <typename T, typename L>
__device__ __forceinline__ void differentiate_logits(
    const Inputs<T, L>& in,
    const Gradients<T, L>& grad,
    const Query<T, L>& query,
    const compute_t<T>* statistics,
    const compute_t<T>* terms,
    compute_t<T>* parts,
    bool begin,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const int samples = in.num_levels * in.points.divisor;
  const bool by_camera = query.camera_logits != nullptr;
  L* of_logits = grad.logits == nullptr ? nullptr : grad.logits + query.number * (by_camera ? 1 : in.num_cams) * in.row;
  for (int first_group = 0; first_group < in.num_groups; first_group += THREADS) {
    const Share<THREADS> share(min(THREADS, in.num_groups - first_group));
    const int group = first_group + share.group;
    Sum<C> sum = {0};
    for (int sample = share.first; sample < samples; sample += share.step) {
      for (int cam = 0; cam < in.num_cams; ++cam) {
        sum.value += terms[cam * in.row + sample * in.num_groups + group];
      }
    }
    share.merge(sum, shared.partial, shared.means);
    const C mean = shared.means[share.group].value;
    const C largest = statistics[2 * group], inverse_sum = 1 / statistics[2 * group + 1];
    for (int sample = share.first; sample < samples; sample += share.step) {
      const int place = sample * in.num_groups + group;
      unsigned level = sample;
      const int point = in.points.split(level);
      C total = 0;
      for (int cam = 0; cam < in.num_cams; ++cam) {
        const int i = cam * in.row + place;
        C gradient = 0;
        if (!query.hides(cam * in.points.divisor + point)) {
          gradient = terms[i] - exponential(query.logit(cam, in.row, place) - largest) * inverse_sum * mean;
        }
        if (parts != nullptr) {
          parts[i] = begin ? gradient : parts[i] + gradient;
        }
        if (of_logits != nullptr && !by_camera) {
          of_logits[i] = from_compute<L>(gradient);
        }
        total += gradient;
      }
      if (of_logits != nullptr && by_camera) {
        of_logits[place] = from_compute<L>(total);
      }
    }
    __syncthreads();
  }
}

// Step 5. What no camera sees has no gradient, whatever its projection's slopes are.
template <typename T, typename L>
__device__ __forceinline__ void differentiate_projection(
    const Inputs<T, L>& in, const Query<T, L>& query, const compute_t<T>* of_locations, compute_t<T>* grad_points) {
  using C = compute_t<T>;
  const Cameras<C> cameras = in.cameras.of_sample(query.batch, in.num_cams);
  for (int point = threadIdx.x; point < in.points.divisor; point += THREADS) {
    const C* place = query.key_points + 3 * point;
    const C position[3] = {place[0], place[1], place[2]};
    C gradient[3] = {};
    for (int cam = 0; cam < in.num_cams; ++cam) {
      const C* of_location = of_locations + 2 * (cam * in.points.divisor + point);
      if (of_location[0] != 0 || of_location[1] != 0) {
        cameras.add_gradient(cam, position, of_location[0], of_location[1], gradient);
      }
    }
    C* of_point = grad_points + (query.number * in.points.divisor + point) * 3;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      of_point[axis] = gradient[axis];
    }
  }
}

template <typename T, typename L, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    deformable_feature_aggregation_backward(const Inputs<T, L> in, const Gradients<T, L> grad, const Teams teams) {
  using C = compute_t<T>;
  __shared__ Shared<C> shared;
  extern __shared__ __align__(16) char shared_terms[];
  const int num_terms = count_terms(in.num_cams, in.row, in.num_pairs());
  C* terms = grad.terms == nullptr ? reinterpret_cast<C*>(shared_terms)
                                   : grad.terms + static_cast<int64_t>(blockIdx.x) * num_terms;
  C* parts = grad.camera_parts == nullptr ? nullptr
                                          : grad.camera_parts + static_cast<int64_t>(blockIdx.x) * in.num_cams * in.row;
  unsigned batch = blockIdx.x;
  const int first = grad.blocks.split(batch);
  for (int number = first; number < in.queries.divisor; number += grad.blocks.divisor) {
    const Query<T, L> query(in, static_cast<int64_t>(batch) * in.queries.divisor + number, batch);
    const C* statistics = grad.statistics + query.number * in.num_groups * 2;
    for (int i = threadIdx.x; i < num_terms; i += THREADS) {
      terms[i] = 0;
    }
    __syncthreads();
    differentiate_samples<VEC, NV>(
        in, teams, query, grad.output + query.number * in.channels, statistics, terms, shared);
    if (grad.logits != nullptr || parts != nullptr) {
      differentiate_logits(in, grad, query, statistics, terms, parts, number == first, shared);
    }
    if (grad.key_points != nullptr) {
      differentiate_projection(in, query, terms + in.num_cams * in.row, grad.key_points);
    }
    __syncthreads();
  }
}

constexpr int SLICES = 32;  // of the blocks, whose parts are summed side by side

// The cameras' gradients from the blocks' parts: a block takes WARP of their elements.
template <typename C, typename L>
__global__ void __launch_bounds__(WARP* SLICES) sum_parts(const C* parts, int batches, int blocks, int length, L* sum) {
  __shared__ C sums[SLICES][WARP];
  const int element = blockIdx.x * WARP + threadIdx.x;
  for (int batch = blockIdx.y; batch < batches; batch += gridDim.y) {
    C total = 0;
    for (int block = threadIdx.y; block < blocks && element < length; block += SLICES) {
      total += parts[(static_cast<int64_t>(batch) * blocks + block) * length + element];
    }
    sums[threadIdx.y][threadIdx.x] = total;
    __syncthreads();
    if (threadIdx.y == 0 && element < length) {
      for (int slice = 1; slice < SLICES; ++slice) {
        total += sums[slice][threadIdx.x];
      }
      sum[static_cast<int64_t>(batch) * length + element] = from_compute<L>(total);
    }
    __syncthreads();
  }
}

// How many blocks share out a batch element's queries, and what they work in. Where they leave something in global
// memory, there are no more of them than keep the GPU busy, or than memory allows.
struct Plan {
  int64_t blocks;
  std::optional<Tensor> terms, camera_parts;

  Plan(const Tensor& like, const Sizes& sizes, bool needs_camera_parts) : blocks(sizes.num_queries) {
    const int row = static_cast<int>(sizes.camera_width()), cams = static_cast<int>(sizes.num_cams);
    const int64_t num_terms = count_terms(cams, row, cams * static_cast<int>(sizes.num_points));
    const int64_t element = static_cast<int64_t>(like.element_size());
    const bool shares_terms = num_terms * element <= MOST_SHARED_TERMS;
    if (!shares_terms || needs_camera_parts) {
      const int64_t busy = 2 * MIN_BLOCKS * device_attribute(cudaDevAttrMultiProcessorCount, like.get_device_index());
      const int64_t most = std::min(busy, MOST_PARTS / (num_terms * element)) / sizes.batch;
      blocks = std::clamp<int64_t>(most, 1, sizes.num_queries);
    }
    if (!shares_terms) {
      terms = allocate(like, {sizes.batch, blocks, num_terms});
    } else {
      shared_bytes = static_cast<int>(num_terms * element);
    }
    if (needs_camera_parts) {
      camera_parts = allocate(like, {sizes.batch, blocks, cams, row});
    }
  }

  int shared_bytes = 0;
};

template <typename C>
C* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<C*>(tensor->mutable_data_ptr()) : nullptr;
}

template <int VEC, int NV, typename T, typename L>
void launch(
    const Sizes& sizes, const Inputs<T, L>& in, const Gradients<T, L>& grad, const Plan& plan, cudaStream_t stream) {
  deformable_feature_aggregation_backward<T, L, VEC, NV>
      <<<static_cast<unsigned>(sizes.batch * plan.blocks), THREADS, plan.shared_bytes, stream>>>(
          in, grad, teams_of<VEC, NV>(in.channels, in.group_channels));
  check_launch("deformable_feature_aggregation_backward");
}

template <typename C, typename L>
void launch_sum(const Sizes& sizes, const Plan& plan, const Tensor& grad_camera_logits, cudaStream_t stream) {
  const int length = static_cast<int>(sizes.num_cams * sizes.camera_width());
  const dim3 grid((length + WARP - 1) / WARP, std::min(sizes.batch, MOST_BLOCKS));
  sum_parts<<<grid, dim3(WARP, SLICES), 0, stream>>>(
      data_or_null<C>(plan.camera_parts), static_cast<int>(sizes.batch), static_cast<int>(plan.blocks), length,
      static_cast<L*>(grad_camera_logits.mutable_data_ptr()));
  check_launch("sum_parts");
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh,
    const Tensor& logits,
    const std::optional<Tensor>& camera_logits,
    const std::optional<Tensor>& keep,
    const Tensor& statistics,
    double attn_drop,
    bool visible_only,
    bool needs_feature_maps,
    bool needs_key_points,
    bool needs_logits,
    bool needs_camera_logits,
    bool deterministic) {
  const Operands op{feature_maps, spatial_shape, scale_start_index, key_points, projection_mat,
                    image_wh,     logits,        camera_logits,     keep};
  const Sizes sizes = check(op, attn_drop);
  check_gradient(grad_output, statistics, feature_maps, sizes);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());
  Tensor grad_points = contiguous_gradient(key_points, needs_key_points);
  Tensor grad_logits = contiguous_gradient(logits, needs_logits);
  Tensor grad_camera_logits = contiguous_gradient(camera_logits.value_or(logits), camera_logits && needs_camera_logits);
  if (sizes.nothing_to_sample()) {
    Tensor grad_features = contiguous_gradient(feature_maps, needs_feature_maps);
    for (Tensor* gradient : {&grad_features, &grad_points, &grad_logits, &grad_camera_logits}) {
      torch::stable::zero_(*gradient);
    }
    return {grad_features, grad_points, grad_logits, grad_camera_logits};
  }
  count_queries(sizes);  // refuses too many of them
  const ReadableOperands readable(op);
  const Tensor grad_rows = as_contiguous(grad_output), known = as_contiguous(statistics);
  const cudaStream_t stream = current_stream(feature_maps.get_device_index());
  const DeviceLevels levels(spatial_shape, scale_start_index, readable.features, sizes.num_rows, stream);
  std::optional<Tensor> hidden;
  if (visible_only) {
    hidden = find_hidden(sizes, readable, stream);
  }
  const bool needs_others = needs_key_points || needs_logits || grad_camera_logits.numel() > 0;
  std::optional<FeaturesGradient> features_gradient;

  dispatch_types(readable.features, readable.logits, [&](auto* t, auto* l) {
    using T = std::remove_pointer_t<decltype(t)>;
    using L = std::remove_pointer_t<decltype(l)>;
    using C = compute_t<T>;
    const auto in = inputs_of<T, L>(sizes, readable, levels.table(), hidden, attn_drop);
    if (needs_feature_maps) {
      features_gradient.emplace(sizes, in, known, grad_rows, readable.features, deterministic, needs_others, stream);
    }
    if (!needs_others) {
      return;
    }
    const Plan plan(known, sizes, grad_camera_logits.numel() > 0);
    Gradients<T, L> grad = {};
    grad.output = static_cast<const T*>(grad_rows.const_data_ptr());
    grad.statistics = static_cast<const C*>(known.const_data_ptr());
    grad.key_points = data_or_null<C>(grad_points);
    grad.logits = data_or_null<L>(grad_logits);
    grad.camera_parts = data_or_null<C>(plan.camera_parts);
    grad.terms = data_or_null<C>(plan.terms);
    grad.blocks = Divisor(plan.blocks);
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, readable.features, VEC) && can_vectorize<T>(sizes, grad_rows, VEC)) {
      launch<VEC, sizeof(T) == 2 ? 1 : 2>(sizes, in, grad, plan, stream);
    } else {
      launch<1, 4>(sizes, in, grad, plan, stream);
    }
    if (plan.camera_parts) {
      launch_sum<C, L>(sizes, plan, grad_camera_logits, stream);
    }
  });
  return {
      features_gradient ? features_gradient->finish() : contiguous_gradient(feature_maps, false), grad_points,
      grad_logits, grad_camera_logits};
}

}  // namespace reimplementation::feature_aggregation
