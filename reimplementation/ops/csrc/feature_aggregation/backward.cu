// Deformable feature aggregation on CUDA, backward: the gradients of key points, logits and cameras' logits. Those of
// the features are in features_gradient.cu.
//
// With w the weights, and u their gradients, a logit has the gradient w * (u - mean), where the mean is the sum of w *
// u over the group. Here are the *terms* w * u, which only visible pairs have; softmax_gradient.cu does the rest. A
// block owns one query, or some of its key points where queries are few, or, where cameras' logits need a gradient,
// those of some queries after each other:
//
//   1. its threads project the key points and compact the visible pairs; one thread per sample makes a footprint;
//   2. teams take the samples in turn and multiply their pixels with the output's gradient, group by group
//      (sampling/group_products.cuh);
//   3. a few lanes per sample, one a group, find the weight again, and the term. The block sums up what the query's
//      logits get from the cameras, which take turns, and what the cameras' logits get from its queries;
//   4. a thread per pair takes its location's gradient back through the projection.
//
// The sums are in shared memory where they fit. No atomics, and every sum has its order: the same bits every time.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "cuda/levels.cuh"
#include "feature_aggregation/features_gradient.cuh"
#include "feature_aggregation/softmax_gradient.cuh"
#include "sampling/group_products.cuh"

namespace reimplementation::feature_aggregation {

using sampling::MAX_GROUPS;
using sampling::Teams;

namespace {

constexpr int THREADS = 128;
constexpr int MIN_BLOCKS = 7;       // a multiprocessor's: many warps, each waiting for the gathers of one sample
constexpr int STAGED_LEVELS = 8;    // levels of a pair staged together
constexpr int STAGED_SAMPLES = 64;  // samples in shared memory at a time
constexpr int NOWHERE = -1;
constexpr int MOST_SHARED_SUMS = 12288;           // bytes, so that MIN_BLOCKS fit a multiprocessor
constexpr int64_t MOST_PARTS = int64_t{1} << 26;  // bytes of what blocks leave in global memory

template <typename T>
struct Gradients {
  using C = compute_t<T>;

  const T* output;  // (batch, queries, channels)
  C* key_points;    // like the operand, or null where not needed; so are the others
  C* terms;         // of the queries' logits, and like these
  C* camera_parts;  // (batch, blocks, cams, row)
  C* sums;          // (all blocks, what of `Layout` is not in shared memory)
  Divisor blocks;   // of a batch element and a share of the key points
};

// What a block sums up, for the key points that it has: for the query (its rows, levels, points, groups) and (points, 3),
// for the cameras (cams, levels, points, groups). What is not needed has no size.
struct Layout {
  int terms, key_points, camera;
  bool shares_query, shares_camera;  // they are in shared memory

  HOST_DEVICE int of_query() const {
    return terms + key_points;
  }
  HOST_DEVICE int in_shared() const {
    return (shares_query ? of_query() : 0) + (shares_camera ? camera : 0);
  }
  HOST_DEVICE int in_global() const {
    return of_query() + camera - in_shared();
  }
};

// The samples that are in shared memory together: pairs first_pair, ... x levels first_level, ..., numbered level by
// level.
struct Staged {
  int first_pair, pairs, first_level, levels;

  __device__ __forceinline__ int samples() const {
    return pairs * levels;
  }
};

// A query, for the key points of a block.
template <typename T, typename L>
struct Work {
  using C = compute_t<T>;

  Query<T, L> query;
  Points points;
  const T* grad_output;
  C *terms, *camera, *key_points;  // the block's sums, or null

  // Where a camera's row of the query's sums is, and in a row a sample's first sum.
  __device__ __forceinline__ int camera_row(const Inputs<T, L>& in, int cam) const {
    return in.camera_logits == nullptr ? cam * in.num_levels * in.shares.points.divisor * in.num_groups : 0;
  }
  __device__ __forceinline__ int place(const Inputs<T, L>& in, int level, int point) const {
    return (level * in.shares.points.divisor + point - points.first) * in.num_groups;
  }
};

template <typename T, typename L>
struct Shared {
  using C = compute_t<T>;

