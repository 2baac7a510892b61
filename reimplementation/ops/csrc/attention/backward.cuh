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
//
// What the host asks of a `Call` of a form: `sizes`, `levels`, a contiguous `grad_output` and `value`, `stream`;
// - `dispatch(body)`, which calls `body` with a null T* of the value's type, and the form; `dispatch_without_units` likewise,
//   for a kernel whose threads know no units;
// - `needs_others()`, of the gradients of samples; `allocate_others()`, which comes once the value's gradient is under way,
//   as PyTorch may fill new memory; then `gradients(form, at_once)`, where a unit's samples may be staged at once;
// - `sampled_op()`, the samples as feature_gradient.cuh has them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <type_traits>

#include "feature_gradient/feature_gradient.cuh"
#include "attention/half_gradient.cuh"
#include "attention/samples.cuh"
#include "attention/value_gradient.cuh"

namespace reimplementation::attention {

using feature_gradient::FeatureGradient;
using feature_gradient::SampledOp;
using feature_gradient::SampleSteps;

constexpr int BACKWARD_SLOTS = 80;      // of footprints in a warp's shared memory: 16 samples of D = 32 channels' units
constexpr int BACKWARD_MIN_BLOCKS = 8;  // a multiprocessor's

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

template <typename T, typename Form>
struct Shared {
  Staged<T, BACKWARD_SLOTS, Form> staged;
  Four<T> dots[BACKWARD_SLOTS];  // of each corner with the gradient of its unit's output
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
template <int IN_FLIGHT, typename Sums, typename T, typename Form, int VEC>
__device__ __forceinline__ void walk_samples(
    const Operands<T, Form>& op,
    bool exists,
    const T* value,
    const Sums& sums,
    const Vector<T, VEC>& grad_output,
    bool needs_dots,
    bool live,
    bool first_channels,
    Shared<compute_t<T>, Form>& shared) {
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

// What step 3 finds of a sample: the gradients of its weight and its location.
template <typename C>
struct SampleGradient {
  C weight, x, y;

  // Of a sample that is inside, from its dot products.
  __device__ __forceinline__ static SampleGradient of(const Sample<C>& sample, const Four<C>& dots) {
    SampleGradient gradient = {};
    const Axis<C> x = sample.x_axis(), y = sample.y_axis();
    const Four<C> weights = corner_weights(x, y);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      gradient.weight += weights[corner] * dots[corner];
    }
    location_gradient(
        {x.weight[0], x.weight[1], y.weight[0], y.weight[1]}, {x.slope[0], x.slope[1], y.slope[0], y.slope[1]},
        dots.values, gradient.x, gradient.y);
    gradient.x *= sample.attention;
    gradient.y *= sample.attention;
    return gradient;
  }
};

// `Gradients` is the form's: where those of samples go, and how.
template <typename T, typename Form, int VEC, typename Sums, typename Gradients>
__global__ void __launch_bounds__(THREADS, BACKWARD_MIN_BLOCKS) ms_deform_attn_backward_kernel(
    const Operands<T, Form> op, const T* const grad_output_of_all, const Gradients grad, const Sums all_sums) {
  using C = compute_t<T>;
  __shared__ Shared<C, Form> warps[WARPS];
  Shared<C, Form>& shared = *keep_shared(&warps[threadIdx.x / WARP]);
  const Place place(op);
  const int row = op.num_heads * op.channels;
  const int head = place.head(op, op.unit());
  const T* values = op.value + (place.batch * op.levels.num_rows * op.num_heads + head) * op.channels;
  const T* grad_outputs =
      grad_output_of_all + static_cast<int64_t>(place.batch) * op.num_queries * row + head * op.channels;
  const bool needs_dots = !Sums::EXIST || grad.needed();

  if (place.first_query >= op.num_queries) {
    return;
  }
  op.form.prepare(op, place, shared.staged);
  const int query = place.query(op, op.unit());
  const T* grad_output = grad_outputs + static_cast<int64_t>(min(query, op.num_queries - 1)) * row;
  for (int first = 0; first < op.samples; first += op.samples_at_once.divisor) {
    const Sampler<T, Form> sampler(op, place, first, &shared.staged);
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
      grad.finish(op, place, sampler, first, shared);
    }
  }
  grad.finish_units(op, place, shared);
}

// How the value's gradient comes about.
enum class Strategy {
  NONE,        // it is not needed
  TILES,       // feature_gradient.cu: the same bits every time
  ROWS_FIRST,  // value_gradient.cu adds up what meets in a row before it adds to the row
  HALF_SUMS,   // this file's kernel adds, in half precision
  WIDE_SUMS,   // this file's kernel adds, in the type that sums run in
};

template <typename Call>
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

// With VEC channels a lane where the tensors let it, else with one.
template <typename T, int VEC, typename Call, typename Form, typename Sums>
void launch_with(Call& call, const Form& form, const Sums& sums) {
  const auto* grad_output = static_cast<const T*>(call.grad_output.const_data_ptr());
  const auto all = operands<T>(call.sizes, call.value, call.levels, form, VEC, BACKWARD_SLOTS);
  const auto gradients = call.gradients(form, all.samples <= all.samples_at_once.divisor);
  launch_parts(all, call.sizes.batch, [&](const Operands<T, Form>& op, dim3 grid) {
    ms_deform_attn_backward_kernel<T, Form, VEC><<<grid, THREADS, 0, call.stream>>>(op, grad_output, gradients, sums);
    check_launch("ms_deform_attn_backward");
  });
}

template <typename T, int VEC, typename Call, typename Form, typename Sums>
void launch_with_vectors(Call& call, const Form& form, const Sums& sums) {
  if (can_vectorize<T>(call.sizes, call.value, VEC) && can_vectorize<T>(call.sizes, call.grad_output, VEC)) {
    launch_with<T, VEC>(call, form, sums);
  } else {
    launch_with<T, 1>(call, form, sums);
  }
}

// For the gradients of samples alone.
template <typename Call>
void launch_others(Call& call) {
  if (!call.needs_others()) {
    return;
  }
  call.dispatch([&](auto* t, const auto& form) {
    using T = std::remove_pointer_t<decltype(t)>;
    launch_with_vectors<T, 16 / sizeof(T)>(call, form, NoSums());
  });
}

// Each of these computes all gradients, and returns the value's.
template <typename Call>
Tensor without_value(Call& call) {
  call.allocate_others();
  launch_others(call);
  return gradient_of(call.value, false);
}

template <typename Call>
Tensor by_tiles(Call& call) {
  FeatureGradient gradient(call.sampled_op(), call.grad_output, call.value, true, call.needs_others(), call.stream);
  call.allocate_others();
  launch_others(call);
  return gradient.finish();
}

template <typename Call>
Tensor wide_zeros(const Call& call) {
  const Sizes& sizes = call.sizes;
  return allocate_zeros(
      call.value, {sizes.batch, sizes.num_values, sizes.num_heads, sizes.channels}, compute_type(call.value));
}

template <typename Call>
Tensor by_rows_first(Call& call) {
  const Tensor gradient = wide_zeros(call);
  call.allocate_others();
  call.dispatch_without_units([&](auto* t, const auto& form) {
    using T = std::remove_pointer_t<decltype(t)>;
    add_value_gradient<T>(call.sizes, call.grad_output, call.levels, form, gradient, call.stream);
  });
  launch_others(call);
  return as_type(gradient, call.value.scalar_type());
}

template <typename Call>
Tensor by_half_sums(Call& call) {
  std::optional<HalfGradient> gradient;
  call.dispatch([&](auto* t, const auto& form) {
    using T = std::remove_pointer_t<decltype(t)>;
    if constexpr (IS_HALF<T>) {
      gradient.emplace(HalfGradient::of<T>(call.sizes, call.value, call.levels, form, call.stream));
      call.allocate_others();
      launch_with<T, HALF_VEC>(call, form, gradient->template sums<T>());
    }
  });
  return gradient->finish(call.stream);
}

template <typename Call>
Tensor by_wide_sums(Call& call) {
  const Tensor gradient = wide_zeros(call);
  call.allocate_others();
  call.dispatch([&](auto* t, const auto& form) {
    using T = std::remove_pointer_t<decltype(t)>;
    using C = compute_t<T>;
    // Half values come 8 bytes a lane, so that the float32 atomics of neighbouring lanes are neighbours.
    constexpr int VEC = sizeof(T) == 8 ? 2 : 4;
    launch_with_vectors<T, VEC>(call, form, WideSums<C>{static_cast<C*>(gradient.mutable_data_ptr())});
  });
  return as_type(gradient, call.value.scalar_type());
}

template <typename Call>
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

}  // namespace reimplementation::attention
