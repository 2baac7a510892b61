// Multi-scale deformable attention on CUDA, backward; samples.cuh tells how threads map to data.
//
//   1. a warp's samples are staged as in the forward: corner weights times the attention weight, and rows;
//   2. a unit's lanes walk its samples: gather the four corners, dot them with the gradient of the unit's output, and
//      add weight * gradient to each corner's row, atomically and in vectors of 16 bytes where the GPU can: in float32, or
//      in half precision after half_gradient.cu has looked at who adds where;
//   3. one thread per sample puts the gradients of its weight and location together from the four dot products, from
//      coordinates that it computes once more: cheaper than keeping them in the shared memory that warps compete for.
//
// Only the atomics may change their order from run to run: the value's gradient is equal up to rounding. Where many samples
// meet in a row, value_gradient.cu adds them up first, and where bits must repeat, feature_gradient.cu has all of it. This
// kernel then has the other gradients, as it does where the value needs none.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "feature_gradient/feature_gradient.cuh"
#include "attention/half_gradient.cuh"
#include "attention/samples.cuh"
#include "attention/value_gradient.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::attention {

using feature_gradient::FeatureGradient;
using feature_gradient::SampledOp;
using feature_gradient::SampleSteps;

namespace {

constexpr int SLOTS = 80;      // of footprints in a warp's shared memory: 16 samples of D = 32 channels' units
constexpr int MIN_BLOCKS = 8;  // a multiprocessor's

template <typename T, typename W>
struct Gradients {
  const T* output;          // (batch, queries, heads, channels)
  compute_t<T>* locations;  // null where not needed, as is that of the weights
  W* weights;
  Strides location_strides, weight_strides;
};

// What becomes of the value's gradient: another kernel has it, or there is none.
struct NoSums {
  static constexpr bool EXIST = false;
  struct Anchor {};

  template <typename Op>
  __device__ NoSums at(const Op&, int64_t, int, int) const {
    return {};
  }
  __device__ Anchor anchor(int) const {
    return {};
  }
  template <typename... Args>
  __device__ void add(const Args&...) const {}
};

// Or sums of the type that they run in. HalfSums are the third.
template <typename C>
struct WideSums {
  static constexpr bool EXIST = true;
  struct Anchor {};  // there is nothing to know about a sample's first row

  C* gradient;  // (batch, values, heads, channels), zeroed

  // For a thread's channels, from `channel` of a head on.
  template <typename Op>
  __device__ __forceinline__ WideSums at(const Op& op, int64_t batch, int head, int channel) const {
    return {gradient + (batch * op.levels.num_rows * op.num_heads + head) * op.channels + channel};
  }
  __device__ __forceinline__ Anchor anchor(int) const {
    return {};
  }
  template <typename T, int VEC>
  __device__ __forceinline__ void add(
      const Problem& op, const PackedRows& rows, Anchor, const Four<C>& weights, const Vector<T, VEC>& grad_output)
      const {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      if (weights[corner] != 0) {
        C terms[VEC];
        product(weights[corner], grad_output, terms);
        const int row_bytes = op.num_heads * op.channels * static_cast<int>(sizeof(C));
        atomic_add_vector(row_address(gradient, rows[corner], row_bytes), terms);
      }
    }
  }
};

template <typename T>
struct Shared {
  Footprints<T, SLOTS> staged;
  Four<T> dots[SLOTS];  // of each corner with the gradient of its unit's output
};

// Sums four values over the lanes of a unit. Every lane ends with the sum of one of them: returns it, and which.
template <typename T>
__device__ __forceinline__ T sum_one_of_four(int lanes, int lane, const T (&values)[4], int& which) {
  // Half of the lanes pass on what they need not keep, twice; then each quarter of the lanes holds one value.
  const bool upper = lane & (lanes / 2);
  const T passed_first = __shfl_xor_sync(ALL_LANES, upper ? values[0] : values[2], lanes / 2, lanes);
  const T passed_second = __shfl_xor_sync(ALL_LANES, upper ? values[1] : values[3], lanes / 2, lanes);
  const T first = (upper ? values[2] : values[0]) + passed_first;
  const T second = (upper ? values[3] : values[1]) + passed_second;
  const bool odd = lane & (lanes / 4);
  T sum = (odd ? second : first) + __shfl_xor_sync(ALL_LANES, odd ? first : second, lanes / 4, lanes);
  for (int step = lanes / 8; step > 0; step /= 2) {
    sum += __shfl_xor_sync(ALL_LANES, sum, step, lanes);
  }
  which = 2 * upper + odd;
  return sum;
}

