// Deformable aggregation on CUDA, forward and backward.
//
// A *pair* is a key point in a camera, a *sample* a pair in a level. One block owns one query:
//
//   1. its threads test the query's pairs, camera by camera, and compact the visible ones in a fixed order;
//   2. one thread per sample turns the location into a footprint in shared memory: four rows, four weights;
//   3. *slots* of up to 32 lanes span the channels, NV vectors of VEC channels a lane, and take the samples in turn:
//      one broadcast read of the footprint, one coalesced gather per corner.
//
//        block = query      slot 0  | lane 0: channels 0..3, 128..131 | lane 1: 4..7, ... |    samples 0, 4, 8, ...
//                           slot 1  |                                                     |    samples 1, 5, 9, ...
//
// So the coordinate arithmetic is done once per sample and not once per lane, nothing is read for pairs that no camera
// sees, and step 3 has no bounds test. What remains is the traffic of the gathers: 4 * C * sizeof(T) bytes a sample,
// mostly from L1 and L2.
//
// Forward: slots sum in registers, the block adds its slots in shared memory in a fixed order and writes every output
// once: no atomics, the same bits every time.
//
// Backward: weight and location gradients are reductions over a slot's lanes, written once. Only the feature gradient
// needs atomics. A slot takes consecutive samples of one level, and consecutive points often fall into the same pixel
// cell: their four corner gradients add up in registers until the cell changes.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <type_traits>

#include "../common/corners.cuh"
#include "../common/deformable_aggregation.h"
#include "../common/launch.cuh"
#include "../common/vector.cuh"

namespace reimplementation::cuda {
namespace {

constexpr int THREADS = 128;
constexpr int STAGED_SAMPLES = 256;  // footprints in shared memory at a time
constexpr int STAGED_LEVELS = 8;     // levels of a pair staged together

// How a query's channels are dealt to the lanes of a slot: vector k of a lane holds `VEC` channels from
// `first + (k * lanes + lane) * VEC`.
struct ChannelMap {
  int channels;
  int group_channels;  // channels that share a weight
  int lanes;           // of a slot; a power of two, at most a warp
  int log2_lanes;
};

template <typename T, typename W>
struct Operands {
  const T* features;  // (batch, rows, channels)
  const compute_t<T>* locations;
  const W* weights;
  LevelTable levels;
  int64_t location_strides[5];
  int64_t weight_strides[6];
  int64_t num_queries;
  int num_points, num_cams, num_levels;
  ChannelMap map;
};

template <typename T, typename W>
struct Gradients {
  const T* output;            // (batch, queries, channels)
  compute_t<T>* features;     // zeroed, or null where not needed; so are the others
  compute_t<T>* locations;
  void* weights;              // W, or compute_t<T> where a group is summed in more than one go
  bool weights_are_compute;
  int64_t location_strides[5];
  int64_t weight_strides[6];
  int group_steps;            // doubling steps that sum a group's lanes
};

// The visible pairs among THREADS of a query's pairs.
template <typename T>
struct VisiblePairs {
  T x[THREADS], y[THREADS];
  int pair[THREADS];  // camera * num_points + point
  int warp_counts[THREADS / WARP];
  bool visible[THREADS];
};

// Fills `visible` with pairs first, ..., first + THREADS - 1 in their order; returns how many are visible.
template <typename T, typename W>
__device__ int compact_visible_pairs(
    const Operands<T, W>& op, const compute_t<T>* locations, int first, VisiblePairs<compute_t<T>>& shared) {
  const int pair = first + threadIdx.x;
  const int warp = threadIdx.x / WARP;
  compute_t<T> x = 0, y = 0;
  bool visible = false;
  if (pair < op.num_points * op.num_cams) {
    const int cam = pair / op.num_points;
    const int point = pair - cam * op.num_points;
    const compute_t<T>* location = locations + point * op.location_strides[2] + cam * op.location_strides[3];
    x = location[0];
    y = location[op.location_strides[4]];
    visible = inside_unit_square(x, y);
  }
  const unsigned seen = __ballot_sync(0xffffffffu, visible);
  __syncthreads();  // whoever still reads the pairs before these
  shared.visible[threadIdx.x] = visible;
  if (threadIdx.x % WARP == 0) {
    shared.warp_counts[warp] = __popc(seen);
  }
  __syncthreads();
  int position = __popc(seen & ((1u << (threadIdx.x % WARP)) - 1));
  int count = 0;
#pragma unroll
  for (int w = 0; w < THREADS / WARP; ++w) {
    position += w < warp ? shared.warp_counts[w] : 0;
    count += shared.warp_counts[w];
  }
  if (visible) {
    shared.x[position] = x;
    shared.y[position] = y;
    shared.pair[position] = pair;
  }
  __syncthreads();
  return count;
}

// Where a pair's weights (or their gradients) for a level begin, seen from the query.
__device__ __forceinline__ int64_t weight_offset(const int64_t* strides, int cam, int point, int level) {
  return point * strides[2] + cam * strides[3] + level * strides[4];
}

// ---------------------------------------------------------------------------------------------------------- forward

template <typename T>
struct ForwardSamples {
  Four<T> corner_weights[STAGED_SAMPLES];
  Four<int> rows[STAGED_SAMPLES];  // the first is -1 where there is nothing to read
  int64_t weights[STAGED_SAMPLES];
};

template <typename T, int VEC, int NV>
union ForwardShared {
  struct {
    VisiblePairs<compute_t<T>> pairs;
    ForwardSamples<compute_t<T>> samples;
  };
  compute_t<T> slot_sums[THREADS * NV * VEC];