  Work<T, L> work;  // the same for all threads: here it takes no registers of theirs
  sampling::VisiblePairs<C, THREADS> pairs;
  Four<C> axis_weights[STAGED_SAMPLES];  // x[0], x[1], y[0], y[1]
  Four<C> axis_slopes[STAGED_SAMPLES];   // likewise
  Four<int> rows[STAGED_SAMPLES];        // of the corners; the first is NOWHERE where the level cannot be sampled
  C grad_x[STAGED_SAMPLES], grad_y[STAGED_SAMPLES];
  Four<C> products[STAGED_SAMPLES * MAX_GROUPS];  // by corner: a pixel's features times the output's gradient

  __device__ Shared() {}
};

// Copies rows of a block's sums to where those of all key points are.
template <typename T, typename L>
__device__ __forceinline__ void write_rows(
    const Inputs<T, L>& in, const Points& points, int rows, const compute_t<T>* sums, compute_t<T>* all) {
  const int width = points.count() * in.num_groups, step = in.shares.points.divisor * in.num_groups;
  for (int i = 0; i < rows * in.num_levels; ++i) {
    compute_t<T>* of_level = all + in.place(i, points.first);
    for (int j = threadIdx.x; j < width; j += THREADS) {
      of_level[j] = sums[i * step + j];
    }
  }
}

// Step 1: footprints.
template <typename T, typename L>
__device__ void stage(const Inputs<T, L>& in, const Staged& staged, Shared<T, L>& shared) {
  using C = compute_t<T>;
  for (int i = threadIdx.x; i < staged.samples(); i += THREADS) {
    const int entry = staged.first_pair + i % staged.pairs;
    const int64_t cam = shared.pairs.pair[entry].cam;
    const Level level = in.levels[cam * in.num_levels + staged.first_level + i / staged.pairs];
    Axis<C> x = {}, y = {};
    Four<int> rows = {NOWHERE, NOWHERE, NOWHERE, NOWHERE};
    if (!level.empty()) {
      x = bilinear_axis(pixel_position(shared.pairs.x[entry], level.width), level.width);
      y = bilinear_axis(pixel_position(shared.pairs.y[entry], level.height), level.height);
      rows = corner_rows(level, x, y);
    }
    shared.axis_weights[i] = {x.weight[0], x.weight[1], y.weight[0], y.weight[1]};
    shared.axis_slopes[i] = {x.slope[0], x.slope[1], y.slope[0], y.slope[1]};
    shared.rows[i] = rows;
    shared.grad_x[i] = shared.grad_y[i] = 0;
  }
}

// Step 3: the terms of the staged samples, in place of their products, what they add to the cameras' sums, and what the
// groups of this pass add to their locations' gradients.
template <typename T, typename L>
__device__ void find_terms(
    const Inputs<T, L>& in,
    const Staged& staged,
    int first_group,
    int num_groups,
    int pass_groups,
    Shared<T, L>& shared) {
  using C = compute_t<T>;
  const Work<T, L>& work = shared.work;
  static_assert(MAX_GROUPS == 8, "eight lanes a sample, one group each");
  const int lane = threadIdx.x % MAX_GROUPS, group = first_group + lane;
  const C largest = lane < num_groups ? work.query.statistics[2 * group] : C(0);
  const C scale = lane < num_groups ? in.kept_scale / work.query.statistics[2 * group + 1] : C(0);
  // All threads make the same number of rounds: the sum below needs whole warps.
  for (int first = 0; first < staged.samples(); first += THREADS / MAX_GROUPS) {
    const int sample = first + threadIdx.x / MAX_GROUPS;
    const bool live = sample < staged.samples() && lane < num_groups;
    C grad_x = 0, grad_y = 0;
    if (live) {
      const Four<C> slopes = shared.axis_slopes[sample], axes = shared.axis_weights[sample];
      Four<C>& products = shared.products[sample * pass_groups + lane];
      const int in_staged = sample / staged.pairs, level = staged.first_level + in_staged;
      const Pair pair = shared.pairs.pair[staged.first_pair + sample - in_staged * staged.pairs];
      const C logit = work.query.logit(pair.cam, in.row, in.place(level, pair.point) + group);
      const C weight = shared.rows[sample][0] == NOWHERE ? C(0) : exponential(logit - largest) * scale;
      C dots[4], grad_weight = 0;
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        // A pixel outside the level was read from its neighbour inside; an empty level has none.
        const bool inside = slopes[corner % 2] != 0 && slopes[2 + corner / 2] != 0;
        dots[corner] = inside ? products[corner] : C(0);
        grad_weight += axes[2 + corner / 2] * axes[corner % 2] * dots[corner];
      }
      const C term = weight * grad_weight;
      products[0] = term;
      if (work.camera != nullptr) {
        work.camera
            [pair.cam * in.num_levels * in.shares.points.divisor * in.num_groups + work.place(in, level, pair.point) +
             group] += term;
      }
      location_gradient(axes, slopes, dots, grad_x, grad_y);
      grad_x *= weight;
      grad_y *= weight;
    }
    if (work.key_points != nullptr) {
#pragma unroll
      for (int step = MAX_GROUPS / 2; step > 0; step /= 2) {
        grad_x += __shfl_xor_sync(ALL_LANES, grad_x, step);
        grad_y += __shfl_xor_sync(ALL_LANES, grad_y, step);
      }
      if (live && lane == 0) {
        shared.grad_x[sample] += grad_x;
        shared.grad_y[sample] += grad_y;
      }
    }
  }
}

// Adds the terms of the staged samples of one camera to the query's.
template <typename T, typename L>
__device__ void add_terms(
    const Inputs<T, L>& in,
    const Staged& staged,
    int cam,
    int first_group,
    int num_groups,
    int pass_groups,
    const Shared<T, L>& shared) {
  const Work<T, L>& work = shared.work;
  const int lane = threadIdx.x % MAX_GROUPS, group = first_group + lane;
  const int row = work.camera_row(in, cam);
  for (int sample = threadIdx.x / MAX_GROUPS; sample < staged.samples(); sample += THREADS / MAX_GROUPS) {
    const int level = sample / staged.pairs;
    const Pair pair = shared.pairs.pair[staged.first_pair + sample - level * staged.pairs];
    if (lane < num_groups && pair.cam == cam) {
      work.terms[row + work.place(in, staged.first_level + level, pair.point) + group] +=
          shared.products[sample * pass_groups + lane][0];
    }
  }
}

// Step 4 for the staged pairs of one camera.
template <typename T, typename L>
__device__ __forceinline__ void differentiate_projection(
    const Inputs<T, L>& in, const Staged& staged, int cam, const Shared<T, L>& shared) {
  using C = compute_t<T>;
  const Work<T, L>& work = shared.work;
  const Cameras<C> cameras = in.cameras.of_sample(work.query.batch, in.num_cams);
  for (int entry = threadIdx.x; entry < staged.pairs; entry += THREADS) {
    const Pair pair = shared.pairs.pair[staged.first_pair + entry];
    C x = 0, y = 0;
    for (int level = 0; level < staged.levels; ++level) {
      x += shared.grad_x[level * staged.pairs + entry];
      y += shared.grad_y[level * staged.pairs + entry];
    }
    // Where there is no gradient, the projection's slopes may be none.
    if (pair.cam == cam && (x != 0 || y != 0)) {
      const C* place = work.query.key_points + 3 * pair.point;
      const C position[3] = {place[0], place[1], place[2]};
      C gradient[3] = {};
      cameras.add_gradient(cam, position, x, y, gradient);
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        work.key_points[3 * (pair.point - work.points.first) + axis] += gradient[axis];
      }
    }
  }
}