// Adds up what the lanes of a unit have of a sample's four dot products; the first channels begin a sum.
template <typename T>
__device__ __forceinline__ void keep_sums(
    const Problem& op, const T (&dots)[4], bool sampled, bool first_channels, Four<T>& totals) {
  auto keep = [&](int corner, T sum) { totals[corner] = first_channels ? sum : totals[corner] + sum; };
  const int lanes = op.lanes(), lane = op.lane();
  if (lanes >= 4) {
    int corner;
    const T sum = sum_one_of_four(lanes, lane, dots, corner);
    if (sampled && (lane & (lanes / 4 - 1)) == 0) {
      keep(corner, sum);
    }
  } else {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      T sum = dots[corner];
      if (lanes == 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, 1, lanes);
      }
      if (sampled && lane == 0) {
        keep(corner, sum);
      }
    }
  }
}

// Step 2 for one vector of channels a lane.
template <int IN_FLIGHT, typename Sums, typename T, typename W, int VEC>
__device__ __forceinline__ void walk_samples(
    const Operands<T, W>& op,
    bool exists,
    const T* value,
    const Sums& sums,
    const Vector<T, VEC>& grad_output,
    bool needs_dots,
    bool live,
    bool first_channels,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const int row = op.num_heads * op.channels;
  const int pitch = op.pitch();
  const int count = exists ? shared.staged.count[op.unit()] : 0;
  const int stride = op.splits() * pitch;
  int slot = op.split() * pitch + op.unit();
  // The teams of a warp go in step, so that their sums over lanes are one; what one without samples reads goes nowhere.
  for (int sample = op.split(); __any_sync(ALL_LANES, sample < count); sample += IN_FLIGHT * op.splits()) {
    PackedRows rows[IN_FLIGHT];
    Vector<T, VEC> corners[IN_FLIGHT][4];
    typename Sums::Anchor anchors[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      rows[i] = sample + i * op.splits() < count ? shared.staged.rows[slot + i * stride] : PackedRows{};
      anchors[i] = sums.anchor(rows[i][0]);
      if (needs_dots) {
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          corners[i][corner] = load_vector<VEC>(row_address(value, rows[i][corner], row * static_cast<int>(sizeof(T))));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const bool sampled = sample + i * op.splits() < count;
      if (needs_dots) {
        C dots[4];
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
          C dot = 0;
#pragma unroll
          for (int v = 0; v < VEC; ++v) {
            dot += corners[i][corner][v] * grad_output[v];
          }
          dots[corner] = live ? dot : C(0);
        }
        keep_sums(op, dots, sampled, first_channels, shared.dots[slot]);
      }
      if (Sums::EXIST && sampled && live) {
        sums.add(op, rows[i], anchors[i], shared.staged.weights[slot], grad_output);
      }
      slot += stride;
    }
  }
}

// Step 3.
template <typename T, typename W>
__device__ __forceinline__ void finish_samples(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    const Place& place,
    const Sampler<T, W>& sampler,
    const Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const int pitch = op.pitch();
  sampler.for_each(op, place, [&](int unit, int query, int head, const Sample<C>& sample, int) {
    C grad_weight = 0, grad_x = 0, grad_y = 0;
    if (sample.inside) {
      const Four<C> dots = shared.dots[sample.rank * pitch + unit];
      const Axis<C> x = sample.x_axis(), y = sample.y_axis();
      const Four<C> weights = corner_weights(x, y);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        grad_weight += weights[corner] * dots[corner];
      }
      location_gradient(
          {x.weight[0], x.weight[1], y.weight[0], y.weight[1]}, {x.slope[0], x.slope[1], y.slope[0], y.slope[1]},
          dots.values, grad_x, grad_y);
      grad_x *= sample.attention;
      grad_y *= sample.attention;
    }
    if (grad.locations != nullptr) {
      C* location = grad.locations + sampler.offset(grad.location_strides, place.batch) +
          grad.location_strides.offset(query, head);
      location[0] = grad_x;
      location[grad.location_strides.axis] = grad_y;
    }
    if (grad.weights != nullptr) {
      grad.weights[sampler.offset(grad.weight_strides, place.batch) + grad.weight_strides.offset(query, head)] =
          from_compute<W>(grad_weight);
    }
  });
}