  __device__ ForwardShared() {}
};

template <typename T, typename W>
__device__ void stage_forward(
    const Operands<T, W>& op,
    const VisiblePairs<compute_t<T>>& pairs,
    int first_pair,
    int num_pairs,
    int first_level,
    int num_levels,
    ForwardSamples<compute_t<T>>& samples) {
  for (int i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const int level_number = first_level + i / num_pairs;
    const int entry = first_pair + i % num_pairs;
    const int cam = pairs.pair[entry] / op.num_points;
    const int point = pairs.pair[entry] - cam * op.num_points;
    const Level level = op.levels[static_cast<int64_t>(cam) * op.num_levels + level_number];
    if (level.empty()) {
      samples.rows[i] = {-1, -1, -1, -1};
      continue;
    }
    const auto x = bilinear_axis(pixel_position(pairs.x[entry], level.width), level.width);
    const auto y = bilinear_axis(pixel_position(pairs.y[entry], level.height), level.height);
    samples.corner_weights[i] = corner_weights(x, y);
    samples.rows[i] = corner_rows(level, x, y);
    samples.weights[i] = weight_offset(op.weight_strides, cam, point, level_number);
  }
}

// Gathers `COUNT` samples, `stride` apart, all loads before the first sum.
template <int COUNT, typename T, typename W, int VEC, int NV>
__device__ __forceinline__ void gather(
    const ForwardSamples<compute_t<T>>& samples,
    int sample,
    int stride,
    const T* const (&features)[NV],
    const W* const (&weights)[NV],
    int channels,
    compute_t<T> (&sums)[NV][VEC]) {
  if constexpr (COUNT > 1) {
    bool any_empty = false;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      any_empty |= samples.rows[sample + i * stride][0] < 0;
    }
    if (any_empty) {
      for (int i = 0; i < COUNT; ++i) {
        gather<1, T, W, VEC, NV>(samples, sample + i * stride, stride, features, weights, channels, sums);
      }
      return;
    }
  } else if (samples.rows[sample][0] < 0) {
    return;
  }

  Vector<T, VEC> corners[COUNT][NV][4];
  compute_t<T> group_weights[COUNT][NV];
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<int> rows = samples.rows[sample + i * stride];
    const int64_t offset = samples.weights[sample + i * stride];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
      group_weights[i][k] = to_compute(weights[k][offset]);
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        corners[i][k][corner] = load_vector<VEC>(features[k] + static_cast<int64_t>(rows[corner]) * channels);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const Four<compute_t<T>> corner_weights = samples.corner_weights[sample + i * stride];
#pragma unroll
    for (int k = 0; k < NV; ++k) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        const compute_t<T> weight = corner_weights[corner] * group_weights[i][k];
#pragma unroll
        for (int v = 0; v < VEC; ++v) {
          sums[k][v] += weight * corners[i][k][corner][v];
        }
      }
    }
  }
}

