// Deformable aggregation on CUDA, forward.
//
// One block owns one query, or, where queries are few, some of its key points:
//
//   1. its threads test the block's pairs and compact the visible ones in a fixed order;
//   2. one thread per sample turns the location into a footprint in shared memory: four rows, four weights;
//   3. teams take the samples in turn (sampling/gather.cuh): one broadcast read of the footprint, one coalesced gather
//      per corner.
//
// So the coordinate arithmetic is done once per sample and not once per lane, nothing is read for pairs that no camera
// sees, and step 3 has no bounds test. What remains is the traffic of the gathers: 4 * C * sizeof(T) bytes a sample,
// mostly from L1 and L2. Teams sum in registers, the block adds its teams in shared memory in a fixed order and writes
// every output once: no atomics, the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "aggregation/operands.cuh"
#include "cuda/levels.cuh"
#include "sampling/gather.cuh"
#include "sampling/shared_outputs.cuh"

namespace reimplementation::aggregation {

using sampling::Gatherer;
using sampling::SharedOutputs;
using sampling::Span;
using sampling::Sums;

namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;        // a multiprocessor's: 72 registers, enough for two samples in flight
constexpr int STAGED_SAMPLES = 256;  // footprints in shared memory at a time
constexpr int STAGED_LEVELS = 8;     // levels of a pair staged together

template <typename C, int VEC, int NV>
union Shared {
  struct {
    sampling::VisiblePairs<C, THREADS> pairs;
    sampling::Footprints<C, STAGED_SAMPLES> footprints;
    int64_t weights[STAGED_SAMPLES];  // where those of a sample begin
    Level levels[THREADS];            // of all cameras, where they are so few
  };
  C team_sums[THREADS * NV * VEC];

  __device__ Shared() {}
};

// Samples (pairs first_pair, ... x levels first_level, ...), numbered level by level. Returns whether one of them lies
// in an empty level.
template <typename T, typename W, int VEC, int NV>
__device__ __forceinline__ bool stage(
    const Operands<T, W>& op,
    int first_pair,
    unsigned num_pairs,
    int first_level,
    unsigned num_levels,
    Shared<compute_t<T>, VEC, NV>& shared) {
  bool any_empty = false;
  for (unsigned i = threadIdx.x; i < num_pairs * num_levels; i += THREADS) {
    const unsigned staged_level = i / num_pairs;
    const int level_number = first_level + staged_level;
    const int entry = first_pair + i - staged_level * num_pairs;
    const Pair pair = shared.pairs.pair[entry];
    const int64_t number = static_cast<int64_t>(pair.cam) * op.num_levels + level_number;
    const Level level = op.has_few_levels(THREADS) ? shared.levels[number] : op.levels[number];
    any_empty |= shared.footprints.set(i, level, shared.pairs.x[entry], shared.pairs.y[entry]);
    shared.weights[i] = op.weight_offset(pair, level_number, op.weight_strides);
  }
  return any_empty;
}

template <typename T, typename W, int VEC, int NV, int IN_FLIGHT>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    deformable_aggregation_forward(const Operands<T, W> op, int log2_lanes, const Sums<T> sums) {
  using C = compute_t<T>;
  __shared__ Shared<C, VEC, NV> shared;
  unsigned number = blockIdx.x;
  const Points points = op.shares.take(number);
  unsigned batch = number;
  const int query = op.queries.split(batch);
  const Span span = Span::of_block<NV * VEC>(log2_lanes, op.channels);
  const C* locations = op.locations + batch * op.location_strides[0] + query * op.location_strides[1];
  Gatherer<T, VEC, NV, THREADS> gatherer(span, op.features + batch * op.levels.num_rows * op.channels, op.channels);
  const W* weights[NV];
#pragma unroll
  for (int k = 0; k < NV; ++k) {
    weights[k] = op.weights + batch * op.weight_strides[0] + query * op.weight_strides[1] +
        (gatherer.channels[k] / op.group_channels) * op.weight_strides[5];
  }

  // While the first warps, which are first to find pairs, wait for their locations.
  const int last = THREADS - 1 - static_cast<int>(threadIdx.x);
  if (op.has_few_levels(THREADS) && last < op.cams * op.num_levels) {
    shared.levels[last] = op.levels[last];
  }

  const int numbers = op.shares.numbers_by_camera(op.cams);
  for (int first = 0; first < numbers; first += THREADS) {
    const Pair own = op.shares.pair_by_camera(points, first + threadIdx.x);
    const bool exists = own.cam < op.cams && own.point < points.end;
    const int visible = compact_visible_pairs(op, locations, own, exists, shared.pairs);
    for (int level = 0; level < op.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, op.num_levels - level);
      for (int pair = 0; pair < visible; pair += STAGED_SAMPLES / levels) {
        const int pairs = min(STAGED_SAMPLES / levels, visible - pair);
        const bool any_empty = __syncthreads_or(stage(op, pair, pairs, level, levels, shared));
        gatherer.template add<IN_FLIGHT>(shared.footprints, pairs * levels, any_empty, [&](int sample, int k) {
          return to_compute(weights[k][shared.weights[sample]]);
        });
        __syncthreads();
      }
    }
  }
  __syncthreads();  // a query that nothing sees comes here straight from the compaction
  gatherer.finish(
      span, shared.team_sums, [&](int channel, C sum) { sums.write(number, blockIdx.x, op.channels, channel, sum); });
}

template <typename T, typename W, int VEC, int NV, int IN_FLIGHT>
void launch_forward(const Sizes& sizes, const Operands<T, W>& op, const Sums<T>& sums, cudaStream_t stream) {
  const int lanes = log2_lanes(op.channels, VEC * NV);
  const dim3 grid =
      sampling::grid_of_spans(count_queries(sizes) * op.shares.blocks.divisor, op.channels, lanes, VEC * NV);
  deformable_aggregation_forward<T, W, VEC, NV, IN_FLIGHT><<<grid, THREADS, 0, stream>>>(op, lanes, sums);
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
  const Shares shares = Shares::of<THREADS>(
      count_queries(sizes), sizes.num_points, sizes.num_cams, MIN_BLOCKS, features.get_device_index());
  const SharedOutputs outputs(output, shares);

  dispatch_types(features, weights, [&](auto* t, auto* w) {
    using T = std::remove_pointer_t<decltype(t)>;
    using W = std::remove_pointer_t<decltype(w)>;
    const auto op = operands<T, W>(sizes, shares, features, levels.table(), sampling_location, weights);
    constexpr int VEC = 16 / sizeof(T);
    if (can_vectorize<T>(sizes, features, VEC)) {
      launch_forward<T, W, VEC, sizeof(T) == 2 ? 1 : 2, 2>(sizes, op, outputs.sums<T>(), stream);
    } else {
      launch_forward<T, W, 1, 4, 1>(sizes, op, outputs.sums<T>(), stream);
    }
  });
  outputs.finish(stream);
  return output;
}

}  // namespace reimplementation::aggregation
