// From terms w * u to gradients w * (u - mean), where the mean is the sum of a group's terms.
//
// A block owns some queries of one batch element, and all of their places, or some where queries are few. Its threads sum
// the terms of each query; then each thread takes some places of a row, for all of the queries: so it reads what the
// cameras add to a place once, and sums what the means take from them over the queries, in a register. A second kernel
// sums over the blocks.
#include "feature_aggregation/softmax_gradient.cuh"

namespace reimplementation::feature_aggregation {
namespace {

constexpr int THREADS = 256;
constexpr int MOST_QUERIES = 8;  // of a block
constexpr int SLICES = 16;       // of the blocks, whose parts are summed side by side

template <typename C>
struct Sum {
  C value;

  __device__ __forceinline__ void merge(const Sum& other) {
    value += other.value;
  }
  __device__ __forceinline__ Sum from_lane(int distance) const {
    return {__shfl_xor_sync(ALL_LANES, value, distance)};
  }
};

// What takes a logit to what the mean takes from it.
template <typename C>
struct Mean {
  C largest, scale;  // the mean divided by the sum of exponentials

  __device__ __forceinline__ C of(C logit) const {
    return exponential(logit - largest) * scale;
  }
};

template <typename T, typename L>
struct SoftmaxGradient {
  using C = compute_t<T>;

  Inputs<T, L> in;
  Divisor blocks;  // of a batch element
  int queries;     // of a block
  const C* terms;  // (batch, queries, query_rows, row)
  L* logits;       // likewise, or null
  C* taken;        // (batch, blocks, camera_rows, row): what the means take from cameras' logits, or null

  // Where cameras' logits are combined, so are these sums.
  HOST_DEVICE int camera_rows() const {
    return in.combined == nullptr ? in.num_cams : 1;
  }
};

// The queries of a block.
struct Queries {
  int batch, count;
  int64_t first;
};

template <typename C>
struct Shared {
  Sum<C> partial[MOST_QUERIES][THREADS];
  Mean<C> means[MOST_QUERIES][WARP];  // of some groups

