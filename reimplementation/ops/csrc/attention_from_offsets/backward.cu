// Multi-scale deformable attention from offsets and logits on CUDA, backward: attention's kernels, on the form of its samples
// that computes locations and weights.
//
// With w the weights and u their gradients, a logit has the gradient w * (u - mean), where the mean is the sum of w * u over
// the unit. Where a unit's samples are staged at once, the threads that finish them sum it up by themselves. Where they are
// not, they leave u in memory, and each unit's team comes back to it in the end.
//
// Two gradients take more. That of reference points sums over heads and points, and, where levels share them, over levels:
// those of the locations are written down for it. And where the value's gradient must have the same bits every time,
// feature_gradient.cu reads locations and weights from memory: they are written down, too.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "attention/backward.cuh"
#include "attention_from_offsets/samples.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::attention_from_offsets {
namespace {

using attention::Sample;
using attention::SampleGradient;
using attention::Sampler;
using feature_gradient::SampledOp;
using feature_gradient::SampleSteps;

constexpr int THREADS = 128;

// Of offsets and logits, and of locations for reference points; each is null where not needed.
template <typename T, typename L>
struct Gradients {
  using C = compute_t<T>;
  using Form = PredictedSamples<T, L>;
  using Operands = attention::Operands<T, Form>;

  C* locations;  // (batch, queries, heads, levels, points, 2)
  L* offsets;
  L* logits;
  C* of_weights;  // (batch, queries, heads, levels, points), where a unit's samples are not staged at once
  Strides offset_strides, logit_strides;

  __device__ __forceinline__ bool needed() const {
    return locations != nullptr || offsets != nullptr || logits != nullptr;
  }

  // The first of a unit's samples in a contiguous tensor.
  __device__ __forceinline__ static int64_t first_of(const Operands& op, int batch, int query, int head) {
    return ((static_cast<int64_t>(batch) * op.num_queries + query) * op.num_heads + head) * op.samples;
  }

  // Of the samples from number `first` on, which a sampler visits.
  template <typename Shared>
  __device__ __forceinline__ void finish(
      const Operands& op, const Place& place, const Sampler<T, Form>& sampler, int first, Shared& shared) const {
    const int pitch = op.pitch();
    sampler.in_step(
        op, place, [&](bool exists, int unit, const Sample<C>& sample, const typename Form::Found& found, unsigned) {
          SampleGradient<C> gradient = {};
          if (sample.inside) {
            gradient = SampleGradient<C>::of(sample, shared.dots[sample.rank * pitch + unit]);
          }
          C mean = 0;
          if (logits != nullptr) {
            mean = sampler.sum_over_unit(op, exists ? sample.attention * gradient.weight : 0);
          }
          if (!exists) {
            return;
          }
          const int query = place.query(op, unit), head = place.head(op, unit);
          const int64_t number = first_of(op, place.batch, query, head) + first + sample.number;
          if (locations != nullptr) {
            locations[2 * number] = gradient.x;
            locations[2 * number + 1] = gradient.y;
          }
          if (offsets != nullptr) {
            L* xy = offsets + sampler.offset(offset_strides, place.batch) + offset_strides.offset(query, head);
            xy[0] = from_compute<L>(found.reference_x.offset_gradient(gradient.x));
            xy[offset_strides.axis] = from_compute<L>(found.reference_y.offset_gradient(gradient.y));
          }
          if (of_weights != nullptr) {
            of_weights[number] = gradient.weight;
            if (sample.number == 0) {
              shared.staged.means[unit] = first == 0 ? mean : shared.staged.means[unit] + mean;
            }
          } else if (logits != nullptr) {
            logits[sampler.offset(logit_strides, place.batch) + logit_strides.offset(query, head)] =
                from_compute<L>(sample.attention * (gradient.weight - mean));
          }
        });
  }