// Calls `take_turn(camera)` for each camera of the staged pairs, which are in the order of the cameras.
template <typename T, typename L, typename TakeTurn>
__device__ __forceinline__ void for_each_camera(
    const Staged& staged, const Shared<T, L>& shared, const TakeTurn& take_turn) {
  const int last = shared.pairs.pair[staged.first_pair + staged.pairs - 1].cam;
  for (int entry = 0, cam; entry < staged.pairs;) {
    cam = shared.pairs.pair[staged.first_pair + entry].cam;
    take_turn(cam);
    if (cam == last) {
      break;
    }
    __syncthreads();
    while (shared.pairs.pair[staged.first_pair + entry].cam == cam) {
      ++entry;
    }
  }
}

// Steps 1 to 4 for one query.
template <int VEC, int NV, typename T, typename L>
__device__ __forceinline__ void differentiate_samples(
    const Inputs<T, L>& in, const Teams& teams, Shared<T, L>& shared) {
  const Work<T, L>& work = shared.work;
  const T* features = in.features + work.query.batch * in.levels.num_rows * in.channels;
  const int numbers = in.shares.numbers_by_camera(in.num_cams);
  for (int first = 0; first < numbers; first += THREADS) {
    const int visible = compact_visible_pairs(in, work.query, work.points, first, shared.pairs);
    for (int level = 0; level < in.num_levels; level += STAGED_LEVELS) {
      const int levels = min(STAGED_LEVELS, in.num_levels - level);
      for (int pair = 0; pair < visible; pair += STAGED_SAMPLES / levels) {
        const Staged staged = {pair, min(STAGED_SAMPLES / levels, visible - pair), level, levels};
        stage(in, staged, shared);
        __syncthreads();
        for (int group = 0; group < in.num_groups; group += teams.pass_groups) {
          const int groups = min(teams.pass_groups, in.num_groups - group);
          sampling::multiply_samples<VEC, NV, THREADS>(
              teams, features, work.grad_output, group, groups, shared.rows, staged.samples(), shared.products);
          __syncthreads();
          find_terms(in, staged, group, groups, teams.pass_groups, shared);
          __syncthreads();
          if (work.terms != nullptr) {
            for_each_camera(
                staged, shared, [&](int cam) { add_terms(in, staged, cam, group, groups, teams.pass_groups, shared); });
            __syncthreads();
          }
        }
        if (work.key_points != nullptr) {
          for_each_camera(staged, shared, [&](int cam) { differentiate_projection(in, staged, cam, shared); });
        }
        __syncthreads();
      }
    }
  }
}