template <typename T, typename W, int VEC, typename Sums>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    ms_deform_attn_backward_kernel(const Operands<T, W> op, const Gradients<T, W> grad, const Sums all_sums) {
  using C = compute_t<T>;
  __shared__ Shared<C> warps[WARPS];
  Shared<C>& shared = *keep_shared(&warps[threadIdx.x / WARP]);
  const Place place(op);
  const int row = op.num_heads * op.channels;
  const int head = place.head(op, op.unit());
  const T* values = op.value + (place.batch * op.levels.num_rows * op.num_heads + head) * op.channels;
  const T* grad_outputs = grad.output + static_cast<int64_t>(place.batch) * op.num_queries * row + head * op.channels;
  const bool needs_dots = !Sums::EXIST || grad.locations != nullptr || grad.weights != nullptr;

  if (place.first_query >= op.num_queries) {
    return;
  }
  const int query = place.query(op, op.unit());
  const T* grad_output = grad_outputs + static_cast<int64_t>(min(query, op.num_queries - 1)) * row;
  for (int first = 0; first < op.samples; first += op.samples_at_once.divisor) {
    const Sampler<T, W> sampler(op, place, first);
    stage(op, place, sampler, shared.staged);
    for (int first_channel = 0; first_channel < op.channels; first_channel += op.lanes() * VEC) {
      const bool live = first_channel + op.lane() * VEC < op.channels;
      const int channel = live ? first_channel + op.lane() * VEC : op.channels - VEC;
      walk_samples<Sums::EXIST ? 1 : 2>(
          op, query < op.num_queries, values + channel, all_sums.at(op, place.batch, head, channel),
          load_vector<VEC>(grad_output + channel), needs_dots, live, first_channel == 0, shared);
    }
    if (needs_dots) {
      __syncwarp();
      finish_samples(op, grad, place, sampler, shared);
    }
  }
}

// A call that was checked.
struct Call {
  Sizes sizes;
  LevelTable levels;
  Tensor grad_output, value;  // contiguous
  Tensor locations, weights;  // from with_short_steps
  bool needs_locations, needs_weights;
  cudaStream_t stream;
  // Of no elements where not needed. Nobody allocates them before the value's gradient is under way: PyTorch may fill them.
  Tensor grad_locations, grad_weights;

  bool needs_others() const {
    return needs_locations || needs_weights;
  }

  void allocate_others() {
    grad_locations = gradient_of(locations, needs_locations);
    grad_weights = gradient_of(weights, needs_weights);
  }

  template <typename T, typename W>
  Gradients<T, W> gradients() const {
    Gradients<T, W> gradients = {};
    gradients.output = static_cast<const T*>(grad_output.const_data_ptr());
    if (needs_locations) {
      gradients.locations = static_cast<compute_t<T>*>(grad_locations.mutable_data_ptr());
      gradients.location_strides = Strides(grad_locations);
    }
    if (needs_weights) {
      gradients.weights = static_cast<W*>(grad_weights.mutable_data_ptr());
      gradients.weight_strides = Strides(grad_weights);
    }
    return gradients;
  }

  SampledOp sampled_op() const {
    const auto steps = [](const Strides& of) -> SampleSteps {
      return {of.batch, of.head, of.query, of.point, 0, of.level, of.axis};
    };
    SampledOp op = {};
    op.batch = sizes.batch;
    op.heads = sizes.num_heads;
    op.queries = sizes.num_queries;
    op.points = sizes.num_points;
    op.cams = 1;
    op.levels = sizes.num_levels;
    op.rows = sizes.num_values;
    op.channels = sizes.channels;
    op.groups = 1;
    op.unit_square = false;
    op.level_table = levels;
    op.locations = locations;
    op.weights = weights;
    op.location_steps = steps(Strides(locations));
    op.weight_steps = steps(Strides(weights));
    return op;
  }
};

template <typename T, typename W, int VEC, typename Sums>
void launch(const Call& call, const Sums& sums) {
  const auto gradients = call.gradients<T, W>();
  const auto all = operands<T, W>(call.sizes, call.value, call.levels, call.locations, call.weights, VEC, SLOTS);
  launch_parts(all, call.sizes.batch, [&](const Operands<T, W>& op, dim3 grid) {
    ms_deform_attn_backward_kernel<T, W, VEC><<<grid, THREADS, 0, call.stream>>>(op, gradients, sums);
    check_launch("ms_deform_attn_backward");
  });
}

// With VEC channels a lane where the tensors let it, else with one.
template <typename T, typename W, int VEC, typename Sums>
void launch_with_vectors(const Call& call, const Sums& sums) {
  if (can_vectorize<T>(call.sizes, call.value, VEC) && can_vectorize<T>(call.sizes, call.grad_output, VEC)) {
    launch<T, W, VEC>(call, sums);
  } else {
    launch<T, W, 1>(call, sums);
  }
}