  // Of the logits of units that were not staged at once.
  template <typename Shared>
  __device__ __forceinline__ void finish_units(const Operands& op, const Place& place, const Shared& shared) const {
    if (of_weights == nullptr) {
      return;
    }
    __syncwarp();  // what the threads of a unit's samples wrote
    const int unit = op.unit(), team = 1 << op.log2_team, query = place.query(op, unit), head = place.head(op, unit);
    if (query >= op.num_queries) {
      return;
    }
    const auto operands = op.form.logits_of(op, place.batch, query, head);
    const Softmax<C> softmax = shared.staged.softmaxes[unit];
    const C mean = shared.staged.means[unit];
    const C* of_unit = of_weights + first_of(op, place.batch, query, head);
    L* to = logits + place.batch * logit_strides.batch + logit_strides.offset(query, head);
    for (int sample = threadIdx.x & (team - 1); sample < op.samples; sample += team) {
      unsigned level = sample;
      const int point = op.points.split(level);
      to[static_cast<int64_t>(level) * logit_strides.level + static_cast<int64_t>(point) * logit_strides.point] =
          from_compute<L>(softmax.weight(operands[sample]) * (of_unit[sample] - mean));
    }
  }
};

constexpr int LOG2_TEAM = 2;  // of threads that find a softmax

// The softmax of every unit, for threads that know no units. Threads map to data as in the forward.
template <typename T, typename L>
__global__ void __launch_bounds__(attention::THREADS)
    write_softmaxes(const attention::Operands<T, PredictedSamples<T, L>> op, Softmax<compute_t<T>>* softmaxes) {
  using Units = typename PredictedSamples<T, L>::Units;
  __shared__ Units warps[attention::WARPS];
  Units& units = warps[threadIdx.x / WARP];
  const Place place(op);
  if (place.first_query >= op.num_queries) {
    return;
  }
  op.form.prepare(op, place, units);
  const int unit = threadIdx.x % WARP;
  if (unit < op.units() && place.query(op, unit) < op.num_queries) {
    const int64_t query = static_cast<int64_t>(place.batch) * op.num_queries + place.query(op, unit);
    softmaxes[query * op.num_heads + place.head(op, unit)] = units.softmax(unit);
  }
}

// Locations (batch, queries, heads, levels, points, 2) and weights. One thread a sample.
template <typename T, typename L>
__global__ void __launch_bounds__(THREADS) write_samples(
    const PredictedSamples<T, L> form,
    const LevelTable levels,
    const Sizes sizes,
    const int64_t count,
    compute_t<T>* locations,
    compute_t<T>* weights) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (number >= count) {
    return;
  }
  int64_t rest = number;
  const auto split = [&](int64_t size) {
    const int64_t quotient = rest / size, index = rest - quotient * size;
    rest = quotient;
    return index;
  };
  const int64_t point = split(sizes.num_points), level = split(sizes.num_levels), unit = rest;
  const int64_t head = split(sizes.num_heads), query = split(sizes.num_queries), batch = rest;
  const auto pointers = form.pointers([&](const Strides& of) {
    return batch * of.batch + query * of.query + head * of.head + level * of.level + point * of.point;
  });
  const auto loaded = form.load(pointers, [](const Strides&) { return int64_t{0}; }, attention::Load());
  const auto found = form.find(loaded, levels[level], form.softmax(unit));
  locations[2 * number] = found.x;
  locations[2 * number + 1] = found.y;
  weights[number] = found.attention;
}