  __device__ Shared() {}
};

// The means of groups first_group, ..., which are no more than a warp's lanes.
template <typename T, typename L>
__device__ __forceinline__ void find_means(
    const SoftmaxGradient<T, L>& grad,
    const Queries& queries,
    int first_group,
    const Share<THREADS>& share,
    Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const auto& in = grad.in;
  const int64_t query_terms = static_cast<int64_t>(in.query_rows()) * in.row;
  const int samples = in.query_rows() * in.num_levels * in.num_points;
  const C* terms = grad.terms + queries.first * query_terms + first_group + share.group;
  C sums[MOST_QUERIES] = {};
#pragma unroll 4
  for (int sample = share.first; sample < samples; sample += share.step) {
#pragma unroll
    for (int i = 0; i < MOST_QUERIES; ++i) {
      sums[i] += i < queries.count ? terms[i * query_terms + sample * in.num_groups] : C(0);
    }
  }
  int left = 0;
#pragma unroll
  for (int i = 0; i < MOST_QUERIES; ++i) {
    if (i < queries.count) {
      left = share.put(Sum<C>{sums[i]}, shared.partial[i]);
    }
  }
  __syncthreads();
  const int query = threadIdx.x / share.count, group = threadIdx.x - query * share.count;
  if (query < queries.count) {
    const C* of_group = in.statistics + ((queries.first + query) * in.num_groups + first_group + group) * 2;
    const C largest = of_group[0], scale = 1 / of_group[1];
    shared.means[query][group] = {largest, share.merged(group, left, shared.partial[query]).value * scale};
  }
  __syncthreads();
}

// A place of the queries' logits where the cameras' are combined; returns what the means take from it.
template <typename T, typename L>
__device__ __forceinline__ compute_t<T> differentiate_combined(
    const SoftmaxGradient<T, L>& grad,
    const Queries& queries,
    int place,
    int group,
    const Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const auto& in = grad.in;
  const C combined = in.combined[static_cast<int64_t>(queries.batch) * in.row + place];
  C terms[MOST_QUERIES], logits[MOST_QUERIES];  // all loads before the first store, which may be to the terms' place
#pragma unroll
  for (int i = 0; i < MOST_QUERIES; ++i) {
    const int64_t at = (queries.first + min(i, queries.count - 1)) * in.row + place;
    terms[i] = grad.terms[at];
    logits[i] = to_compute(in.logits[at]);
  }
  C all_taken = 0;
#pragma unroll
  for (int i = 0; i < MOST_QUERIES; ++i) {
    if (i < queries.count) {
      const C taken = shared.means[i][group].of(logits[i] + combined);
      if (grad.logits != nullptr) {
        grad.logits[(queries.first + i) * in.row + place] = from_compute<L>(terms[i] - taken);
      }
      all_taken += taken;
    }
  }
  return all_taken;
}

// What a query's mean takes from a pair where pairs are left out, or have logits of their own.
template <typename T, typename L>
__device__ __forceinline__ compute_t<T> taken_from_pair(
    const Inputs<T, L>& in, const Query<T, L>& query, int cam, int place, const Mean<compute_t<T>>& mean) {
  const int point = place / in.num_groups % in.num_points;
  return query.hides(cam * in.num_points + point) ? compute_t<T>(0) : mean.of(query.logit(cam, in.row, place));
}

template <typename T, typename L>
__device__ __forceinline__ void differentiate_pairs(
    const SoftmaxGradient<T, L>& grad,
    const Queries& queries,
    int place,
    int group,
    compute_t<T>* all_taken,
    const Shared<compute_t<T>>& shared) {
  using C = compute_t<T>;
  const auto& in = grad.in;
  const bool by_camera = in.camera_logits != nullptr;
  for (int i = 0; grad.logits != nullptr && i < queries.count; ++i) {
    const Query<T, L> query(in, queries.first + i, queries.batch);
    C taken = 0;
    for (int cam = 0; cam < in.num_cams; ++cam) {
      taken += taken_from_pair(in, query, cam, place, shared.means[i][group]);
      if (!by_camera || cam == in.num_cams - 1) {
        const int64_t at = query.number * in.query_rows() * in.row + (by_camera ? 0 : cam * in.row) + place;
        grad.logits[at] = from_compute<L>(grad.terms[at] - taken);
        taken = 0;
      }
    }
  }
  for (int cam = 0; all_taken != nullptr && cam < in.num_cams; ++cam) {
    C taken = 0;
    for (int i = 0; i < queries.count; ++i) {
      const Query<T, L> query(in, queries.first + i, queries.batch);
      taken += taken_from_pair(in, query, cam, place, shared.means[i][group]);
    }
    all_taken[cam * in.row + place] = taken;
  }
}

template <typename T, typename L>
__global__ void __launch_bounds__(THREADS) subtract_means(const SoftmaxGradient<T, L> grad) {
  using C = compute_t<T>;
  __shared__ Shared<C> shared;
  const auto& in = grad.in;
  unsigned batch = blockIdx.x;
  const int first = grad.blocks.split(batch) * grad.queries;
  const Queries queries = {
      static_cast<int>(batch), min(grad.queries, in.queries.divisor - first),
      static_cast<int64_t>(batch) * in.queries.divisor + first};
  C* const taken =
      grad.taken == nullptr ? nullptr : grad.taken + static_cast<int64_t>(blockIdx.x) * grad.camera_rows() * in.row;
  for (int first_group = 0; first_group < in.num_groups; first_group += WARP) {
    const Share<THREADS> share(min(WARP, in.num_groups - first_group));
    find_means(grad, queries, first_group, share, shared);
    const int samples = in.num_levels * in.num_points, step = share.step * gridDim.y;
    for (int64_t at = share.first + static_cast<int64_t>(blockIdx.y) * share.step; at < samples; at += step) {
      const int sample = static_cast<int>(at);
      const int place = sample * in.num_groups + first_group + share.group;
      if (in.combined == nullptr) {
        differentiate_pairs(grad, queries, place, share.group, taken, shared);
        continue;
      }
      const C all = differentiate_combined(grad, queries, place, share.group, shared);
      if (taken != nullptr) {
        taken[place] = all;
      }
    }
    __syncthreads();
  }
}

// Rows that blocks have left for each batch element: (batch, count, rows, row).
template <typename C>
struct Parts {
  const C* first;
  int count, rows;

