// Deformable aggregation on the CPU.
//
// A sample is one visible (camera, level, point) of a query: four pixels, i.e. four rows of C features. The arithmetic
// is small; what takes the time is reading those rows from beyond the cache. A query's samples are therefore listed
// first, camera by camera and level by level, so that neighbours in the list often share rows, and the loop that reads
// them holds nothing but loads and multiply-adds.
//
// Forward: threads share out the queries. Each sums its query's samples in one row of C sums.
//
// Backward, without atomics and with the same bits for any number of threads:
// - gradients of weights and locations: threads share out the queries and read the features as the forward does;
// - gradient of the features: the samples' corners are sorted by the row that they fall in (a counting sort, stable, so
//   that a row's list is in the order of the queries), and threads share out the rows. Each row is summed in the cache
//   from rows of grad_output, which is small, and written once.
#include "aggregation/op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "shared/footprint.h"
#include "cpu/capability.h"
#include "cpu/operands.h"
#include "cpu/pages.h"
#include "cpu/rows.h"
#include "cpu/vector.h"

namespace reimplementation::aggregation {

using namespace cpu;

namespace {

template <typename T>
struct Sample {
  int64_t point;
  int64_t camera;
  int64_t level;
  Axis<T> x;
  Axis<T> y;
  Corners<int> row;

  T corner(int i) const {
    return corner_weight(x, y, i);
  }
};

// What the forward and the backward read.
template <typename Feature, typename Weight>
struct Operands {
  using T = Compute<Feature>;

  Sizes sizes;
  std::vector<Level> levels;  // (num_cams, num_levels)
  const Feature* features;    // (batch, num_rows, channels)
  View<const T, 5> location;
  View<const Weight, 6> weights;

  int64_t group_channels() const {
    return sizes.channels / sizes.num_groups;
  }

  // The features at a sample's corners.
  Corners<const Feature*> rows_of(int64_t batch, const Sample<T>& sample) const {
    Corners<const Feature*> rows;
    for (int corner = 0; corner < 4; ++corner) {
      rows[corner] = features + (batch * sizes.num_rows + sample.row[corner]) * sizes.channels;
    }
    return rows;
  }

  // The group weights of a sample, `weights.stride(5)` apart.
  const Weight* weights_of(int64_t batch, int64_t query, const Sample<T>& sample) const {
    return weights.at(batch, query, sample.point, sample.camera, sample.level);
  }

  // Replaces `samples` by those of one query.
  void list_samples(int64_t batch, int64_t query, std::vector<Sample<T>>& samples) const {
    samples.clear();
    for (int64_t camera = 0; camera < sizes.num_cams; ++camera) {
      for (int64_t level = 0; level < sizes.num_levels; ++level) {
        const Level& shape = levels[camera * sizes.num_levels + level];
        if (shape.empty()) {
          continue;
        }
        for (int64_t point = 0; point < sizes.num_points; ++point) {
          const T* xy = location.at(batch, query, point, camera);
          const T x = xy[0];
          const T y = xy[location.stride(4)];
          if (inside_unit_square(x, y)) {
            samples.push_back(sample_at(x, y, shape, point, camera, level));
          }
        }
      }
    }
  }

 private:
  static Sample<T> sample_at(T x, T y, const Level& shape, int64_t point, int64_t camera, int64_t level) {
    const Axis<T> column = bilinear_axis(pixel_position(x, shape.width), shape.width);
    const Axis<T> line = bilinear_axis(pixel_position(y, shape.height), shape.height);
    const int first = shape.start + line.index[0] * shape.width;
    const int second = shape.start + line.index[1] * shape.width;
    const Corners<int> rows = {
        first + column.index[0], first + column.index[1], second + column.index[0], second + column.index[1]};
    return {point, camera, level, column, line, rows};
  }
};

// The output of queries [begin, end), numbered through the batch.
template <typename Feature, typename Weight>
struct Forward {
  using T = Compute<Feature>;

