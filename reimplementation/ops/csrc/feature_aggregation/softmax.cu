#include "feature_aggregation/softmax.cuh"

namespace reimplementation::feature_aggregation {
namespace {

constexpr int THREADS = 128;
constexpr int CAMERAS_AT_ONCE = 6;

// One thread a place of a batch element's rows.
template <typename C, typename L>
__global__ void __launch_bounds__(THREADS)
    combine(const L* camera_logits, int num_cams, int row, int64_t places, C* combined) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= places) {
    return;
  }
  const int64_t batch = i / row;
  const L* first = camera_logits + batch * num_cams * row + (i - batch * row);
  Softmax<C> cameras = Softmax<C>::of_nothing();
  for (int cam = 0; cam < num_cams; cam += CAMERAS_AT_ONCE) {
    C logits[CAMERAS_AT_ONCE];
#pragma unroll
    for (int j = 0; j < CAMERAS_AT_ONCE; ++j) {
      logits[j] = cam + j < num_cams ? to_compute(first[static_cast<int64_t>(cam + j) * row])
                                     : -std::numeric_limits<C>::infinity();
    }
    cameras.add(logits);
  }
  combined[i] = cameras.log_of_sum();
}

constexpr int QUERY_THREADS = 1024;

// One block a query.
template <typename T, typename L>
__global__ void __launch_bounds__(QUERY_THREADS)
    statistics_of_queries(const Inputs<T, L> in, compute_t<T>* statistics) {
  __shared__ Softmax<compute_t<T>> partial[QUERY_THREADS];
  unsigned batch = blockIdx.x;
  in.queries.split(batch);
  const Query<T, L> query(in, blockIdx.x, static_cast<int>(batch));
  for (int first = 0; first < in.num_groups; first += QUERY_THREADS) {
    const int count = min(QUERY_THREADS, in.num_groups - first);
    const auto softmax = find_softmax<QUERY_THREADS>(in, query, first, count, partial);
    if (threadIdx.x < count) {
      compute_t<T>* of_group = statistics + (query.number * in.num_groups + first + threadIdx.x) * 2;
      of_group[0] = softmax.largest;
      of_group[1] = softmax.sum;
    }
    __syncthreads();
  }
}

}  // namespace

std::optional<Tensor> combine_cameras(
    const Sizes& sizes, const ReadableOperands& readable, bool visible_only, cudaStream_t stream) {
  if (!readable.camera_logits || visible_only) {
    return std::nullopt;
  }
  const int64_t row = sizes.camera_width(), places = sizes.batch * row;
  const Tensor combined = allocate(readable.cameras.key_points, {sizes.batch, row});
  dispatch_types(readable.features, *readable.camera_logits, [&](auto* t, auto* l) {
    using C = compute_t<std::remove_pointer_t<decltype(t)>>;
    using L = std::remove_pointer_t<decltype(l)>;
    combine<<<static_cast<unsigned>((places + THREADS - 1) / THREADS), THREADS, 0, stream>>>(
        static_cast<const L*>(readable.camera_logits->const_data_ptr()), static_cast<int>(sizes.num_cams),
        static_cast<int>(row), places, static_cast<C*>(combined.mutable_data_ptr()));
  });
  check_launch("combine");
  return combined;
}

template <typename T, typename L>
void find_statistics(const Sizes& sizes, const Inputs<T, L>& in, const Tensor& statistics, cudaStream_t stream) {
  statistics_of_queries<<<static_cast<unsigned>(count_queries(sizes)), QUERY_THREADS, 0, stream>>>(
      in, static_cast<compute_t<T>*>(statistics.mutable_data_ptr()));
  check_launch("statistics_of_queries");
}

#define INSTANTIATE(T, L) template void find_statistics(const Sizes&, const Inputs<T, L>&, const Tensor&, cudaStream_t);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(__half, __half)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace reimplementation::feature_aggregation
