// Multi-scale deformable attention on CUDA, forward; samples.cuh tells how threads map to data.
//
// Corner weights are staged with the attention weight in them, so a unit's lanes do one broadcast read of weights, one of
// rows, and one gather per corner; sums stay in registers and are written once, the same bits every time. What remains is
// the traffic of the gathers: 4 * D * sizeof(T) bytes a sample.
#pragma once

#include "attention/samples.cuh"

namespace reimplementation::attention {

constexpr int FORWARD_MIN_BLOCKS = 8;  // a multiprocessor's

// Of footprints in a warp's shared memory: 16 samples of D = 32 channels' units.
template <typename T>
constexpr int FORWARD_SLOTS = sizeof(T) == 2 ? 144 : 80;

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

template <typename T, typename Form, int VEC, int IN_FLIGHT>
__global__ void __launch_bounds__(THREADS, FORWARD_MIN_BLOCKS)
    ms_deform_attn_forward(const Operands<T, Form> op, T* __restrict__ output) {
  using C = compute_t<T>;
  __shared__ Staged<C, FORWARD_SLOTS<T>, Form> warps[WARPS];
  auto& staged = *keep_shared(&warps[threadIdx.x / WARP]);
  const Place place(op);
  const int row = op.num_heads * op.channels;
  const int head = place.head(op, op.unit()) * op.channels;
  const T* values = op.value + place.batch * op.levels.num_rows * row + head;
  T* outputs = output + static_cast<int64_t>(place.batch) * op.num_queries * row + head;

  if (place.first_query >= op.num_queries) {
    return;
  }
  op.form.prepare(op, place, staged);
  const int query = place.query(op, op.unit());
  for (int first_channel = 0; first_channel < op.channels; first_channel += op.lanes() * VEC) {
    const int channel = first_channel + op.lane() * VEC;
    // Lanes beyond the last channel read it once more and write nothing.
    const T* value = values + min(channel, op.channels - VEC);
    C sums[VEC] = {};
    for (int first = 0; first < op.samples; first += op.samples_at_once.divisor) {
      if (first_channel == 0 || op.samples > op.samples_at_once.divisor) {
        stage(op, place, Sampler<T, Form>(op, place, first, &staged), staged);
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

template <typename T, int VEC, int IN_FLIGHT, typename Form>
void launch_forward(
    const Sizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Form& form,
    const Tensor& output,
    cudaStream_t stream) {
  const auto all = operands<T>(sizes, value, levels, form, VEC, FORWARD_SLOTS<T>);
  launch_parts(all, sizes.batch, [&](const Operands<T, Form>& op, dim3 grid) {
    ms_deform_attn_forward<T, Form, VEC, IN_FLIGHT>
        <<<grid, THREADS, 0, stream>>>(op, static_cast<T*>(output.mutable_data_ptr()));
    check_launch("ms_deform_attn");
  });
}

// Fills the output (batch, queries, heads * channels) from a contiguous value.
template <typename T, typename Form>
void run_forward(
    const Sizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Form& form,
    const Tensor& output,
    cudaStream_t stream) {
  constexpr int VEC = 16 / sizeof(T);
  if (can_vectorize<T>(sizes, value, VEC)) {
    launch_forward<T, VEC, 2>(sizes, value, levels, form, output, stream);
  } else {
    launch_forward<T, 1, 4>(sizes, value, levels, form, output, stream);
  }
}

}  // namespace reimplementation::attention