// What a block has to do before its first query: its sums' places, and zeros for the cameras.
template <typename T, typename L>
__device__ __forceinline__ void begin_block(
    const Inputs<T, L>& in,
    const Gradients<T>& grad,
    const Layout& layout,
    const Points& points,
    compute_t<T>* shared_sums,
    Shared<T, L>& shared) {
  compute_t<T>* const global_sums = grad.sums + static_cast<int64_t>(blockIdx.x) * layout.in_global();
  compute_t<T>* const of_query = layout.shares_query ? shared_sums : global_sums;
  compute_t<T>* const camera =
      layout.shares_camera ? shared_sums + layout.of_query() : global_sums + layout.in_global() - layout.camera;
  for (int i = threadIdx.x; i < layout.camera; i += THREADS) {
    camera[i] = 0;
  }
  if (threadIdx.x == 0) {
    shared.work.points = points;
    shared.work.terms = grad.terms == nullptr ? nullptr : of_query;
    shared.work.key_points = grad.key_points == nullptr ? nullptr : of_query + layout.terms;
    shared.work.camera = grad.camera_parts == nullptr ? nullptr : camera;
  }
}

template <typename T, typename L>
__device__ __forceinline__ void begin_query(
    const Inputs<T, L>& in,
    const Gradients<T>& grad,
    const Layout& layout,
    int64_t number,
    int batch,
    Shared<T, L>& shared) {
  if (threadIdx.x == 0) {
    shared.work.query = Query<T, L>(in, number, batch);
    shared.work.grad_output = grad.output + number * in.channels;
  }
  for (int i = threadIdx.x; i < layout.terms; i += THREADS) {
    shared.work.terms[i] = 0;
  }
  for (int i = threadIdx.x; i < layout.key_points; i += THREADS) {
    shared.work.key_points[i] = 0;
  }
}

// Writes what belongs to the query alone.
template <typename T, typename L>
__device__ __forceinline__ void finish_query(
    const Inputs<T, L>& in, const Gradients<T>& grad, const Layout& layout, const Shared<T, L>& shared) {
  const Work<T, L>& work = shared.work;
  if (layout.terms > 0) {
    write_rows(in, work.points, in.query_rows(), work.terms, grad.terms + work.query.number * in.query_rows() * in.row);
  }
  compute_t<T>* const key_points = grad.key_points + (work.query.number * in.num_points + work.points.first) * 3;
  for (int i = threadIdx.x; i < layout.key_points && i < work.points.count() * 3; i += THREADS) {
    key_points[i] = work.key_points[i];
  }
}

template <typename T, typename L, int VEC, int NV>
__global__ void __launch_bounds__(THREADS, MIN_BLOCKS) deformable_feature_aggregation_backward(
    const Inputs<T, L> in, const Gradients<T> grad, const Layout layout, const Teams teams) {
  __shared__ Shared<T, L> shared;
  extern __shared__ __align__(16) char shared_sums[];
  unsigned part = blockIdx.x;
  const Points points = in.shares.take(part);
  begin_block(in, grad, layout, points, reinterpret_cast<compute_t<T>*>(shared_sums), shared);
  __syncthreads();
  unsigned batch = part;
  for (int i = grad.blocks.split(batch); i < in.queries.divisor; i += grad.blocks.divisor) {
    begin_query(
        in, grad, layout, static_cast<int64_t>(batch) * in.queries.divisor + i, static_cast<int>(batch), shared);
    __syncthreads();
    differentiate_samples<VEC, NV>(in, teams, shared);
    __syncthreads();  // a query that nothing sees comes here straight from the compaction
    finish_query(in, grad, layout, shared);
    __syncthreads();
  }
  if (layout.camera > 0) {
    part = blockIdx.x;
    in.shares.take(part);
    write_rows(
        in, shared.work.points, in.num_cams, shared.work.camera,
        grad.camera_parts + static_cast<int64_t>(part) * in.num_cams * in.row);
  }
}

