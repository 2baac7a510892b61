// Multi-scale deformable attention on CUDA, forward; samples.cuh tells how threads map to data.
//
// Corner weights are staged with the attention weight in them, so a unit's lanes do one broadcast read of weights, one of
// rows, and one gather per corner; sums stay in registers and are written once, the same bits every time. What remains is
// the traffic of the gathers: 4 * D * sizeof(T) bytes a sample.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "attention/samples.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::attention {
namespace {

constexpr int MIN_BLOCKS = 8;  // a multiprocessor's

// Of footprints in a warp's shared memory: 16 samples of D = 32 channels' units.
template <typename T>
constexpr int SLOTS = sizeof(T) == 2 ? 144 : 80;

// Adds `COUNT` samples of a unit, `stride` slots apart, all loads before the first sum.
template <int COUNT, int VEC, typename T, int SLOTS>
__device__ __forceinline__ void gather(
    const Footprints<compute_t<T>, SLOTS>& staged,
    int slot,
    int stride,
    const T* value,
    int row_bytes,
    compute_t<T> (&sums)[VEC]) {
  Vector<T, VEC> corners[COUNT][4];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const PackedRows rows = staged.rows[slot + i * stride];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      corners[i][corner] = load_vector<VEC>(row_address(value, rows[corner], row_bytes));
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<compute_t<T>> weights = staged.weights[slot + i * stride];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        sums[v] += weights[corner] * corners[i][corner][v];
      }
    }
  }
}

template <typename T, typename W, int VEC, int IN_FLIGHT>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    ms_deform_attn_forward(const Operands<T, W> op, T* __restrict__ output) {
  using C = compute_t<T>;
  __shared__ Footprints<C, SLOTS<T>> footprints[WARPS];
  auto& staged = *keep_shared(&footprints[threadIdx.x / WARP]);
  const Place place(op);
  const int row = op.num_heads * op.channels;
  const int head = place.head(op, op.unit()) * op.channels;
  const T* values = op.value + place.batch * op.levels.num_rows * row + head;
  T* outputs = output + static_cast<int64_t>(place.batch) * op.num_queries * row + head;

  if (place.first_query >= op.num_queries) {
    return;
  }
  const int query = place.query(op, op.unit());
  for (int first_channel = 0; first_channel < op.channels; first_channel += op.lanes() * VEC) {
    const int channel = first_channel + op.lane() * VEC;
    // Lanes beyond the last channel read it once more and write nothing.
    const T* value = values + min(channel, op.channels - VEC);
    C sums[VEC] = {};
    for (int first = 0; first < op.samples; first += op.samples_at_once.divisor) {
      if (first_channel == 0 || op.samples > op.samples_at_once.divisor) {
        stage(op, place, Sampler<T, W>(op, place, first), staged);
      }
      const int count = query < op.num_queries ? staged.count[op.unit()] : 0;
      const int row_bytes = row * static_cast<int>(sizeof(T));
      int slot = op.split() * op.pitch() + op.unit();
      int sample = op.split();
      for (; sample + (IN_FLIGHT - 1) * op.splits() < count; sample += IN_FLIGHT * op.splits()) {
        gather<IN_FLIGHT>(staged, slot, op.splits() * op.pitch(), value, row_bytes, sums);
        slot += IN_FLIGHT * op.splits() * op.pitch();
      }
      for (; sample < count; sample += op.splits()) {
        gather<1>(staged, slot, op.splits() * op.pitch(), value, row_bytes, sums);
        slot += op.splits() * op.pitch();
      }
    }
    for (int step = op.lanes(); step < op.lanes() * op.splits(); step *= 2) {
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        sums[v] += __shfl_xor_sync(ALL_LANES, sums[v], step);
      }
    }
    if (query < op.num_queries && op.split() == 0 && channel < op.channels) {
      Vector<T, VEC> rounded;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        rounded.values[v] = from_compute<T>(sums[v]);
      }
      store_once(outputs + static_cast<int64_t>(query) * row + channel, rounded);
    }
  }
}

template <typename T, typename W, int VEC, int IN_FLIGHT>
void launch_forward(
    const Sizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const Tensor& output,
    cudaStream_t stream) {
  const auto all = operands<T, W>(sizes, value, levels, locations, weights, VEC, SLOTS<T>);
  launch_parts(all, sizes.batch, [&](const Operands<T, W>& op, dim3 grid) {
    ms_deform_attn_forward<T, W, VEC, IN_FLIGHT>
        <<<grid, THREADS, 0, stream>>>(op, static_cast<T*>(output.mutable_data_ptr()));
    check_launch("ms_deform_attn");
  });
}

}  // namespace

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
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, values, VEC)) {
      launch_forward<T, W, VEC, 2>(sizes, values, levels.table(), locations, weights, output, stream);
    } else {
      launch_forward<T, W, 1, 4>(sizes, values, levels.table(), locations, weights, output, stream);
    }
  });
  return output;
}

}  // namespace reimplementation::attention