template <typename T, typename W, int VEC, int NV, int IN_FLIGHT>
__global__ void __launch_bounds__(THREADS) forward_kernel(const Operands<T, W> op, T* __restrict__ output) {
  __shared__ ForwardShared<T, VEC, NV> shared;
  const int64_t batch = blockIdx.x / op.num_queries;
  const int64_t query = blockIdx.x - batch * op.num_queries;
  const int first_channel = blockIdx.y * (op.map.lanes * NV * VEC);
  const int lane = threadIdx.x & (op.map.lanes - 1);
  const int slot = threadIdx.x >> op.map.log2_lanes;
  const int slots = THREADS >> op.map.log2_lanes;

  const compute_t<T>* locations =
      op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  const T* features[NV];
  const W* weights[NV];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
    // Lanes beyond the last channel read it once more and write nothing.
    const int channel = min(first_channel + (k * op.map.lanes + lane) * VEC, op.map.channels - VEC);
    features[k] = op.features + batch * op.levels.num_rows * op.map.channels + channel;
    weights[k] = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1] +
        (channel / op.map.group_channels) * op.weight_strides[5];
  }

  compute_t<T> sums[NV][VEC] = {};
  const int num_pairs = op.num_points * op.num_cams;
  for (int first = 0; first < num_pairs; first += THREADS) {
    const int visible = compact_visible_pairs(op, locations, first, shared.pairs);
    for (int level = 0; level < op.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - level);
      for (int pair = 0; pair < visible; pair += STAGED_SAMPLES / levels) {
        const int pairs = min(STAGED_SAMPLES / levels, visible - pair);
        stage_forward(op, shared.pairs, pair, pairs, level, levels, shared.samples);
        __syncthreads();
        const int samples = pairs * levels;
        int sample = slot;
        for (; sample + (IN_FLIGHT - 1) * slots < samples; sample += IN_FLIGHT * slots) {
          gather<IN_FLIGHT, T, W, VEC, NV>(
              shared.samples, sample, slots, features, weights, op.map.channels, sums);
        }
        for (; sample < samples; sample += slots) {
          gather<1, T, W, VEC, NV>(shared.samples, sample, slots, features, weights, op.map.channels, sums);
        }
        __syncthreads();
      }
    }
  }

  __syncthreads();  // a query that nothing sees comes here straight from the compaction
  const int slot_channels = op.map.lanes * NV * VEC;
#pragma unroll
  for (int k = 0; k < NV; ++k) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      shared.slot_sums[slot * slot_channels + (k * op.map.lanes + lane) * VEC + v] = sums[k][v];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < slot_channels && first_channel + i < op.map.channels; i += THREADS) {
    compute_t<T> sum = 0;
    for (int s = 0; s < slots; ++s) {
      sum += shared.slot_sums[s * slot_channels + i];
    }
    output[static_cast<int64_t>(blockIdx.x) * op.map.channels + first_channel + i] = from_compute<T>(sum);
  }
}

// --------------------------------------------------------------------------------------------------------- backward

template <typename T>
struct BackwardSamples {
  Four<T> weights[STAGED_SAMPLES];  // of the axes: x[0], x[1], y[0], y[1]
  Four<T> slopes[STAGED_SAMPLES];   // likewise
  Four<int> rows[STAGED_SAMPLES];   // the first is -1 where there is nothing to read
  T grad_x[STAGED_SAMPLES], grad_y[STAGED_SAMPLES];
};

template <typename T>
struct BackwardShared {
  VisiblePairs<T> pairs;
  BackwardSamples<T> samples;
};

