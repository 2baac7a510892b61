// Locations (batch, queries, cams, points, 2), and weights (batch, queries, cams, levels, points, groups) of the
// visible samples alone: nothing is written, or read, where no camera sees a pair.
#include "feature_aggregation/features_gradient.cuh"

namespace reimplementation::feature_aggregation {
namespace {

constexpr int THREADS = 128;
constexpr int NOWHERE = -1;  // a location that nothing sees

template <typename T, typename L>
__global__ void __launch_bounds__(THREADS) write_samples(
    const Inputs<T, L> in,
    const compute_t<T>* all_statistics,
    Location<compute_t<T>>* all_locations,
    compute_t<T>* all_weights) {
  using C = compute_t<T>;
  __shared__ VisiblePairs<C, THREADS> pairs;
  unsigned batch = blockIdx.x;
  in.queries.split(batch);
  const Query<T, L> query(in, blockIdx.x, batch);
  const C* statistics = all_statistics + query.number * in.num_groups * 2;
  Location<C>* locations = all_locations + query.number * in.num_pairs();
  C* weights = all_weights + query.number * in.num_cams * in.row;
  for (int first = 0; first < in.num_pairs(); first += THREADS) {
    const int visible =
        compact_visible_pairs(in, query, first, pairs, [&](int pair, const Location<C>& location, bool is_visible) {
          locations[pair] = is_visible ? location : Location<C>{NOWHERE, NOWHERE};
        });
    for (int first_group = 0; first_group < in.num_groups; first_group += THREADS) {
      const Share<THREADS> share(min(THREADS, in.num_groups - first_group));
      const int group = first_group + share.group;
      const C largest = statistics[2 * group], scale = in.kept_scale / statistics[2 * group + 1];
      for (int sample = share.first; sample < visible * in.num_levels; sample += share.step) {
        const int level = sample / visible;
        unsigned cam = pairs.number[sample - level * visible];
        const int point = in.points.split(cam);
        const int place = (level * in.points.divisor + point) * in.num_groups + group;
        weights[static_cast<int>(cam) * in.row + place] =
            exponential(query.logit(cam, in.row, place) - largest) * scale;
      }
    }
  }
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
    cudaStream_t stream) {
  using C = compute_t<T>;
  const int64_t row = sizes.camera_width(), pairs = sizes.num_cams * sizes.num_points;
  feature_gradient::SampledOp op = {};
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
  op.level_table = in.levels;
  op.locations = allocate(statistics, {sizes.batch, sizes.num_queries, pairs, 2});
  op.weights = allocate(statistics, {sizes.batch, sizes.num_queries, sizes.num_cams, row});
  op.location_steps = {sizes.num_queries * pairs * 2, 0, pairs * 2, 2, sizes.num_points * 2, 0, 1};
  op.weight_steps = {sizes.num_queries * sizes.num_cams * row, 0, sizes.num_cams * row, sizes.num_groups, row,
                     sizes.num_points * sizes.num_groups,      1};
  write_samples<<<static_cast<unsigned>(count_queries(sizes)), THREADS, 0, stream>>>(
      in, static_cast<const C*>(statistics.const_data_ptr()),
      static_cast<Location<C>*>(op.locations.mutable_data_ptr()), static_cast<C*>(op.weights.mutable_data_ptr()));
  check_launch("write_samples");
  sum_.emplace(op, grad_output, features, deterministic, beside, stream);
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
