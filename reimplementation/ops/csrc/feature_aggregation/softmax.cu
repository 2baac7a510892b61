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

}  // namespace reimplementation::feature_aggregation