// For the gradients of locations and weights alone.
void launch_others(const Call& call) {
  if (!call.needs_others()) {
    return;
  }
  dispatch_types(call.value, call.weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    launch_with_vectors<T, W, 16 / sizeof(T)>(call, NoSums());
  });
}

// How the value's gradient comes about.
enum class Strategy {
  NONE,        // it is not needed
  TILES,       // feature_gradient.cu: the same bits every time
  ROWS_FIRST,  // value_gradient.cu adds up what meets in a row before it adds to the row
  HALF_SUMS,   // this file's kernel adds, in half precision
  WIDE_SUMS,   // this file's kernel adds, in the type that sums run in
};

Strategy strategy(const Call& call, bool needs_value, bool deterministic, bool half_sums) {
  if (!needs_value) {
    return Strategy::NONE;
  }
  if (deterministic) {
    return Strategy::TILES;
  }
  if (rows_are_shared(call.sizes)) {
    return Strategy::ROWS_FIRST;
  }
  return half_sums && half_sums_suffice(call.sizes, call.value, call.grad_output) ? Strategy::HALF_SUMS
                                                                                  : Strategy::WIDE_SUMS;
}

// Each of these computes all gradients, and returns the value's.
Tensor without_value(Call& call) {
  call.allocate_others();
  launch_others(call);
  return gradient_of(call.value, false);
}

Tensor by_tiles(Call& call) {
  FeatureGradient gradient(call.sampled_op(), call.grad_output, call.value, true, call.needs_others(), call.stream);
  call.allocate_others();
  launch_others(call);
  return gradient.finish();
}

Tensor wide_zeros(const Call& call) {
  const Sizes& sizes = call.sizes;
  return allocate_zeros(
      call.value, {sizes.batch, sizes.num_values, sizes.num_heads, sizes.channels}, compute_type(call.value));
}

Tensor by_rows_first(Call& call) {
  const Tensor gradient = wide_zeros(call);
  call.allocate_others();
  add_value_gradient(call.sizes, call.grad_output, call.levels, call.locations, call.weights, gradient, call.stream);
  launch_others(call);
  return as_type(gradient, call.value.scalar_type());
}

Tensor by_half_sums(Call& call) {
  const HalfGradient gradient(call.sizes, call.value, call.levels, call.locations, call.weights, call.stream);
  call.allocate_others();
  dispatch_halves(call.value, call.weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    launch<T, W, HALF_VEC>(call, gradient.sums<T>());
  });
  return gradient.finish(call.stream);
}

Tensor by_wide_sums(Call& call) {
  const Tensor gradient = wide_zeros(call);
  call.allocate_others();
  dispatch_types(call.value, call.weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    using C = compute_t<T>;
    // Half values come 8 bytes a lane, so that the float32 atomics of neighbouring lanes are neighbours.
    constexpr int VEC = sizeof(T) == 8 ? 2 : 4;
    launch_with_vectors<T, W, VEC>(call, WideSums<C>{static_cast<C*>(gradient.mutable_data_ptr())});
  });
  return as_type(gradient, call.value.scalar_type());
}

Tensor run(Call& call, Strategy strategy) {
  switch (strategy) {
    case Strategy::TILES:
      return by_tiles(call);
    case Strategy::ROWS_FIRST:
      return by_rows_first(call);
    case Strategy::HALF_SUMS:
      return by_half_sums(call);
    case Strategy::WIDE_SUMS:
      return by_wide_sums(call);
    default:
      return without_value(call);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights,
    bool needs_value,
    bool needs_sampling_locations,
    bool needs_attention_weights,
    bool deterministic,
    bool half_sums) {
  const auto sizes = check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  check_gradient(grad_output, value, sizes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());

  const Tensor values = as_contiguous(value);
  const Tensor locations = with_short_steps(sampling_locations);
  const Tensor weights = with_short_steps(attention_weights);
  if (sizes.nothing_to_sample()) {
    return {
        zero_gradient_of(values, needs_value), zero_gradient_of(locations, needs_sampling_locations),
        zero_gradient_of(weights, needs_attention_weights)};
  }
  const cudaStream_t stream = current_stream(values.get_device_index());
  const DeviceLevels levels(spatial_shapes, level_start_index, values, sizes.num_values, stream);
  Call call = {sizes,   levels.table(),           as_contiguous(grad_output), values, locations,
               weights, needs_sampling_locations, needs_attention_weights,    stream};
  const Tensor grad_value = run(call, strategy(call, needs_value, deterministic, half_sums));
  return {grad_value, call.grad_locations, call.grad_weights};
}

}  // namespace reimplementation::attention