// Key points of a block, at most, so that what it sums up for a query is in shared memory; or one, where that is too much.
int64_t most_shared_points(const Sizes& sizes) {
  const int64_t of_point = sizes.num_levels * sizes.num_groups + 3;
  return std::max<int64_t>(MOST_SHARED_SUMS / int64_t{sizeof(float)} / of_point, 1);
}

template <typename T, typename L>
Layout layout_of(const Sizes& sizes, const Inputs<T, L>& in, bool needs_terms, bool needs_points, bool needs_cameras) {
  const int points = in.shares.points.divisor, row = in.num_levels * points * in.num_groups;
  constexpr int64_t most = MOST_SHARED_SUMS / sizeof(compute_t<T>);
  Layout layout = {};
  layout.terms = needs_terms ? in.query_rows() * row : 0;
  layout.key_points = needs_points ? 3 * points : 0;
  layout.camera = needs_cameras ? in.num_cams * row : 0;
  layout.shares_query = layout.of_query() <= most;
  layout.shares_camera = layout.shares_query && layout.of_query() + layout.camera <= most;
  return layout;
}

// How many blocks share out a batch element's queries: one for each, or, where they leave something in global memory, no
// more than keep the GPU busy, or than memory allows.
int64_t blocks_of_batch_element(const Sizes& sizes, const Shares& shares, int64_t bytes_left, int device) {
  if (bytes_left == 0) {
    return sizes.num_queries;
  }
  const int64_t most =
      std::min(resident_blocks(MIN_BLOCKS, device) / shares.blocks.divisor, MOST_PARTS / bytes_left) / sizes.batch;
  return std::clamp<int64_t>(most, 1, sizes.num_queries);
}

template <typename C>
C* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor && tensor->numel() > 0 ? static_cast<C*>(tensor->mutable_data_ptr()) : nullptr;
}