  const Operands<Feature, Weight>& operands;
  Feature* output;  // (batch, num_queries, channels)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = operands.sizes;
    const int64_t group_channels = operands.group_channels();
    const int64_t weight_stride = operands.weights.stride(5);
    std::vector<Sample<T>> samples;
    std::vector<T> sum(sizes.channels);

    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / sizes.num_queries;
      const int64_t query = i % sizes.num_queries;
      operands.list_samples(batch, query, samples);
      std::fill(sum.begin(), sum.end(), T(0));
      for (const Sample<T>& sample : samples) {
        const Corners<const Feature*> rows = operands.rows_of(batch, sample);
        const Weight* weight = operands.weights_of(batch, query, sample);
        for (int64_t group = 0; group < sizes.num_groups; ++group) {
          const T group_weight = static_cast<T>(weight[group * weight_stride]);
          const Corners<T> scale = {
              group_weight * sample.corner(0), group_weight * sample.corner(1), group_weight * sample.corner(2),
              group_weight * sample.corner(3)};
          add_corners<lanes>(sum.data(), rows, scale, group * group_channels, group_channels);
        }
      }
      convert<lanes>(output + i * sizes.channels, sum.data(), sizes.channels);
    }
  }
};

// The gradients of the weights and locations of queries [begin, end), numbered through the batch. Both were zeroed.
template <typename Feature, typename Weight>
struct BackwardOfSamples {
  using T = Compute<Feature>;

  const Operands<Feature, Weight>& operands;
  const T* grad_output;  // (batch, num_queries, channels)
  std::optional<View<T, 5>> grad_location;
  std::optional<View<Weight, 6>> grad_weights;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = operands.sizes;
    const int64_t group_channels = operands.group_channels();
    const int64_t weight_stride = operands.weights.stride(5);
    std::vector<Sample<T>> samples;

    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / sizes.num_queries;
      const int64_t query = i % sizes.num_queries;
      operands.list_samples(batch, query, samples);
      for (const Sample<T>& sample : samples) {
        const Corners<const Feature*> rows = operands.rows_of(batch, sample);
        const Weight* weight = operands.weights_of(batch, query, sample);
        Corners<T> weighted = {};  // the sum over groups of weight and dot product
        for (int64_t group = 0; group < sizes.num_groups; ++group) {
          Corners<T> dot = {};
          add_dot_products<lanes>(dot, grad_output + i * sizes.channels, rows, group * group_channels, group_channels);
          T grad_weight = 0;
          for (int corner = 0; corner < 4; ++corner) {
            grad_weight += sample.corner(corner) * dot[corner];
            weighted[corner] += static_cast<T>(weight[group * weight_stride]) * dot[corner];
          }
          if (grad_weights) {
            *grad_weights->at(batch, query, sample.point, sample.camera, sample.level, group) =
                static_cast<Weight>(grad_weight);
          }
        }
        if (grad_location) {
          T* grad_xy = grad_location->at(batch, query, sample.point, sample.camera);
          for (int corner = 0; corner < 4; ++corner) {
            add_location_gradient(
                grad_xy[0], grad_xy[grad_location->stride(4)], sample.x, sample.y, corner, weighted[corner]);
          }
        }
      }
    }
  }
};

// About how many multiplications a query takes.
int64_t work_of_query(const Sizes& sizes) {
  return sizes.num_points * sizes.num_levels * sizes.channels;
}

// A corner of a sample, as the row that it falls in sees it.
template <typename T, typename Weight>
struct Hit {
  const Weight* weights;
  const T* grad_output;
  T scale;
};

// The hits of one batch element, row by row and within a row in the order of `list_samples` and of the queries.
template <typename Feature, typename Weight>
class HitsByRow {
 public:
  using T = Compute<Feature>;