  // A slice's share of their sum at a place of a row.
  __device__ __forceinline__ C sum(int batch, int row_number, int row, int place, int slice) const {
    const C* at = first + (static_cast<int64_t>(batch) * count * rows + row_number) * row + place;
    C total = 0;
#pragma unroll 8
    for (int part = slice; part < count; part += SLICES) {
      total += at[static_cast<int64_t>(part) * rows * row];
    }
    return total;
  }
};

// The cameras' gradients from what blocks have left: a block takes WARP of their elements.
template <typename T, typename L>
__global__ void __launch_bounds__(WARP* SLICES) sum_cameras(
    const Inputs<T, L> in, const Parts<compute_t<T>> terms, const Parts<compute_t<T>> taken, int batches, L* sum) {
  using C = compute_t<T>;
  __shared__ C sums[SLICES][WARP], all_taken[SLICES][WARP];
  const int element = blockIdx.x * WARP + threadIdx.x, length = in.num_cams * in.row;
  const int cam = element / in.row, place = element - cam * in.row;
  for (int batch = blockIdx.y; batch < batches; batch += gridDim.y) {
    if (element < length) {
      sums[threadIdx.y][threadIdx.x] = terms.sum(batch, cam, in.row, place, threadIdx.y);
      all_taken[threadIdx.y][threadIdx.x] = taken.sum(batch, taken.rows == 1 ? 0 : cam, in.row, place, threadIdx.y);
    }
    __syncthreads();
    if (threadIdx.y == 0 && element < length) {
      C of_terms = 0, of_means = 0;
      for (int slice = 0; slice < SLICES; ++slice) {
        of_terms += sums[slice][threadIdx.x];
        of_means += all_taken[slice][threadIdx.x];
      }
      const int64_t at = static_cast<int64_t>(batch) * length + element;
      if (in.combined != nullptr) {  // the camera's share of what is taken from all of them together
        const C combined = in.combined[static_cast<int64_t>(batch) * in.row + place];
        of_means *= exponential(to_compute(in.camera_logits[at]) - combined);
      }
      sum[at] = from_compute<L>(of_terms - of_means);
    }
    __syncthreads();
  }
}

}  // namespace

template <typename T, typename L>
void differentiate_softmax(
    const Sizes& sizes,
    const Inputs<T, L>& in,
    const compute_t<T>* terms,
    const compute_t<T>* camera_parts,
    int64_t num_parts,
    L* grad_logits,
    L* grad_camera_logits,
    const Tensor& like,
    cudaStream_t stream) {
  using C = compute_t<T>;
  // A few blocks for each multiprocessor, where there are queries enough.
  const int64_t queries = std::clamp<int64_t>(
      sizes.batch * sizes.num_queries / resident_blocks(2, like.get_device_index()), 1, MOST_QUERIES);
  const int64_t blocks = (sizes.num_queries + queries - 1) / queries;
  SoftmaxGradient<T, L> grad = {in, Divisor(blocks), static_cast<int>(queries), terms, grad_logits, nullptr};
  std::optional<Tensor> taken;
  if (grad_camera_logits != nullptr) {
    taken = allocate(like, {sizes.batch, blocks, grad.camera_rows(), in.row});
    grad.taken = static_cast<C*>(taken->mutable_data_ptr());
  }
  const int64_t slices = in.shares.blocks.divisor == 1
      ? 1
      : std::clamp<int64_t>(resident_blocks(4, like.get_device_index()) / (sizes.batch * blocks), 1, MOST_BLOCKS);
  const dim3 grid(static_cast<unsigned>(sizes.batch * blocks), static_cast<unsigned>(slices));
  subtract_means<<<grid, THREADS, 0, stream>>>(grad);
  check_launch("subtract_means");
  if (grad_camera_logits != nullptr) {
    const int length = static_cast<int>(sizes.num_cams * sizes.camera_width());
    const dim3 cameras((length + WARP - 1) / WARP, std::min(sizes.batch, MOST_BLOCKS));
    const Parts<C> of_terms = {camera_parts, static_cast<int>(num_parts), static_cast<int>(sizes.num_cams)};
    const Parts<C> of_means = {grad.taken, static_cast<int>(blocks), grad.camera_rows()};
    sum_cameras<<<cameras, dim3(WARP, SLICES), 0, stream>>>(
        in, of_terms, of_means, static_cast<int>(sizes.batch), grad_camera_logits);
    check_launch("sum_cameras");
  }
}

#define INSTANTIATE(T, L)                                                                                          \
  template void differentiate_softmax(                                                                             \
      const Sizes&, const Inputs<T, L>&, const compute_t<T>*, const compute_t<T>*, int64_t, L*, L*, const Tensor&, \
      cudaStream_t);
INSTANTIATE(double, double)
INSTANTIATE(float, float)
INSTANTIATE(__half, __half)
INSTANTIATE(__half, float)
INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
INSTANTIATE(__nv_bfloat16, float)
#undef INSTANTIATE

}  // namespace reimplementation::feature_aggregation