// The gradients of everything but the features.
template <typename T, typename L>
void differentiate(
    const Sizes& sizes,
    const Inputs<T, L>& in,
    const Tensor& grad_output,
    const Tensor& grad_points,
    const Tensor& grad_logits,
    const Tensor& grad_camera_logits,
    const Tensor& features,
    const Tensor& statistics,
    cudaStream_t stream) {
  using C = compute_t<T>;
  const int device = features.get_device_index();
  const bool needs_cameras = grad_camera_logits.numel() > 0, needs_terms = needs_cameras || grad_logits.numel() > 0;
  const Layout layout = layout_of(sizes, in, needs_terms, grad_points.numel() > 0, needs_cameras);
  const int64_t part_bytes = needs_cameras ? sizes.num_cams * in.row * int64_t{sizeof(C)} : 0;
  const int64_t sum_bytes = int64_t{layout.in_global()} * in.shares.blocks.divisor * sizeof(C);
  const int64_t blocks = blocks_of_batch_element(sizes, in.shares, part_bytes + sum_bytes, device);
  const unsigned grid = static_cast<unsigned>(sizes.batch * blocks * in.shares.blocks.divisor);
  std::optional<Tensor> terms, parts, sums;
  if (needs_terms) {
    // In the place of the queries' gradients, if one block takes them from there.
    const bool in_place = std::is_same_v<C, L> && grad_logits.numel() > 0 && in.shares.blocks.divisor == 1;
    terms = in_place
        ? grad_logits
        : allocate(statistics, {sizes.batch, sizes.num_queries, in.camera_logits ? 1 : sizes.num_cams, in.row});
  }
  if (needs_cameras) {
    parts = allocate(statistics, {sizes.batch, blocks, sizes.num_cams, in.row});
  }
  if (layout.in_global() > 0) {
    sums = allocate(statistics, {grid, layout.in_global()});
  }
  const Gradients<T> grad = {
      static_cast<const T*>(grad_output.const_data_ptr()),
      data_or_null<C>(grad_points),
      data_or_null<C>(terms),
      data_or_null<C>(parts),
      data_or_null<C>(sums),
      Divisor(blocks)};
  auto launch = [&](auto kernel, const Teams& teams) {
    kernel<<<grid, THREADS, layout.in_shared() * sizeof(C), stream>>>(in, grad, layout, teams);
  };
  constexpr int VEC = 16 / sizeof(T), NV = sizeof(T) == 2 ? 1 : 2;
  if (can_vectorize<T>(sizes, features, VEC) && can_vectorize<T>(sizes, grad_output, VEC)) {
    launch(
        deformable_feature_aggregation_backward<T, L, VEC, NV>,
        sampling::teams_of<VEC, NV>(in.channels, in.group_channels));
  } else {
    launch(
        deformable_feature_aggregation_backward<T, L, 1, 4>, sampling::teams_of<1, 4>(in.channels, in.group_channels));
  }
  check_launch("deformable_feature_aggregation_backward");
  if (needs_terms) {
    differentiate_softmax(
        sizes, in, grad.terms, grad.camera_parts, blocks, data_or_null<L>(grad_logits),
        data_or_null<L>(grad_camera_logits), statistics, stream);
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh,
    const Tensor& logits,
    const std::optional<Tensor>& camera_logits,
    const std::optional<Tensor>& keep,
    const Tensor& statistics,
    double attn_drop,
    bool visible_only,
    bool needs_feature_maps,
    bool needs_key_points,
    bool needs_logits,
    bool needs_camera_logits,
    bool deterministic) {
  const Operands op{feature_maps, spatial_shape, scale_start_index, key_points, projection_mat,
                    image_wh,     logits,        camera_logits,     keep};
  const Sizes sizes = check(op, attn_drop);
  check_gradient(grad_output, statistics, feature_maps, sizes);
  const torch::stable::accelerator::DeviceGuard guard(feature_maps.get_device_index());
  Tensor grad_points = contiguous_gradient(key_points, needs_key_points);
  Tensor grad_logits = contiguous_gradient(logits, needs_logits);
  Tensor grad_camera_logits = contiguous_gradient(camera_logits.value_or(logits), camera_logits && needs_camera_logits);
  if (sizes.nothing_to_sample()) {
    Tensor grad_features = contiguous_gradient(feature_maps, needs_feature_maps);
    for (Tensor* gradient : {&grad_features, &grad_points, &grad_logits, &grad_camera_logits}) {
      torch::stable::zero_(*gradient);
    }
    return {grad_features, grad_points, grad_logits, grad_camera_logits};
  }
  const ReadableOperands readable(op);
  const Tensor grad_rows = as_contiguous(grad_output), known = as_contiguous(statistics);
  const cudaStream_t stream = current_stream(feature_maps.get_device_index());
  const DeviceLevels levels(spatial_shape, scale_start_index, readable.features, sizes.num_rows, stream);
  const Shares shares = Shares::of<THREADS>(
      count_queries(sizes), sizes.num_points, sizes.num_cams, MIN_BLOCKS, feature_maps.get_device_index(),
      most_shared_points(sizes));
  std::optional<Tensor> hidden;
  if (visible_only) {
    hidden = find_hidden(sizes, readable, stream);
  }
  const bool needs_others = needs_key_points || needs_logits || grad_camera_logits.numel() > 0;
  std::optional<FeaturesGradient> features_gradient;
  std::optional<Tensor> combined;
  if (needs_logits || grad_camera_logits.numel() > 0) {
    combined = combine_cameras(sizes, readable, visible_only, stream);
  }

  dispatch_types(readable.features, readable.logits, [&](auto* t, auto* l) {
    using T = std::remove_pointer_t<decltype(t)>;
    using L = std::remove_pointer_t<decltype(l)>;
    const auto in = inputs_of<T, L>(sizes, shares, readable, combined, known, levels.table(), hidden, attn_drop);
    if (needs_feature_maps) {
      features_gradient.emplace(sizes, in, known, grad_rows, readable.features, deterministic, needs_others, stream);
    }
    if (needs_others) {
      differentiate(
          sizes, in, grad_rows, grad_points, grad_logits, grad_camera_logits, readable.features, known, stream);
    }
  });
  return {
      features_gradient ? features_gradient->finish() : contiguous_gradient(feature_maps, false), grad_points,
      grad_logits, grad_camera_logits};
}

}  // namespace reimplementation::feature_aggregation