  HitsByRow(const Operands<Feature, Weight>& operands, const T* grad_output, int64_t batch)
      : first_(operands.sizes.num_rows + 1) {
    const int64_t num_rows = operands.sizes.num_rows;
    const int64_t num_queries = operands.sizes.num_queries;
    const int64_t channels = operands.sizes.channels;
    constexpr int64_t most_chunks = 16;  // bounds the memory of the counters
    const int64_t chunks = std::min<int64_t>(
        {torch::stable::get_num_threads(), shares_of(num_queries, work_of_query(operands.sizes)), most_chunks});

    // One counter per chunk of queries and row: first the number of hits, then the place of the next one.
    std::vector<int64_t> counters(chunks * num_rows);
    const auto for_each_hit = [&](const auto& action) {
      torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        std::vector<Sample<T>> samples;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t last = (chunk + 1) * num_queries / chunks;
          for (int64_t query = chunk * num_queries / chunks; query < last; ++query) {
            operands.list_samples(batch, query, samples);
            for (const Sample<T>& sample : samples) {
              for (int corner = 0; corner < 4; ++corner) {
                if (sample.corner(corner) != 0) {
                  action(query, sample, corner, counters[chunk * num_rows + sample.row[corner]]);
                }
              }
            }
          }
        }
      });
    };

    for_each_hit([](int64_t, const Sample<T>&, int, int64_t& count) { ++count; });
    int64_t total = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      first_[row] = total;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        total += std::exchange(counters[chunk * num_rows + row], total);
      }
    }
    first_[num_rows] = total;
    hits_.reset(new Hit<T, Weight>[total]);
    for_each_hit([&](int64_t query, const Sample<T>& sample, int corner, int64_t& place) {
      hits_[place++] = {
          operands.weights_of(batch, query, sample), grad_output + (batch * num_queries + query) * channels,
          sample.corner(corner)};
    });
  }

  const Hit<T, Weight>* begin(int64_t row) const {
    return hits_.get() + first_[row];
  }

  const Hit<T, Weight>* end(int64_t row) const {
    return hits_.get() + first_[row + 1];
  }

  // How many hits it takes as long to add as all of them, and to write the rows.
  int64_t cost() const {
    return first_.back() + writing * num_rows();
  }

  // The first row of share number `share`, where `shares` contiguous shares of the rows take about the same time each;
  // the number of rows for share number `shares`.
  int64_t first_row_of_share(int64_t share, int64_t shares) const {
    const int64_t wanted = cost() * share / shares;
    const auto found = std::partition_point(first_.begin(), first_.end(), [&](const int64_t& first) {
      const int64_t row = &first - first_.data();
      return first + writing * row < wanted;
    });
    return found - first_.begin();
  }

 private:
  static constexpr int64_t writing = 2;  // writing a row takes about as long as adding so many hits

  int64_t num_rows() const {
    return static_cast<int64_t>(first_.size()) - 1;
  }

  std::vector<int64_t> first_;
  std::unique_ptr<Hit<T, Weight>[]> hits_;
};

// The gradient of one batch element's features: the rows of shares [begin, end).
template <typename Feature, typename Weight>
struct BackwardOfFeatures {
  using T = Compute<Feature>;

  const Operands<Feature, Weight>& operands;
  const HitsByRow<Feature, Weight>& hits;
  int64_t shares;
  Feature* grad_features;  // (num_rows, channels)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = operands.sizes;
    const int64_t group_channels = operands.group_channels();
    const int64_t weight_stride = operands.weights.stride(5);
    std::vector<T> sum(sizes.channels);

    const int64_t last = hits.first_row_of_share(end, shares);
    for (int64_t row = hits.first_row_of_share(begin, shares); row < last; ++row) {
      std::fill(sum.begin(), sum.end(), T(0));
      for (const Hit<T, Weight>* hit = hits.begin(row); hit != hits.end(row); ++hit) {
        for (int64_t group = 0; group < sizes.num_groups; ++group) {
          add_scaled<lanes>(
              sum.data() + group * group_channels, hit->grad_output + group * group_channels,
              hit->scale * static_cast<T>(hit->weights[group * weight_stride]), group_channels);
        }
      }
      convert<lanes>(grad_features + row * sizes.channels, sum.data(), sizes.channels);
    }
  }
};

template <typename Feature, typename Weight>
void forward(const Operands<Feature, Weight>& operands, const Tensor& output) {
  const Sizes& sizes = operands.sizes;
  const Forward<Feature, Weight> kernel{operands, static_cast<Feature*>(output.mutable_data_ptr())};
  parallel_run(kernel, sizes.batch * sizes.num_queries, items_per_thread(work_of_query(sizes)));
}

