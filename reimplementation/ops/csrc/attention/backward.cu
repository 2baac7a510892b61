// Multi-scale deformable attention on CUDA, backward, of locations and weights that are in memory.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "attention/backward.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::attention {
namespace {

// Of locations and weights.
template <typename T, typename W>
struct Gradients {
  using C = compute_t<T>;

  C* locations;  // null where not needed, as is that of the weights
  W* weights;
  Strides location_strides, weight_strides;

  __device__ __forceinline__ bool needed() const {
    return locations != nullptr || weights != nullptr;
  }

  template <typename Form, typename Shared>
  __device__ __forceinline__ void finish(
      const Operands<T, Form>& op, const Place& place, const Sampler<T, Form>& sampler, int, const Shared& shared)
      const {
    const int pitch = op.pitch();
    sampler.for_each(op, place, [&](int unit, int query, int head, const Sample<C>& sample, int) {
      SampleGradient<C> gradient = {};
      if (sample.inside) {
        gradient = SampleGradient<C>::of(sample, shared.dots[sample.rank * pitch + unit]);
      }
      if (locations != nullptr) {
        C* location = locations + sampler.offset(location_strides, place.batch) + location_strides.offset(query, head);
        location[0] = gradient.x;
        location[location_strides.axis] = gradient.y;
      }
      if (weights != nullptr) {
        weights[sampler.offset(weight_strides, place.batch) + weight_strides.offset(query, head)] =
            from_compute<W>(gradient.weight);
      }
    });
  }

  template <typename Form, typename Shared>
  __device__ __forceinline__ void finish_units(const Operands<T, Form>&, const Place&, const Shared&) const {}
};

// A call that was checked.
struct Call {
  Sizes sizes;
  LevelTable levels;
  Tensor grad_output, value;  // contiguous
  Tensor locations, weights;  // from with_short_steps
  bool needs_locations, needs_weights;
  cudaStream_t stream;
  // Of no elements where not needed.
  Tensor grad_locations, grad_weights;

  bool needs_others() const {
    return needs_locations || needs_weights;
  }

  void allocate_others() {
    grad_locations = gradient_of(locations, needs_locations);
    grad_weights = gradient_of(weights, needs_weights);
  }

  template <typename Body>
  void dispatch(const Body& body) const {
    dispatch_types(value, weights, [&](auto* t, auto* w) {
      body(t, GivenSamples<std::remove_pointer_t<decltype(t)>, std::remove_pointer_t<decltype(w)>>(locations, weights));
    });
  }
  template <typename Body>
  void dispatch_without_units(const Body& body) const {
    dispatch(body);
  }

  template <typename T, typename W>
  Gradients<T, W> gradients(const GivenSamples<T, W>&, bool) const {
    Gradients<T, W> gradients = {};
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
