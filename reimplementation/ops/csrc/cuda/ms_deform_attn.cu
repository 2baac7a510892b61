// Multi-scale deformable attention on CUDA, forward and backward.
//
// A *unit* is a query and a head: L * P samples of D channels. `lanes` threads, each with VEC neighbouring channels, own
// a unit, and a block owns THREADS / lanes neighbouring queries of one head:
//
//        block = head m   unit 0 = query q      | lane 0: channels 0..3 | lane 1: 4..7 | ...
//                         unit 1 = query q + 1  |                                      |
//
//   1. one thread per sample turns a location into a footprint in shared memory: four rows, four weights;
//   2. the lanes of a unit walk its samples: a broadcast read of the footprint, one gather per corner.
//
// So coordinates are computed once per sample and not once per lane; locations and weights are read coalesced; and the
// block's queries, being neighbours with like reference points, find each other's pixels of the head in L1. What
// remains is the traffic of the gathers: 4 * D * sizeof(T) bytes a sample.
//
// Forward: sums stay in registers and are written once; the same bits every time. Backward: the gradients of locations
// and weights are sums over a unit's lanes and written once; that of the value is added atomically, 16 bytes at a time
// where the GPU can.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "../common/corners.cuh"
#include "../common/launch.cuh"
#include "../common/ms_deform_attn.h"
#include "../common/vector.cuh"

namespace reimplementation::cuda {
namespace {

constexpr int THREADS = 128;

// Footprints in shared memory at a time, over all units of the block: 16 samples of D = 32 channels' units.
template <typename T>
constexpr int STAGED_SAMPLES = sizeof(T) == 2 ? 576 : 288;

template <typename T, typename W>
struct Operands {
  const T* value;  // (batch, values, heads, channels)
  const compute_t<T>* locations;
  const W* weights;
  LevelTable levels;
  int64_t location_strides[6];
  int64_t weight_strides[5];
  int64_t num_queries, tiles;  // tiles of neighbouring queries
  int num_heads, channels, num_levels, num_points;
  int lanes, log2_lanes;       // of a unit
};

template <typename T, typename W>
struct Gradients {
  const T* output;          // (batch, queries, heads, channels)
  compute_t<T>* value;      // zeroed, or null where not needed; so are the others
  compute_t<T>* locations;
  W* weights;
  int64_t location_strides[6];
  int64_t weight_strides[5];
};

// Which queries of which head a block owns.
template <typename T, typename W>
struct Tile {
  int64_t batch, first_query;
  int head, units, pitch;

