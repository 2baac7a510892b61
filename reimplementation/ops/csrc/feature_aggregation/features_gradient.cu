// Locations are written down, NOWHERE for dropped pairs; weights are found again from the logits wherever one is needed.
#include "feature_aggregation/features_gradient.cuh"

#include "feature_aggregation/softmax.cuh"
#include "feature_gradient/sum_samples.cuh"

namespace reimplementation::feature_aggregation {
namespace {

using feature_gradient::Place;
using feature_gradient::SampledOp;

constexpr int THREADS = 128;
constexpr int NOWHERE = -1;

// Locations (batch, queries, cams, points, 2), and for each query and group its shift: what is to be subtracted from a
// logit, so that the exponential is the weight. One thread takes one of each.
template <typename T, typename L>
__global__ void __launch_bounds__(THREADS) write_locations(
    const Inputs<T, L> in, int64_t pairs, Location<compute_t<T>>* locations, int64_t groups, compute_t<T>* shifts) {
  using C = compute_t<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * THREADS;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  for (int64_t i = first; i < pairs; i += step) {
    const int64_t in_cameras = i / in.num_points, query = in_cameras / in.num_cams;
    const int cam = static_cast<int>(in_cameras - query * in.num_cams);
    const C* point = in.key_points + 3 * (query * in.num_points + (i - in_cameras * in.num_points));
    const C position[3] = {point[0], point[1], point[2]};
    const Location<C> location = in.cameras.of_sample(query / in.queries.divisor, in.num_cams).locate(cam, position);
    const bool counts = (in.keep == nullptr || in.keep[i]) && (in.hidden == nullptr || !in.hidden[i]);
    locations[i] = counts ? location : Location<C>{NOWHERE, NOWHERE};
  }
  for (int64_t i = first; i < groups; i += step) {
    shifts[i] = in.statistics[2 * i] + log(in.statistics[2 * i + 1] / in.kept_scale);
  }
}

// A weight in parts, so that they can be under way for a while.
template <typename C, typename L>
struct Weight {
  L logit, of_camera;
  C shift;
  bool by_camera;
};

template <typename C, typename L>
__device__ __forceinline__ C to_compute(const Weight<C, L>& weight) {
  const C logit = cuda::to_compute(weight.logit) + (weight.by_camera ? cuda::to_compute(weight.of_camera) : C(0));
  return exponential(logit - weight.shift);
}

// Weights from logits and shifts, as weights.cuh describes a source.
template <typename C, typename L>
struct SoftmaxWeights {
  struct Key {
    int of_query, of_camera;  // places of the first group's logits
  };
  using Value = Weight<C, L>;

  const L *logits, *camera_logits;
  const C* shifts;
  int64_t query_step, camera_step;  // from query to query, from batch element to batch element
  int queries, points, groups, row;

  struct OfGroup {
    const L *logits, *camera_logits;
    const C* shifts;
    int64_t query_step;
    int groups;

    __device__ __forceinline__ Value load(const Key& key, int query, int groups_behind) const {
      const L logit = logits[query * query_step + key.of_query + groups_behind];
      const bool by_camera = camera_logits != nullptr;
      return {
          logit, by_camera ? camera_logits[key.of_camera + groups_behind] : logit,
          shifts[static_cast<int64_t>(query) * groups + groups_behind], by_camera};
    }
  };

  bool has_long_query_steps() const {
    return false;
  }
  SoftmaxWeights from(int64_t batch, int64_t query) const {
    SoftmaxWeights later = *this;
    later.logits += (batch * queries + query) * query_step;
    later.shifts += (batch * queries + query) * groups;
    if (camera_logits != nullptr) {
      later.camera_logits += batch * camera_step;
    }
    return later;
  }
  __device__ __forceinline__ OfGroup of_group(int batch, int, int group) const {
    const int64_t first = static_cast<int64_t>(batch) * queries;
    return {
        logits + first * query_step + group,
        camera_logits == nullptr ? nullptr : camera_logits + batch * camera_step + group,
        shifts + first * groups + group, query_step, groups};
  }
  __device__ __forceinline__ Key key(const Place& place) const {
    const int in_row = (place.level * points + place.point) * groups, in_camera = place.cam * row + in_row;
    return {camera_logits == nullptr ? in_camera : in_row, in_camera};
  }
};

SampledOp sampled_op(const Sizes& sizes, const LevelTable& levels, const Tensor& like) {
  const int64_t pairs = sizes.num_cams * sizes.num_points;
  SampledOp op = {};
  op.batch = sizes.batch;
  op.heads = 1;
  op.queries = sizes.num_queries;
  op.points = sizes.num_points;
  op.cams = sizes.num_cams;
  op.levels = sizes.num_levels;
  op.rows = sizes.num_rows;
  op.channels = sizes.channels;
  op.groups = sizes.num_groups;
  op.unit_square = true;
  op.level_table = levels;
  op.locations = allocate(like, {sizes.batch, sizes.num_queries, pairs, 2});
  op.location_steps = {sizes.num_queries * pairs * 2, 0, pairs * 2, 2, sizes.num_points * 2, 0, 1};
  return op;
}

}  // namespace

template <typename T, typename L>
FeaturesGradient::FeaturesGradient(
    const Sizes& sizes,
    const Inputs<T, L>& in,
    const Tensor& statistics,
    const Tensor& grad_output,
    const Tensor& features,
    bool deterministic,
    bool beside,
    cudaStream_t stream)
    : op_(sampled_op(sizes, in.levels, statistics)),
      shifts_(allocate(statistics, {sizes.batch, sizes.num_queries, sizes.num_groups})),
      sum_(features, beside, stream) {
  using C = compute_t<T>;
  const int64_t pairs = count_queries(sizes) * sizes.num_cams * sizes.num_points;
  const int64_t blocks = std::min<int64_t>((pairs + THREADS - 1) / THREADS, INT_MAX);
  C* const shifts = static_cast<C*>(shifts_.mutable_data_ptr());
  write_locations<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(
      in, pairs, static_cast<Location<C>*>(op_.locations.mutable_data_ptr()), shifts_.numel(), shifts);
  check_launch("write_locations");
  const SoftmaxWeights<C, L> weights = {
      in.logits,
      in.camera_logits,
      shifts,
      (in.camera_logits == nullptr ? sizes.num_cams : 1) * in.row,
      sizes.num_cams * in.row,
      static_cast<int>(sizes.num_queries),
      in.num_points,
      in.num_groups,
      in.row};
  sum_.template start<T>(op_, weights, grad_output, features, deterministic);
}

#define INSTANTIATE(T, L)                      \
  template FeaturesGradient::FeaturesGradient( \
      const Sizes&, const Inputs<T, L>&, const Tensor&, const Tensor&, const Tensor&, bool, bool, cudaStream_t);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(__half, __half)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace reimplementation::feature_aggregation