template <typename T, typename W>
__device__ void stage_backward(
    const Operands<T, W>& op,
    const VisiblePairs<compute_t<T>>& pairs,
    int first_pair,
    int num_pairs,
    int first_level,
    int num_levels,
    BackwardSamples<compute_t<T>>& samples) {
  for (int i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const int level_number = first_level + i / num_pairs;
    const int entry = first_pair + i % num_pairs;
    const int cam = pairs.pair[entry] / op.num_points;
    const Level level = op.levels[static_cast<int64_t>(cam) * op.num_levels + level_number];
    samples.grad_x[i] = 0;
    samples.grad_y[i] = 0;
    if (level.empty()) {
      samples.rows[i] = {-1, -1, -1, -1};
      continue;
    }
    const auto x = bilinear_axis(pixel_position(pairs.x[entry], level.width), level.width);
    const auto y = bilinear_axis(pixel_position(pairs.y[entry], level.height), level.height);
    samples.weights[i] = {x.weight[0], x.weight[1], y.weight[0], y.weight[1]};
    samples.slopes[i] = {x.slope[0], x.slope[1], y.slope[0], y.slope[1]};
    samples.rows[i] = corner_rows(level, x, y);
  }
}

template <typename T, typename W>
__device__ __forceinline__ void write_weight_gradient(
    const Gradients<T, W>& grad, int64_t offset, compute_t<T> value, bool first) {
  if (grad.weights_are_compute) {
    compute_t<T>* address = static_cast<compute_t<T>*>(grad.weights) + offset;
    *address = first ? value : *address + value;
  } else {
    static_cast<W*>(grad.weights)[offset] = from_compute<W>(value);
  }
}

// The pairs that no camera sees have gradients too: zero.
template <typename T, typename W>
__device__ void zero_invisible_pairs(
    const Operands<T, W>& op,
    const Gradients<T, W>& grad,
    int64_t query_locations,
    int64_t query_weights,
    int first,
    const bool* visible) {
  const int pairs = min(THREADS, op.num_points * op.num_cams - first);
  const int num_groups = op.map.channels / op.map.group_channels;
  for (int i = threadIdx.x / WARP; i < pairs; i += THREADS / WARP) {
    if (visible[i]) {
      continue;
    }
    const int cam = (first + i) / op.num_points;
    const int point = first + i - cam * op.num_points;
    if (grad.weights != nullptr) {
      for (int j = threadIdx.x % WARP; j < op.num_levels * num_groups; j += WARP) {
        const int level = j / num_groups;
        const int64_t offset = query_weights + weight_offset(grad.weight_strides, cam, point, level) +
            (j - level * num_groups) * grad.weight_strides[5];
        write_weight_gradient(grad, offset, compute_t<T>(0), true);
      }
    }
    if (grad.locations != nullptr && threadIdx.x % WARP < 2) {
      grad.locations
          [query_locations + point * grad.location_strides[2] + cam * grad.location_strides[3] +
           threadIdx.x % WARP * grad.location_strides[4]] = 0;
    }
  }
}

