// Which pairs of key point and camera a softmax over visible pairs leaves out: one thread a key point, which looks
// through all cameras twice.
#include "feature_aggregation/operands.cuh"

namespace reimplementation::feature_aggregation {
namespace {

constexpr int THREADS = 128;

template <typename C>
__global__ void __launch_bounds__(THREADS) mark_hidden(
    const C* key_points,
    Cameras<C> cameras,
    int64_t count,
    int64_t query_points,
    Divisor points,
    int num_cams,
    unsigned char* hidden) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= count) {
    return;
  }
  const C position[3] = {key_points[3 * i], key_points[3 * i + 1], key_points[3 * i + 2]};
  const Cameras<C> own = cameras.of_sample(i / query_points, num_cams);
  auto is_visible = [&](int cam) {
    C depth;
    const Location<C> location = own.locate(cam, position, depth);
    return depth > Cameras<C>::min_depth() && inside_unit_square(location.x, location.y);
  };
  bool is_seen = false;
  for (int cam = 0; cam < num_cams; ++cam) {
    is_seen |= is_visible(cam);
  }
  const int64_t query = i / points.divisor;
  unsigned char* flags = hidden + query * num_cams * points.divisor + (i - query * points.divisor);
  for (int cam = 0; cam < num_cams; ++cam) {
    flags[static_cast<int64_t>(cam) * points.divisor] = is_seen && !is_visible(cam);
  }
}

}  // namespace

Tensor find_hidden(const Sizes& sizes, const ReadableOperands& readable, cudaStream_t stream) {
  const Tensor& key_points = readable.cameras.key_points;
  const Tensor hidden =
      allocate(key_points, {sizes.batch, sizes.num_queries, sizes.num_cams, sizes.num_points}, ScalarType::Byte);
  const int64_t count = count_queries(sizes) * sizes.num_points;
  with_real_type(key_points, [&](auto zero) {
    using C = decltype(zero);
    mark_hidden<C><<<(count + THREADS - 1) / THREADS, THREADS, 0, stream>>>(
        static_cast<const C*>(key_points.const_data_ptr()), readable.cameras.cameras<C>(), count,
        sizes.num_queries * sizes.num_points, Divisor(sizes.num_points), static_cast<int>(sizes.num_cams),
        static_cast<unsigned char*>(hidden.mutable_data_ptr()));
  });
  check_launch("mark_hidden");
  return hidden;
}

}  // namespace reimplementation::feature_aggregation
