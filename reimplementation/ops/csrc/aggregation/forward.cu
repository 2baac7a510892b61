// Deformable aggregation on CUDA, forward.
//
// One block owns one query:
//
//   1. its threads test the query's pairs and compact the visible ones in a fixed order;
//   2. one thread per sample turns the location into a footprint in shared memory: four rows, four weights;
//   3. teams take the samples in turn: one broadcast read of the footprint, one coalesced gather per corner.
//
//        block = query      team 0  | lane 0: channels 0..3, 128..131 | lane 1: 4..7, ... |    samples 0, 4, 8, ...
//                           team 1  |                                                     |    samples 1, 5, 9, ...
//
// So the coordinate arithmetic is done once per sample and not once per lane, nothing is read for pairs that no camera
// sees, and step 3 has no bounds test. What remains is the traffic of the gathers: 4 * C * sizeof(T) bytes a sample,
// mostly from L1 and L2. Teams sum in registers, the block adds its teams in shared memory in a fixed order and writes
// every output once: no atomics, the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "aggregation/operands.cuh"
#include "cuda/levels.cuh"

namespace reimplementation::aggregation {
namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;        // a multiprocessor's: 72 registers, enough for two samples in flight
constexpr int STAGED_SAMPLES = 256;  // footprints in shared memory at a time
constexpr int STAGED_LEVELS = 8;     // levels of a pair staged together

template <typename T>
struct Samples {
  Four<T> corner_weights[STAGED_SAMPLES];
  Four<int> rows[STAGED_SAMPLES];  // the first is -1 where there is nothing to read
  int64_t weights[STAGED_SAMPLES];
};

template <typename T, int VEC, int NV>
union Shared {
  struct {
    VisiblePairs<compute_t<T>, THREADS> pairs;
    Samples<compute_t<T>> samples;
    Level levels[THREADS];  // of all cameras, where they are so few
  };
  compute_t<T> team_sums[THREADS * NV * VEC];

  __device__ Shared() {}
};

// Returns whether one of them lies in an empty level.
template <typename T, typename W, int VEC, int NV>
__device__ __forceinline__ bool stage(
    const Operands<T, W>& op,
    int first_pair,
    unsigned num_pairs,
    int first_level,
    unsigned num_levels,
    Shared<T, VEC, NV>& shared) {
  const auto& pairs = shared.pairs;
  auto& samples = shared.samples;
  bool any_empty = false;
  for (unsigned i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const unsigned staged_level = i / num_pairs;
    const int level_number = first_level + staged_level;
    const int entry = first_pair + i - staged_level * num_pairs;
    const Pair pair(pairs.number[entry], op.points);
    const int64_t number = static_cast<int64_t>(pair.cam) * op.num_levels + level_number;
    const Level level = op.has_few_levels(THREADS) ? shared.levels[number] : op.levels[number];
    if (level.empty()) {
      samples.rows[i] = {-1, -1, -1, -1};
      any_empty = true;
      continue;
    }
    const auto x = bilinear_axis(pixel_position(pairs.x[entry], level.width), level.width);
    const auto y = bilinear_axis(pixel_position(pairs.y[entry], level.height), level.height);
    samples.corner_weights[i] = corner_weights(x, y);
    samples.rows[i] = corner_rows(level, x, y);
    samples.weights[i] = pair.weights(op.weight_strides, level_number);
  }
  return any_empty;
}

// Gathers `COUNT` samples, `stride` apart, all loads before the first sum.
template <int COUNT, typename T, typename W, int VEC, int NV>
__device__ __forceinline__ void gather(
    const Samples<compute_t<T>>& samples,
    int sample,
    int stride,
    const T* const (&features)[NV],
    const W* const (&weights)[NV],
    int row_bytes,
    compute_t<T> (&sums)[NV][VEC]) {
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
        corners[i][k][corner] = load_vector<VEC>(row_address(features[k], rows[corner], row_bytes));
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
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    deformable_aggregation_forward(const Operands<T, W> op, T* __restrict__ output) {
  __shared__ Shared<T, VEC, NV> shared;
  unsigned batch = blockIdx.x;
  const int query = op.queries.split(batch);
  const int first_channel = (blockIdx.z * gridDim.y + blockIdx.y) * (op.lanes * NV * VEC);
  const int lane = threadIdx.x & (op.lanes - 1);
  const int team = threadIdx.x >> op.log2_lanes;
  const int teams = THREADS >> op.log2_lanes;

  const compute_t<T>* locations = op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  const T* features[NV];
  const W* weights[NV];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
    // Lanes beyond the last channel read it once more and write nothing.
    const int channel = min(first_channel + (k * op.lanes + lane) * VEC, op.channels - VEC);
    features[k] = op.features + batch * op.levels.num_rows * op.channels + channel;
    weights[k] = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1] +
        (channel / op.group_channels) * op.weight_strides[5];
  }