template <typename Feature, typename Weight>
void backward_of_samples(
    const Operands<Feature, Weight>& operands,
    const Tensor& grad_output,
    const Tensor& grad_location,
    const Tensor& grad_weights) {
  using T = Compute<Feature>;
  const Sizes& sizes = operands.sizes;
  BackwardOfSamples<Feature, Weight> kernel{operands, static_cast<const T*>(grad_output.const_data_ptr()), {}, {}};
  if (grad_location.numel() > 0) {
    kernel.grad_location.emplace(grad_location);
  }
  if (grad_weights.numel() > 0) {
    kernel.grad_weights.emplace(grad_weights);
  }
  parallel_run(kernel, sizes.batch * sizes.num_queries, items_per_thread(work_of_query(sizes)));
}

template <typename Feature, typename Weight>
void backward_of_features(
    const Operands<Feature, Weight>& operands, const Tensor& grad_output, const Tensor& grad_features) {
  const Sizes& sizes = operands.sizes;
  const auto* grad_output_rows = static_cast<const Compute<Feature>*>(grad_output.const_data_ptr());
  Feature* grad_rows = static_cast<Feature*>(grad_features.mutable_data_ptr());
  advise_huge_pages(grad_rows, grad_features.numel() * sizeof(Feature));
  for (int64_t batch = 0; batch < sizes.batch; ++batch) {
    const HitsByRow<Feature, Weight> hits(operands, grad_output_rows, batch);
    const int64_t shares = std::min<int64_t>(torch::stable::get_num_threads(), shares_of(hits.cost(), sizes.channels));
    const BackwardOfFeatures<Feature, Weight> kernel{
        operands, hits, shares, grad_rows + batch * sizes.num_rows * sizes.channels};
    parallel_run(kernel, shares, 1);
  }
}

// Calls `function` with the operands in their types.
template <typename Function>
void with_operands(
    const Sizes& sizes,
    const std::vector<Level>& levels,
    const Tensor& features,
    const Tensor& sampling_location,
    const Tensor& weights,
    const Function& function) {
  with_types("feature_maps", features, weights, [&](auto feature, auto weight) {
    using Feature = decltype(feature);
    using Weight = decltype(weight);
    function(
        Operands<Feature, Weight>{
            sizes, levels, static_cast<const Feature*>(features.const_data_ptr()),
            View<const Compute<Feature>, 5>(sampling_location), View<const Weight, 6>(weights)});
  });
}

}  // namespace

Tensor forward_cpu(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights) {
  const Sizes sizes = check(feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  const std::vector<Level> levels = read_levels(spatial_shape, scale_start_index, sizes.num_rows);
  if (sizes.nothing_to_sample()) {
    return allocate_zeros(feature_maps, {sizes.batch, sizes.num_queries, sizes.channels});
  }
  const Tensor features = as_contiguous(feature_maps);
  const Tensor output = allocate(features, {sizes.batch, sizes.num_queries, sizes.channels});
  with_operands(
      sizes, levels, features, sampling_location, weights, [&](const auto& operands) { forward(operands, output); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_output,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& sampling_location,
    const Tensor& weights,
    bool needs_feature_maps,
    bool needs_sampling_location,
    bool needs_weights,
    bool /*deterministic*/) {
  const Sizes sizes = check(feature_maps, spatial_shape, scale_start_index, sampling_location, weights);
  check_gradient(grad_output, feature_maps, sizes);
  const std::vector<Level> levels = read_levels(spatial_shape, scale_start_index, sizes.num_rows);

  const Tensor features = as_contiguous(feature_maps);
  Tensor grad_features = gradient_of(features, needs_feature_maps);
  Tensor grad_location = zero_gradient_of(sampling_location, needs_sampling_location);
  Tensor grad_weights = zero_gradient_of(weights, needs_weights);
  if (sizes.nothing_to_sample()) {
    torch::stable::zero_(grad_features);
    return {grad_features, grad_location, grad_weights};
  }

  const Tensor grad_rows = as_contiguous(as_type(grad_output, compute_type(features)));
  with_operands(sizes, levels, features, sampling_location, weights, [&](const auto& operands) {
    if (needs_feature_maps) {
      backward_of_features(operands, grad_rows, grad_features);
    }
    if (needs_sampling_location || needs_weights) {
      backward_of_samples(operands, grad_rows, grad_location, grad_weights);
    }
  });
  return {grad_features, grad_location, grad_weights};
}

}  // namespace reimplementation::aggregation