template <typename T, typename W, int VEC, int NV>
__global__ void __launch_bounds__(THREADS) backward_kernel(const Operands<T, W> op, const Gradients<T, W> grad) {
  using C = compute_t<T>;
  __shared__ BackwardShared<C> shared;
  const int64_t batch = blockIdx.x / op.num_queries;
  const int64_t query = blockIdx.x - batch * op.num_queries;
  const int lanes = op.map.lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const int slot = threadIdx.x >> op.map.log2_lanes;
  const int slots = THREADS >> op.map.log2_lanes;
  const unsigned slot_mask = lanes == WARP ? 0xffffffffu : ((1u << lanes) - 1) << (threadIdx.x % WARP & ~(lanes - 1));

  const C* locations = op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  const W* weights = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1];
  const int64_t features = batch * op.levels.num_rows * op.map.channels;
  const int64_t grad_locations = batch * grad.location_strides[0] + query * grad.location_strides[1];
  const int64_t grad_weights = batch * grad.weight_strides[0] + query * grad.weight_strides[1];
  const bool needs_dot = grad.locations != nullptr || grad.weights != nullptr;

  const int num_pairs = op.num_points * op.num_cams;
  for (int first = 0; first < num_pairs; first += THREADS) {
    const int visible = compact_visible_pairs(op, locations, first, shared.pairs);
    zero_invisible_pairs(op, grad, grad_locations, grad_weights, first, shared.pairs.visible);

    for (int first_level = 0; first_level < op.num_levels; first_level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - first_level);
      for (int first_pair = 0; first_pair < visible; first_pair += STAGED_SAMPLES / levels) {
        const int pairs = min(STAGED_SAMPLES / levels, visible - first_pair);
        stage_backward(op, shared.pairs, first_pair, pairs, first_level, levels, shared.samples);
        __syncthreads();

        const int samples = pairs * levels;
        const int samples_per_slot = (samples + slots - 1) / slots;
        const int end = min((slot + 1) * samples_per_slot, samples);
        for (int first_channel = 0; first_channel < op.map.channels; first_channel += lanes * NV * VEC) {
          int channel[NV], group[NV], same_group[NV];
          bool live[NV], head[NV];
          Vector<T, VEC> grad_output[NV];
#pragma unroll
          for (int k = 0; k < NV; ++k) {
            channel[k] = first_channel + (k * lanes + lane) * VEC;
            live[k] = channel[k] < op.map.channels;
            group[k] = live[k] ? channel[k] / op.map.group_channels : -1;
            channel[k] = live[k] ? channel[k] : op.map.channels - VEC;
            grad_output[k] = load_vector<VEC>(
                grad.output + static_cast<int64_t>(blockIdx.x) * op.map.channels + channel[k]);
            const int group_before = __shfl_up_sync(slot_mask, group[k], 1, lanes);
            head[k] = live[k] && (lane == 0 || group_before != group[k]);
            same_group[k] = 0;
            for (int step = 0; step < grad.group_steps; ++step) {
              const bool same = __shfl_down_sync(slot_mask, group[k], 1 << step, lanes) == group[k];
              same_group[k] |= (same && lane + (1 << step) < lanes) << step;
            }
          }

          // The cell whose corner gradients wait in registers.
          Four<int> cell = {-1, -1, -1, -1};
          C waiting[4][NV][VEC] = {};
          auto flush = [&] {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              C* row = grad.features + features + static_cast<int64_t>(cell[corner]) * op.map.channels;
#pragma unroll
              for (int k = 0; k < NV; ++k) {
                if (live[k]) {
                  atomic_add_vector(row + channel[k], waiting[corner][k]);
                }
#pragma unroll
                for (int v = 0; v < VEC; ++v) {
                  waiting[corner][k][v] = 0;
                }
              }
            }
          };

          Vector<T, VEC> fetched[NV][4];
          auto fetch = [&](int sample) {
            const Four<int> rows = shared.samples.rows[sample];
#pragma unroll
            for (int k = 0; k < NV; ++k) {
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) {
                fetched[k][corner] = load_vector<VEC>(
                    op.features + features + static_cast<int64_t>(max(rows[corner], 0)) * op.map.channels + channel[k]);
              }
            }
          };
          const int begin = slot * samples_per_slot;
          if (needs_dot && begin < end) {
            fetch(begin);
          }
          for (int sample = begin; sample < end; ++sample) {
            const Four<int> rows = shared.samples.rows[sample];
            Vector<T, VEC> corners[NV][4];
#pragma unroll
            for (int k = 0; k < NV; ++k) {
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) {
                corners[k][corner] = fetched[k][corner];
              }
            }
            if (needs_dot && sample + 1 < end) {
              fetch(sample + 1);  // in flight while this sample is worked on
            }
            const int level = first_level + sample / pairs;
            const int pair = shared.pairs.pair[first_pair + sample % pairs];
            const int cam = pair / op.num_points;
            const int point = pair - cam * op.num_points;
            const int64_t grad_offset = grad_weights + weight_offset(grad.weight_strides, cam, point, level);
            const bool empty = rows[0] < 0;
            if (empty) {
#pragma unroll
              for (int k = 0; k < NV; ++k) {
                if (grad.weights != nullptr && head[k]) {
                  write_weight_gradient(grad, grad_offset + group[k] * grad.weight_strides[5], C(0), true);
                }
              }
              continue;
            }
            const Four<C> axis = shared.samples.weights[sample];
            const C corner_weights[4] = {axis[2] * axis[0], axis[2] * axis[1], axis[3] * axis[0], axis[3] * axis[1]};
            const W* sample_weights = weights + weight_offset(op.weight_strides, cam, point, level);
            C group_weights[NV];
#pragma unroll
            for (int k = 0; k < NV; ++k) {
              group_weights[k] = to_compute(sample_weights[(channel[k] / op.map.group_channels) * op.weight_strides[5]]);
            }

            if (needs_dot) {
              C along_corner[4] = {};  // d output / d corner weight, dotted with the output's gradient
              C weight_gradient[NV];
#pragma unroll
              for (int k = 0; k < NV; ++k) {
                weight_gradient[k] = 0;
#pragma unroll
                for (int corner = 0; corner < 4; ++corner) {
                  C dot = 0;
#pragma unroll
                  for (int v = 0; v < VEC; ++v) {
                    dot += corners[k][corner][v] * grad_output[k][v];
                  }
                  dot = live[k] ? dot : C(0);
                  weight_gradient[k] += corner_weights[corner] * dot;
                  along_corner[corner] += group_weights[k] * dot;
                }
              }
              if (grad.weights != nullptr) {
#pragma unroll
                for (int k = 0; k < NV; ++k) {
                  for (int step = 0; step < grad.group_steps; ++step) {
                    const C other = __shfl_down_sync(slot_mask, weight_gradient[k], 1 << step, lanes);
                    weight_gradient[k] += (same_group[k] >> step & 1) ? other : C(0);
                  }
                  if (head[k]) {
                    write_weight_gradient(
                        grad,
                        grad_offset + group[k] * grad.weight_strides[5],
                        weight_gradient[k],
                        channel[k] % op.map.group_channels == 0);
                  }
                  if (grad.weights_are_compute) {
                    __syncwarp(slot_mask);  // the next vector may add to the same group
                  }
                }
              }
              if (grad.locations != nullptr) {
                C grad_x, grad_y;
                location_gradient(axis, shared.samples.slopes[sample], along_corner, grad_x, grad_y);
                for (int step = lanes / 2; step > 0; step /= 2) {
                  grad_x += __shfl_xor_sync(slot_mask, grad_x, step, lanes);
                  grad_y += __shfl_xor_sync(slot_mask, grad_y, step, lanes);
                }
                if (lane == 0) {
                  shared.samples.grad_x[sample] += grad_x;
                  shared.samples.grad_y[sample] += grad_y;
                }
              }
            }

            if (grad.features != nullptr) {
              const bool same_cell =
                  rows[0] == cell[0] && rows[1] == cell[1] && rows[2] == cell[2] && rows[3] == cell[3];
              if (!same_cell) {
                if (cell[0] >= 0) {
                  flush();
                }
                cell = rows;
              }
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) {
#pragma unroll
                for (int k = 0; k < NV; ++k) {
                  const C weight = corner_weights[corner] * group_weights[k];
#pragma unroll
                  for (int v = 0; v < VEC; ++v) {
                    waiting[corner][k][v] += weight * grad_output[k][v];
                  }
                }
              }
            }
          }
          if (cell[0] >= 0) {
            flush();
          }
        }
        __syncthreads();

        if (grad.locations != nullptr && threadIdx.x < pairs) {
          C x = 0, y = 0;
          for (int level = 0; level < levels; ++level) {
            x += shared.samples.grad_x[level * pairs + threadIdx.x];
            y += shared.samples.grad_y[level * pairs + threadIdx.x];
          }
          const int pair = shared.pairs.pair[first_pair + threadIdx.x];
          const int cam = pair / op.num_points;
          const int point = pair - cam * op.num_points;
          C* location = grad.locations + grad_locations + point * grad.location_strides[2] +
              cam * grad.location_strides[3];
          const int64_t next = grad.location_strides[4];
          location[0] = first_level == 0 ? x : location[0] + x;
          location[next] = first_level == 0 ? y : location[next] + y;
        }
        __syncthreads();
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- host

