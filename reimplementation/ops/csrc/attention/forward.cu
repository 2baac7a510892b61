// Multi-scale deformable attention on CUDA, forward, of locations and weights that are in memory.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "attention/forward.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::attention {

Tensor forward_cuda(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const auto sizes = check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::initializer_list<int64_t> output_shape = {
      sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels};
  if (sizes.nothing_to_sample()) {
    return allocate_zeros(value, output_shape);
  }
  const Tensor values = as_contiguous(value);
  const Tensor locations = with_short_steps(sampling_locations);
  const Tensor weights = with_short_steps(attention_weights);
  const Tensor output = allocate(values, output_shape);
  const cudaStream_t stream = current_stream(values.get_device_index());
  const DeviceLevels levels(spatial_shapes, level_start_index, values, sizes.num_values, stream);

  dispatch_types(values, attention_weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    run_forward<T>(sizes, values, levels.table(), GivenSamples<T, W>(locations, weights), output, stream);
  });
  return output;
}

}  // namespace reimplementation::attention