// The gradient of reference points (batch, queries, levels or 1, 2 or 4) from those of locations. One thread a point and axis,
// which adds up in the order of the samples.
template <typename T, typename L>
__global__ void __launch_bounds__(THREADS) sum_locations(
    const PredictedSamples<T, L> form,
    const Sizes sizes,
    const int64_t count,
    const int levels_of_a_point,
    const compute_t<T>* of_locations,
    compute_t<T>* of_references) {
  using C = compute_t<T>;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (number >= count) {
    return;
  }
  const int64_t axis = number % 2, reference = number / 2;
  const int64_t groups = sizes.num_levels / levels_of_a_point;  // of levels that share a reference point
  const int64_t first_level = reference % groups * levels_of_a_point, query = reference / groups;
  const int64_t batch = query / sizes.num_queries, query_of_batch = query - batch * sizes.num_queries;
  C of_place = 0, of_size = 0;
  for (int64_t head = 0; head < sizes.num_heads; ++head) {
    for (int64_t level = first_level; level < first_level + levels_of_a_point; ++level) {
      const C* of_level =
          of_locations + ((query * sizes.num_heads + head) * sizes.num_levels + level) * sizes.num_points * 2 + axis;
      const auto pointers = form.pointers([&](const Strides& of) {
        return batch * of.batch + query_of_batch * of.query + head * of.head + level * of.level;
      });
#pragma unroll 4
      for (int64_t point = 0; point < sizes.num_points; ++point) {
        const C of_location = of_level[2 * point];
        of_place += of_location;
        if (form.are_boxes && of_location != 0) {
          const L offset = pointers.offset[point * form.offset_strides.point + axis * form.offset_strides.axis];
          of_size += of_location * (to_compute(offset) * pointers.halved_scale);
        }
      }
    }
  }
  C* to = of_references + reference * (form.are_boxes ? 4 : 2) + axis;
  to[0] = of_place;
  if (form.are_boxes) {
    to[2] = of_size;
  }
}