  __device__ explicit Tile(const Operands<T, W>& op) {
    const int64_t tile = blockIdx.x / op.num_heads;
    head = static_cast<int>(blockIdx.x - tile * op.num_heads);
    batch = tile / op.tiles;
    units = THREADS >> op.log2_lanes;
    pitch = units + 1;
    first_query = (tile - batch * op.tiles) * units;
  }
};

// A sample is staged at `sample * pitch + unit`: the units of a warp read neighbouring words, and a pitch one above the
// number of units keeps the threads that write neighbouring samples off each other's banks.
template <typename T, int SAMPLES>
struct Footprints {
  Four<T> weights[SAMPLES];
  Four<int> rows[SAMPLES];
  int first_inside[THREADS];  // of each unit: its first staged sample that touches its level
};

constexpr int NONE_INSIDE = INT_MAX;

// Stages samples first, ..., first + count - 1 of every unit. `keep(i, sample, unit, level, x, y)` stores
// what sample i weighs. A sample that touches nothing weighs nothing, and borrows the rows of one in its unit that
// does: it can be read like any other, and brings in no pixel that the unit does not sample anyway.
template <typename T, typename W, int SAMPLES, typename Keep>
__device__ void stage(
    const Operands<T, W>& op,
    const Tile<T, W>& tile,
    int first,
    int count,
    Footprints<compute_t<T>, SAMPLES>& staged,
    Keep keep) {
  using C = compute_t<T>;
  __syncthreads();  // whoever still reads the samples before these
  staged.first_inside[threadIdx.x] = NONE_INSIDE;
  __syncthreads();
  bool outside = false;
  const C* locations = op.locations + tile.batch * op.location_strides[0] + tile.head * op.location_strides[2];
  for (int i = threadIdx.x; i < count * tile.units; i += THREADS) {
    // Neighbouring threads take neighbouring samples of one unit: their locations are neighbours in memory.
    const int unit = i / count;
    const int sample = i - unit * count;
    const int slot = sample * tile.pitch + unit;
    const int64_t query = tile.first_query + unit;
    const int level_number = (first + sample) / op.num_points;
    const int point = first + sample - level_number * op.num_points;
    staged.rows[slot] = {-1, -1, -1, -1};
    Axis<C> x = {}, y = {};
    if (query < op.num_queries) {
      const Level level = op.levels[level_number];
      const C* location =
          locations + query * op.location_strides[1] + level_number * op.location_strides[3] + point * op.location_strides[4];
      const C pixel_x = pixel_position(location[0], level.width);
      const C pixel_y = pixel_position(location[op.location_strides[5]], level.height);
      if (!level.empty() && touches_level(pixel_x, pixel_y, level.width, level.height)) {
        x = bilinear_axis(pixel_x, level.width);
        y = bilinear_axis(pixel_y, level.height);
        staged.rows[slot] = corner_rows(level, x, y);
        atomicMin(&staged.first_inside[unit], sample);
      }
    }
    outside |= staged.rows[slot][0] < 0;
    keep(slot, query, level_number, point, x, y);
  }
  if (!__syncthreads_or(outside)) {
    return;
  }
  for (int i = threadIdx.x; i < count * tile.units; i += THREADS) {
    const int unit = i / count;
    const int slot = (i - unit * count) * tile.pitch + unit;
    const int lender = staged.first_inside[unit];
    if (staged.rows[slot][0] < 0 && lender != NONE_INSIDE) {
      staged.rows[slot] = staged.rows[lender * tile.pitch + unit];
    }
  }
  __syncthreads();
}

template <typename T, typename W>
__device__ __forceinline__ compute_t<T> attention_weight(
    const Operands<T, W>& op, const Tile<T, W>& tile, int64_t query, int level, int point) {
  return to_compute(
      op.weights
          [tile.batch * op.weight_strides[0] + query * op.weight_strides[1] + tile.head * op.weight_strides[2] +
           level * op.weight_strides[3] + point * op.weight_strides[4]]);
}

// ---------------------------------------------------------------------------------------------------------- forward

// Adds `COUNT` samples of a unit, all loads before the first sum.
template <int COUNT, int VEC, typename T, int SAMPLES>
__device__ __forceinline__ void gather(
    const Footprints<compute_t<T>, SAMPLES>& staged,
    int slot,
    int pitch,
    const T* value,
    int64_t row_stride,
    compute_t<T> (&sums)[VEC]) {
  Vector<T, VEC> corners[COUNT][4];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<int> rows = staged.rows[slot + i * pitch];
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      corners[i][corner] = load_vector<VEC>(value + rows[corner] * row_stride);
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<compute_t<T>> weights = staged.weights[slot + i * pitch];
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
__global__ void __launch_bounds__(THREADS) ms_deform_attn_forward(const Operands<T, W> op, T* __restrict__ output) {
  using C = compute_t<T>;
  __shared__ Footprints<C, STAGED_SAMPLES<T>> staged;
  const Tile<T, W> tile(op);
  const int unit = threadIdx.x >> op.log2_lanes;
  const int lane = threadIdx.x & (op.lanes - 1);
  const int64_t query = tile.first_query + unit;
  const int64_t row_stride = static_cast<int64_t>(op.num_heads) * op.channels;
  const int samples = op.num_levels * op.num_points;
  const int samples_at_once = STAGED_SAMPLES<T> / tile.pitch;
  const T* head = op.value + tile.batch * op.levels.num_rows * row_stride + tile.head * op.channels;
  T* result = output + ((tile.batch * op.num_queries + query) * op.num_heads + tile.head) * op.channels;

  for (int first_channel = 0; first_channel < op.channels; first_channel += op.lanes * VEC) {
    const int channel = first_channel + lane * VEC;
    // Lanes beyond the last channel read it once more and write nothing.
    const T* value = head + min(channel, op.channels - VEC);
    C sums[VEC] = {};
    for (int first = 0; first < samples; first += samples_at_once) {
      const int count = min(samples_at_once, samples - first);
      if (first_channel == 0 || samples > samples_at_once) {
        stage(op, tile, first, count, staged, [&](int slot, int64_t q, int level, int point, const Axis<C>& x, const Axis<C>& y) {
          Four<C> weights = {};
          if (staged.rows[slot][0] >= 0) {
            const C attention = attention_weight(op, tile, q, level, point);
            weights = corner_weights(x, y);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              weights[corner] *= attention;
            }
          }
          staged.weights[slot] = weights;
        });
      }
      if (staged.first_inside[unit] != NONE_INSIDE) {
        int sample = 0;
        for (; sample + IN_FLIGHT <= count; sample += IN_FLIGHT) {
          gather<IN_FLIGHT>(staged, sample * tile.pitch + unit, tile.pitch, value, row_stride, sums);
        }
        for (; sample < count; ++sample) {
          gather<1>(staged, sample * tile.pitch + unit, tile.pitch, value, row_stride, sums);
        }
      }
    }
    if (query < op.num_queries && channel < op.channels) {
      Vector<T, VEC> rounded;
#pragma unroll
      for (int v = 0; v < VEC; ++v) {
        rounded.values[v] = from_compute<T>(sums[v]);
      }
      *reinterpret_cast<Vector<T, VEC>*>(result + channel) = rounded;
    }
  }
}

// --------------------------------------------------------------------------------------------------------- backward

template <typename T>
struct BackwardShared {
  static constexpr int SAMPLES = STAGED_SAMPLES<T>;

