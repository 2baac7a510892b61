// Multi-scale deformable attention from offsets and logits on CUDA, forward: attention's kernel, on the form of its samples
// that computes locations and weights.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "attention/forward.cuh"
#include "attention_from_offsets/samples.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::attention_from_offsets {

Tensor forward_cuda(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    const std::optional<Tensor>& offset_scale) {
  const Arguments arguments = {
      value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, offset_scale};
  const Sizes sizes = check(arguments);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::initializer_list<int64_t> output_shape = {
      sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels};
  if (sizes.nothing_to_sample()) {
    return allocate_zeros(value, output_shape);
  }
  const ReadableArguments readable(arguments);
  const Tensor output = allocate(value, output_shape);
  const cudaStream_t stream = current_stream(value.get_device_index());
  const DeviceLevels levels(spatial_shapes, level_start_index, value, sizes.num_values, stream);
  readable.dispatch([&](auto* t, const auto& form) {
    using T = std::remove_pointer_t<decltype(t)>;
    attention::run_forward<T>(sizes, readable.value, levels.table(), form, output, stream);
  });
  return output;
}

}  // namespace reimplementation::attention_from_offsets