// Blocks of one thread for each of `count`.
unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + THREADS - 1) / THREADS;
  STD_TORCH_CHECK(blocks <= INT_MAX, "N * Lq * M * L * P is too large: it takes ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// A call that was checked: see attention/backward.cuh.
struct Call {
  Sizes sizes;
  LevelTable levels;
  Tensor grad_output, value;  // contiguous
  ReadableArguments arguments;
  bool needs_references, needs_offsets, needs_logits;
  cudaStream_t stream;
  // Of no elements where not needed.
  Tensor grad_references, grad_offsets, grad_logits;
  // What is written down on the way.
  std::optional<Tensor> location_gradients, weight_gradients, softmaxes;

  bool needs_others() const {
    return needs_references || needs_offsets || needs_logits;
  }

  void allocate_others() {
    grad_references = contiguous_gradient(arguments.references, needs_references);
    grad_offsets = gradient_of(arguments.offsets, needs_offsets);
    grad_logits = gradient_of(arguments.logits, needs_logits);
    if (needs_references) {
      location_gradients = allocate_samples(2);
    }
  }

  template <typename Body>
  void dispatch(const Body& body) const {
    arguments.dispatch(body);
  }

  template <typename Body>
  void dispatch_without_units(const Body& body) {
    arguments.dispatch([&](auto* t, auto form) {
      find_softmaxes(t, form);
      body(t, form);
    });
  }

  template <typename T, typename L>
  Gradients<T, L> gradients(const PredictedSamples<T, L>&, bool at_once) {
    using C = compute_t<T>;
    Gradients<T, L> gradients = {};
    if (needs_references) {
      gradients.locations = static_cast<C*>(location_gradients->mutable_data_ptr());
    }
    if (needs_offsets) {
      gradients.offsets = static_cast<L*>(grad_offsets.mutable_data_ptr());
      gradients.offset_strides = Strides(grad_offsets);
    }
    if (needs_logits) {
      gradients.logits = static_cast<L*>(grad_logits.mutable_data_ptr());
      gradients.logit_strides = Strides(grad_logits);
      if (!at_once) {
        weight_gradients = allocate_samples(1);
        gradients.of_weights = static_cast<C*>(weight_gradients->mutable_data_ptr());
      }
    }
    return gradients;
  }

  // Writes the samples down.
  SampledOp sampled_op() {
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
    op.locations = allocate_samples(2);
    op.weights = allocate_samples(1);
    const int64_t level = sizes.num_points, head = level * sizes.num_levels, query = head * sizes.num_heads;
    op.location_steps = {2 * query * sizes.num_queries, 2 * head, 2 * query, 2, 0, 2 * level, 1};
    op.weight_steps = {query * sizes.num_queries, head, query, 1, 0, level, 0};
    dispatch_without_units([&](auto* t, const auto& form) {
      using C = compute_t<std::remove_pointer_t<decltype(t)>>;
      const int64_t count = op.weights.numel();
      write_samples<<<blocks_for(count), THREADS, 0, stream>>>(
          form, levels, sizes, count, static_cast<C*>(op.locations.mutable_data_ptr()),
          static_cast<C*>(op.weights.mutable_data_ptr()));
      check_launch("write_samples");
    });
    return op;
  }

  // After the gradients of the locations.
  void finish_references() const {
    if (!needs_references) {
      return;
    }
    arguments.dispatch([&](auto* t, const auto& form) {
      using C = compute_t<std::remove_pointer_t<decltype(t)>>;
      const int64_t points = arguments.references.size(2), count = sizes.batch * sizes.num_queries * points * 2;
      sum_locations<<<blocks_for(count), THREADS, 0, stream>>>(
          form, sizes, count, static_cast<int>(sizes.num_levels / points),
          static_cast<const C*>(location_gradients->const_data_ptr()),
          static_cast<C*>(grad_references.mutable_data_ptr()));
      check_launch("sum_locations");
    });
  }

 private:
  // So many numbers of each sample, (batch, queries, heads, levels, points, numbers), of the type that sums run in.
  Tensor allocate_samples(int64_t numbers) const {
    return allocate(
        value, {sizes.batch, sizes.num_queries, sizes.num_heads, sizes.num_levels, sizes.num_points, numbers},
        compute_type(value));
  }

  template <typename T, typename L>
  void find_softmaxes(T*, PredictedSamples<T, L>& form) {
    using C = compute_t<T>;
    softmaxes = allocate(value, {sizes.batch, sizes.num_queries, sizes.num_heads, 2}, compute_type(value));
    auto* to = static_cast<Softmax<C>*>(softmaxes->mutable_data_ptr());
    auto all = attention::operands<T>(sizes, value, levels, form, 1, 2 * WARP);  // none is staged
    all.log2_lanes = all.log2_team = LOG2_TEAM;
    all.log2_heads_at_once = 0;
    attention::launch_parts(all, sizes.batch, [&](const attention::Operands<T, PredictedSamples<T, L>>& op, dim3 grid) {
      write_softmaxes<<<grid, attention::THREADS, 0, stream>>>(op, to);
      check_launch("write_softmaxes");
    });
    form.softmaxes = to;
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    const std::optional<Tensor>& offset_scale,
    bool needs_value,
    bool needs_reference_points,
    bool needs_sampling_offsets,
    bool needs_attention_logits,
    bool deterministic,
    bool half_sums) {
  const Arguments arguments = {
      value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, offset_scale};
  const Sizes sizes = check(arguments);
  attention::check_gradient(grad_output, value, sizes);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  if (sizes.nothing_to_sample()) {
    Tensor grad_references = contiguous_gradient(reference_points, needs_reference_points);
    torch::stable::zero_(grad_references);
    return {
        zero_gradient_of(as_contiguous(value), needs_value), grad_references,
        zero_gradient_of(sampling_offsets, needs_sampling_offsets),
        zero_gradient_of(attention_logits, needs_attention_logits)};
  }
  const ReadableArguments readable(arguments);
  const cudaStream_t stream = current_stream(value.get_device_index());
  const DeviceLevels levels(spatial_shapes, level_start_index, value, sizes.num_values, stream);
  Call call = {sizes,    levels.table(),         as_contiguous(grad_output), readable.value,
               readable, needs_reference_points, needs_sampling_offsets,     needs_attention_logits,
               stream};
  const Tensor grad_value = attention::run(call, attention::strategy(call, needs_value, deterministic, half_sums));
  call.finish_references();
  return {grad_value, call.grad_references, call.grad_offsets, call.grad_logits};
}

}  // namespace reimplementation::attention_from_offsets