  Footprints<T, SAMPLES> staged;  // weights of the axes: x[0], x[1], y[0], y[1]
  Four<T> slopes[SAMPLES];        // likewise
  T attention[SAMPLES];
  T grad_x[SAMPLES], grad_y[SAMPLES], grad_weight[SAMPLES];
};

template <typename T, typename W, int VEC>
__global__ void __launch_bounds__(THREADS) ms_deform_attn_backward_kernel(
    const Operands<T, W> op, const Gradients<T, W> grad) {
  using C = compute_t<T>;
  __shared__ BackwardShared<C> shared;
  auto& staged = shared.staged;
  const Tile<T, W> tile(op);
  const int lanes = op.lanes;
  const int unit = threadIdx.x >> op.log2_lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const unsigned unit_mask = lanes == WARP ? 0xffffffffu : ((1u << lanes) - 1) << (threadIdx.x % WARP & ~(lanes - 1));
  const int64_t query = tile.first_query + unit;
  const int64_t row_stride = static_cast<int64_t>(op.num_heads) * op.channels;
  const int samples = op.num_levels * op.num_points;
  const int samples_at_once = BackwardShared<C>::SAMPLES / tile.pitch;
  const int64_t head = tile.batch * op.levels.num_rows * row_stride + tile.head * op.channels;
  const int64_t result = ((tile.batch * op.num_queries + query) * op.num_heads + tile.head) * op.channels;
  const bool needs_dot = grad.locations != nullptr || grad.weights != nullptr;

  for (int first = 0; first < samples; first += samples_at_once) {
    const int count = min(samples_at_once, samples - first);
    stage(op, tile, first, count, staged, [&](int slot, int64_t q, int level, int point, const Axis<C>& x, const Axis<C>& y) {
      staged.weights[slot] = {x.weight[0], x.weight[1], y.weight[0], y.weight[1]};
      shared.slopes[slot] = {x.slope[0], x.slope[1], y.slope[0], y.slope[1]};
      shared.attention[slot] = staged.rows[slot][0] >= 0 ? attention_weight(op, tile, q, level, point) : C(0);
      shared.grad_x[slot] = shared.grad_y[slot] = shared.grad_weight[slot] = 0;
    });

    if (staged.first_inside[unit] != NONE_INSIDE) {
      for (int first_channel = 0; first_channel < op.channels; first_channel += lanes * VEC) {
        const bool live = first_channel + lane * VEC < op.channels;
        const int channel = live ? first_channel + lane * VEC : op.channels - VEC;
        const T* value = op.value + head + channel;
        const Vector<T, VEC> grad_output = load_vector<VEC>(grad.output + result + channel);
#pragma unroll 2
        for (int sample = 0; sample < count; ++sample) {
          const int slot = sample * tile.pitch + unit;
          const Four<int> rows = staged.rows[slot];
          const Four<C> axis = staged.weights[slot];
          const C attention = shared.attention[slot];
          const C weights[4] = {axis[2] * axis[0], axis[2] * axis[1], axis[3] * axis[0], axis[3] * axis[1]};
          if (needs_dot) {
            C dots[4];
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              const Vector<T, VEC> corner_value = load_vector<VEC>(value + rows[corner] * row_stride);
              C dot = 0;
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                dot += corner_value[v] * grad_output[v];
              }
              dots[corner] = live ? dot : C(0);
            }
            C grad_weight = 0, grad_x, grad_y;
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              grad_weight += weights[corner] * dots[corner];
            }
            location_gradient(axis, shared.slopes[slot], dots, grad_x, grad_y);
            for (int step = lanes / 2; step > 0; step /= 2) {
              grad_weight += __shfl_xor_sync(unit_mask, grad_weight, step, lanes);
              grad_x += __shfl_xor_sync(unit_mask, grad_x, step, lanes);
              grad_y += __shfl_xor_sync(unit_mask, grad_y, step, lanes);
            }
            if (lane == 0) {
              shared.grad_weight[slot] += grad_weight;
              shared.grad_x[slot] += grad_x * attention;
              shared.grad_y[slot] += grad_y * attention;
            }
          }
          // A sample that touches nothing has no corner to add to, though it borrowed rows to read.
          if (grad.value != nullptr && live && (axis[0] != 0 || axis[1] != 0) && (axis[2] != 0 || axis[3] != 0)) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              C terms[VEC];
#pragma unroll
              for (int v = 0; v < VEC; ++v) {
                terms[v] = weights[corner] * attention * grad_output[v];
              }
              atomic_add_vector(grad.value + head + rows[corner] * row_stride + channel, terms);
            }
          }
        }
      }
    }
    __syncthreads();

    for (int i = threadIdx.x; needs_dot && i < count * tile.units; i += THREADS) {
      const int of_unit = i / count;
      const int sample = i - of_unit * count;
      const int slot = sample * tile.pitch + of_unit;
      const int64_t q = tile.first_query + of_unit;
      if (q >= op.num_queries) {
        continue;
      }
      const int level = (first + sample) / op.num_points;
      const int point = first + sample - level * op.num_points;
      // What touches nothing has no gradient, be its borrowed pixels NaN or not.
      const Four<C> slope = shared.slopes[slot];
      const bool touches = slope[0] != 0 || slope[1] != 0;
      if (grad.locations != nullptr) {
        C* location = grad.locations + tile.batch * grad.location_strides[0] + q * grad.location_strides[1] +
            tile.head * grad.location_strides[2] + level * grad.location_strides[3] + point * grad.location_strides[4];
        location[0] = touches ? shared.grad_x[slot] : C(0);
        location[grad.location_strides[5]] = touches ? shared.grad_y[slot] : C(0);
      }
      if (grad.weights != nullptr) {
        grad.weights
            [tile.batch * grad.weight_strides[0] + q * grad.weight_strides[1] + tile.head * grad.weight_strides[2] +
             level * grad.weight_strides[3] + point * grad.weight_strides[4]] =
            from_compute<W>(touches ? shared.grad_weight[slot] : C(0));
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- host

template <typename T, typename W>
Operands<T, W> operands(
    const MSDeformAttnSizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    int vec) {
  Operands<T, W> op;
  op.value = static_cast<const T*>(value.const_data_ptr());
  op.locations = static_cast<const compute_t<T>*>(locations.const_data_ptr());
  op.weights = static_cast<const W*>(weights.const_data_ptr());
  op.levels = levels;
  copy_strides(locations, op.location_strides);
  copy_strides(weights, op.weight_strides);
  op.num_queries = sizes.num_queries;
  op.num_heads = static_cast<int>(sizes.num_heads);
  op.channels = static_cast<int>(sizes.channels);
  op.num_levels = static_cast<int>(sizes.num_levels);
  op.num_points = static_cast<int>(sizes.num_points);
  op.log2_lanes = std::min(5, ceil_log2((sizes.channels + vec - 1) / vec));
  op.lanes = 1 << op.log2_lanes;
  op.tiles = (sizes.num_queries * op.lanes + THREADS - 1) / THREADS;
  return op;
}

template <typename T, typename W>
unsigned num_blocks(const MSDeformAttnSizes& sizes, const Operands<T, W>& op) {
  const int64_t blocks = sizes.batch * op.tiles * sizes.num_heads;
  STD_TORCH_CHECK(blocks <= INT_MAX, "batch * queries * heads is too large: it takes ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

template <typename T>
bool can_vectorize(const MSDeformAttnSizes& sizes, const Tensor& tensor, int vec) {
  return sizes.channels % vec == 0 &&
      reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % (vec * sizeof(T)) == 0;
}

template <typename T, typename W, int VEC, int IN_FLIGHT>
void launch_forward(
    const MSDeformAttnSizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const Tensor& output,
    cudaStream_t stream) {
  const auto op = operands<T, W>(sizes, value, levels, locations, weights, VEC);
  ms_deform_attn_forward<T, W, VEC, IN_FLIGHT>
      <<<num_blocks(sizes, op), THREADS, 0, stream>>>(op, static_cast<T*>(output.mutable_data_ptr()));
  check_launch("ms_deform_attn");
}

template <typename T, typename W, int VEC>
void launch_backward(
    const MSDeformAttnSizes& sizes,
    const Tensor& value,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const Gradients<T, W>& gradients,
    cudaStream_t stream) {
  const auto op = operands<T, W>(sizes, value, levels, locations, weights, VEC);
  ms_deform_attn_backward_kernel<T, W, VEC><<<num_blocks(sizes, op), THREADS, 0, stream>>>(op, gradients);
  check_launch("ms_deform_attn_backward");
}

}  // namespace

Tensor ms_deform_attn(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const auto sizes =
      check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const std::initializer_list<int64_t> output_shape = {
      sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels};
  if (sizes.nothing_to_sample()) {
    return torch::stable::new_zeros(value, output_shape);
  }
  const Tensor values = torch::stable::contiguous(value);
  const Tensor shapes = readable_metadata(spatial_shapes, values);
  const Tensor starts = readable_metadata(level_start_index, values);
  const LevelTable levels = level_table(shapes, starts, sizes.num_values);
  const Tensor output = torch::stable::new_empty(values, output_shape);
  const cudaStream_t stream = current_stream(values.get_device_index());

  dispatch_types(values, attention_weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, values, VEC)) {
      launch_forward<T, W, VEC, 2>(sizes, values, levels, sampling_locations, attention_weights, output, stream);
    } else {
      launch_forward<T, W, 1, 4>(sizes, values, levels, sampling_locations, attention_weights, output, stream);
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> ms_deform_attn_backward(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights,
    bool needs_value,
    bool needs_sampling_locations,
    bool needs_attention_weights) {
  const auto sizes =
      check_ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels});
  STD_TORCH_CHECK(grad_output.scalar_type() == value.scalar_type(), "grad_output must have the value's dtype");
  check_same_device("grad_output", grad_output, value);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());

  const ScalarType compute = compute_type(value);
  const Tensor values = torch::stable::contiguous(value);
  const Tensor grad = torch::stable::contiguous(grad_output);
  auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor grad_value = needs_value
      ? torch::stable::new_zeros(values, {sizes.batch, sizes.num_values, sizes.num_heads, sizes.channels}, compute)
      : none(values);
  Tensor grad_locations =
      needs_sampling_locations ? torch::stable::empty_like(sampling_locations) : none(sampling_locations);
  Tensor grad_weights = needs_attention_weights ? torch::stable::empty_like(attention_weights) : none(attention_weights);

  if (sizes.nothing_to_sample()) {
    torch::stable::zero_(grad_locations);
    torch::stable::zero_(grad_weights);
  } else if (needs_value || needs_sampling_locations || needs_attention_weights) {
    const Tensor shapes = readable_metadata(spatial_shapes, values);
    const Tensor starts = readable_metadata(level_start_index, values);
    const LevelTable levels = level_table(shapes, starts, sizes.num_values);
    const cudaStream_t stream = current_stream(values.get_device_index());

    dispatch_types(values, attention_weights, [&](auto* t, auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using W = std::remove_pointer_t<decltype(w)>;
      Gradients<T, W> gradients = {};
      gradients.output = static_cast<const T*>(grad.const_data_ptr());
      if (needs_value) {
        gradients.value = static_cast<compute_t<T>*>(grad_value.mutable_data_ptr());
      }
      if (needs_sampling_locations) {
        gradients.locations = static_cast<compute_t<T>*>(grad_locations.mutable_data_ptr());
        copy_strides(grad_locations, gradients.location_strides);
      }
      if (needs_attention_weights) {
        gradients.weights = static_cast<W*>(grad_weights.mutable_data_ptr());
        copy_strides(grad_weights, gradients.weight_strides);
      }
      // Half values come 8 bytes a lane, so that the float32 atomics of neighbouring lanes are neighbours.
      constexpr int VEC = sizeof(T) == 8 ? 2 : 4;
      if (can_vectorize<T>(sizes, values, VEC) && can_vectorize<T>(sizes, grad, VEC)) {
        launch_backward<T, W, VEC>(sizes, values, levels, sampling_locations, attention_weights, gradients, stream);
      } else {
        launch_backward<T, W, 1>(sizes, values, levels, sampling_locations, attention_weights, gradients, stream);
      }
    });
  }
  if (needs_value && value.scalar_type() != compute) {
    grad_value = torch::stable::to(grad_value, value.scalar_type());
  }
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace reimplementation::cuda