ChannelMap channel_map(const DeformableAggregationSizes& sizes, int vec, int vectors_per_lane) {
  const int64_t per_lane = vec * vectors_per_lane;
  const int log2_lanes = std::min(5, ceil_log2((sizes.channels + per_lane - 1) / per_lane));
  return {
      static_cast<int>(sizes.channels),
      static_cast<int>(sizes.channels / sizes.num_groups),
      1 << log2_lanes,
      log2_lanes};
}

template <typename T, typename W>
Operands<T, W> operands(
    const DeformableAggregationSizes& sizes,
    const Tensor& features,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const ChannelMap& map) {
  Operands<T, W> op;
  op.features = static_cast<const T*>(features.const_data_ptr());
  op.locations = static_cast<const compute_t<T>*>(locations.const_data_ptr());
  op.weights = static_cast<const W*>(weights.const_data_ptr());
  op.levels = levels;
  copy_strides(locations, op.location_strides);
  copy_strides(weights, op.weight_strides);
  op.num_queries = sizes.num_queries;
  op.num_points = static_cast<int>(sizes.num_points);
  op.num_cams = static_cast<int>(sizes.num_cams);
  op.num_levels = static_cast<int>(sizes.num_levels);
  op.map = map;
  return op;
}

// Whether vectors of `vec` channels stay within a group and on their alignment.
template <typename T>
bool can_vectorize(const DeformableAggregationSizes& sizes, const Tensor& features, int vec) {
  return sizes.channels / sizes.num_groups % vec == 0 &&
      reinterpret_cast<uintptr_t>(features.const_data_ptr()) % (vec * sizeof(T)) == 0;
}