  // While the first warps, which are first to find pairs, wait for their locations.
  const int last = THREADS - 1 - static_cast<int>(threadIdx.x);
  if (op.has_few_levels(THREADS) && last < op.num_cams * op.num_levels) {
    shared.levels[last] = op.levels[last];
  }

  const int row_bytes = op.channels * static_cast<int>(sizeof(T));
  compute_t<T> sums[NV][VEC] = {};
  const int num_pairs = op.points.divisor * op.num_cams;
  for (int first = 0; first < num_pairs; first += THREADS) {
    const int visible = compact_visible_pairs(op, locations, first, shared.pairs);
    for (int level = 0; level < op.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - level);
      for (int pair = 0; pair < visible; pair += STAGED_SAMPLES / levels) {
        const int pairs = min(STAGED_SAMPLES / levels, visible - pair);
        const bool any_empty = __syncthreads_or(stage(op, pair, pairs, level, levels, shared));
        const int samples = pairs * levels;
        int sample = team;
        for (; !any_empty && sample + (IN_FLIGHT - 1) * teams < samples; sample += IN_FLIGHT * teams) {
          gather<IN_FLIGHT, T, W, VEC, NV>(shared.samples, sample, teams, features, weights, row_bytes, sums);
        }
        for (; sample < samples; sample += teams) {
          if (!any_empty || shared.samples.rows[sample][0] >= 0) {
            gather<1, T, W, VEC, NV>(shared.samples, sample, teams, features, weights, row_bytes, sums);
          }
        }
        __syncthreads();
      }
    }
  }

  __syncthreads();  // a query that nothing sees comes here straight from the compaction
  const int team_channels = op.lanes * NV * VEC;
#pragma unroll
  for (int k = 0; k < NV; ++k) {
#pragma unroll
    for (int v = 0; v < VEC; ++v) {
      shared.team_sums[team * team_channels + (k * op.lanes + lane) * VEC + v] = sums[k][v];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < team_channels && first_channel + i < op.channels; i += THREADS) {
    compute_t<T> sum = 0;
    for (int s = 0; s < teams; ++s) {
      sum += shared.team_sums[s * team_channels + i];
    }
    output[static_cast<int64_t>(blockIdx.x) * op.channels + first_channel + i] = from_compute<T>(sum);
  }
}

template <typename T, typename W, int VEC, int NV, int IN_FLIGHT>
void launch_forward(
    const Sizes& sizes,
    const Tensor& features,
    const LevelTable& levels,
    const Tensor& locations,
    const Tensor& weights,
    const Tensor& output,
    cudaStream_t stream) {
  auto op = operands<T, W>(sizes, features, levels, locations, weights);
  set_team(op, op.channels, VEC * NV);
  const int block_channels = op.lanes * NV * VEC;
  const int64_t channel_blocks = (op.channels + block_channels - 1) / block_channels;
  const dim3 grid(
      query_blocks(sizes), std::min(channel_blocks, MOST_BLOCKS), (channel_blocks + MOST_BLOCKS - 1) / MOST_BLOCKS);
  deformable_aggregation_forward<T, W, VEC, NV, IN_FLIGHT>
      <<<grid, THREADS, 0, stream>>>(op, static_cast<T*>(output.mutable_data_ptr()));
  check_launch("deformable_aggregation");
}

}  // namespace

Tensor forward_cuda(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights) {
  const auto sizes = check(feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());
  const std::initializer_list<int64_t> output_shape = {sizes.batch, sizes.num_queries, sizes.channels};
  if (sizes.nothing_to_sample()) {
    return allocate_zeros(feature_maps, output_shape);
  }
  const Tensor features = as_contiguous(feature_maps);
  const Tensor output = allocate(features, output_shape);
  const cudaStream_t stream = current_stream(features.get_device_index());
  const DeviceLevels levels(spatial_shape, scale_start_index, features, sizes.num_rows, stream);

  dispatch_types(features, weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, features, VEC)) {
      constexpr int NV = sizeof(T) == 2 ? 1 : 2;
      launch_forward<T, W, VEC, NV, 2>(sizes, features, levels.table(), sampling_location, weights, output, stream);
    } else {
      launch_forward<T, W, 1, 4, 1>(sizes, features, levels.table(), sampling_location, weights, output, stream);
    }
  });
  return output;
}

}  // namespace reimplementation::aggregation