unsigned query_blocks(const DeformableAggregationSizes& sizes) {
  STD_TORCH_CHECK(
      sizes.batch * sizes.num_queries <= INT_MAX,
      "bs * num_queries must be below 2^31; got ", sizes.batch, " * ", sizes.num_queries);
  return static_cast<unsigned>(sizes.batch * sizes.num_queries);
}

template <typename T, typename W, int VEC, int NV, int IN_FLIGHT>
void launch_forward(
    const DeformableAggregationSizes& sizes,
    const Tensor& features,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const Tensor& output,
    cudaStream_t stream) {
  const ChannelMap map = channel_map(sizes, VEC, NV);
  const int block_channels = map.lanes * NV * VEC;
  const dim3 grid(query_blocks(sizes), (map.channels + block_channels - 1) / block_channels);
  forward_kernel<T, W, VEC, NV, IN_FLIGHT><<<grid, THREADS, 0, stream>>>(
      operands<T, W>(sizes, features, levels, locations, weights, map), static_cast<T*>(output.mutable_data_ptr()));
  check_launch("deformable_aggregation");
}

template <typename T, typename W, int VEC, int NV>
void launch_backward(
    const DeformableAggregationSizes& sizes,
    const Tensor& features,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    Gradients<T, W> grad,
    cudaStream_t stream) {
  const ChannelMap map = channel_map(sizes, VEC, NV);
  grad.group_steps = ceil_log2(std::min(map.lanes, std::max(1, map.group_channels / VEC)));
  backward_kernel<T, W, VEC, NV><<<query_blocks(sizes), THREADS, 0, stream>>>(
      operands<T, W>(sizes, features, levels, locations, weights, map), grad);
  check_launch("deformable_aggregation_backward");
}

}  // namespace

Tensor deformable_aggregation(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights) {
  const auto sizes = check_deformable_aggregation(
      feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());
  const std::initializer_list<int64_t> output_shape = {sizes.batch, sizes.num_queries, sizes.channels};
  if (sizes.nothing_to_sample()) {
    return torch::stable::new_zeros(feature_maps, output_shape);
  }
  const Tensor features = torch::stable::contiguous(feature_maps);
  const Tensor shapes = readable_metadata(spatial_shape, features);
  const Tensor starts = readable_metadata(scale_start_index, features);
  const LevelTable levels = level_table(shapes, starts, sizes.num_rows);
  const Tensor output = torch::stable::new_empty(features, output_shape);
  const cudaStream_t stream = current_stream(features.get_device_index());

  dispatch_types(features, weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, features, VEC)) {
      constexpr int NV = sizeof(T) == 2 ? 1 : 2;
      launch_forward<T, W, VEC, NV, 2>(sizes, features, levels, sampling_location, weights, output, stream);
    } else {
      launch_forward<T, W, 1, 4, 1>(sizes, features, levels, sampling_location, weights, output, stream);
    }
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deformable_aggregation_backward(
    const Tensor& grad_output,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights,
    bool needs_feature_maps,
    bool needs_sampling_location,
    bool needs_weights) {
  const auto sizes = check_deformable_aggregation(
      feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_queries, sizes.channels});
  STD_TORCH_CHECK(
      grad_output.scalar_type() == feature_maps.scalar_type(), "grad_output must have the features' dtype");
  check_same_device("grad_output", grad_output, feature_maps);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());

  const ScalarType compute = compute_type(feature_maps);
  const Tensor features = torch::stable::contiguous(feature_maps);
  const Tensor grad = torch::stable::contiguous(grad_output);
  auto none = [](const Tensor& like) { return torch::stable::new_empty(like, {0}); };
  Tensor grad_features = needs_feature_maps
      ? torch::stable::new_zeros(features, {sizes.batch, sizes.num_rows, sizes.channels}, compute)
      : none(features);
  Tensor grad_locations = needs_sampling_location ? torch::stable::empty_like(sampling_location) : none(sampling_location);
  Tensor grad_weights = needs_weights ? torch::stable::empty_like(weights) : none(weights);

  if (sizes.nothing_to_sample()) {
    torch::stable::zero_(grad_locations);
    torch::stable::zero_(grad_weights);
  } else if (needs_feature_maps || needs_sampling_location || needs_weights) {
    const Tensor shapes = readable_metadata(spatial_shape, features);
    const Tensor starts = readable_metadata(scale_start_index, features);
    const LevelTable levels = level_table(shapes, starts, sizes.num_rows);
    const cudaStream_t stream = current_stream(features.get_device_index());

    dispatch_types(features, weights, [&](auto* t, auto* w) {
      using T = std::remove_pointer_t<decltype(t)>;
      using W = std::remove_pointer_t<decltype(w)>;
      // Half features come 8 bytes a lane, so that the float32 atomics of neighbouring lanes are neighbours.
      constexpr int VEC = sizeof(T) == 8 ? 2 : 4;
      const bool vectorize = can_vectorize<T>(sizes, features, VEC) && can_vectorize<T>(sizes, grad, VEC);
      const int lane_vectors = vectorize ? 2 : 4;
      const int vec = vectorize ? VEC : 1;
      const ChannelMap map = channel_map(sizes, vec, lane_vectors);
      // A group that does not lie within one row of lanes is summed in several goes; in half precision those would round.
      const bool one_go = map.lanes * vec % map.group_channels == 0;
      Tensor weight_sums = needs_weights && !one_go && grad_weights.scalar_type() != compute
          ? torch::stable::to(grad_weights, compute)
          : grad_weights;

      Gradients<T, W> gradients;
      gradients.output = static_cast<const T*>(grad.const_data_ptr());
      gradients.features = needs_feature_maps ? static_cast<compute_t<T>*>(grad_features.mutable_data_ptr()) : nullptr;
      gradients.locations =
          needs_sampling_location ? static_cast<compute_t<T>*>(grad_locations.mutable_data_ptr()) : nullptr;
      gradients.weights = needs_weights ? weight_sums.mutable_data_ptr() : nullptr;
      gradients.weights_are_compute = !one_go;
      if (needs_sampling_location) {
        copy_strides(grad_locations, gradients.location_strides);
      }
      if (needs_weights) {
        copy_strides(weight_sums, gradients.weight_strides);
      }
      if (vectorize) {
        launch_backward<T, W, VEC, 2>(sizes, features, levels, sampling_location, weights, gradients, stream);
      } else {
        launch_backward<T, W, 1, 4>(sizes, features, levels, sampling_location, weights, gradients, stream);
      }
      if (needs_weights && !one_go) {
        grad_weights = torch::stable::to(weight_sums, weights.scalar_type());
      }
    });
  }
  if (needs_feature_maps && feature_maps.scalar_type() != compute) {
    grad_features = torch::stable::to(grad_features, feature_maps.scalar_type());
  }
  return {grad_features, grad_locations, grad_weights};
}

}  // namespace reimplementation::cuda
