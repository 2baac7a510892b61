// Deformable feature aggregation on the CPU: threads share out the queries, once in the forward and once in the
// backward.
//
// Forward: a query's key points are projected, its logits turned into powers exp(logit - largest), which are the
// weights but for a factor a group, and its visible samples summed in one row of C sums. Nothing of that leaves the
// cache.
//
// Backward: powers and samples are found again. With w the weights and u their gradients, which are products of
// features with the output's gradient, a logit has the gradient w * (u - sum of w * u over the group). What cameras'
// logits get from all queries is summed over *chunks* of them, and then over the chunks: the same bits for any number
// of threads. The gradient of the features is that of deformable aggregation, from locations and weights that are
// written down for it.
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "aggregation/op.h"
#include "cpu/capability.h"
#include "feature_aggregation/cpu_query.h"
#include "feature_aggregation/op.h"

namespace reimplementation::feature_aggregation {
namespace {

// The outputs of queries [begin, end), numbered through the batch, and what the backward needs of their softmax.
template <typename Feature, typename Logit>
struct Forward {
  using T = Compute<Feature>;

  const Inputs<Feature, Logit>& inputs;
  Feature* output;  // (batch, num_queries, channels)
  T* statistics;    // (batch, num_queries, num_groups, 2)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = inputs.sizes;
    const int64_t group_channels = sizes.group_channels();
    Query<Feature, Logit> query(inputs);
    std::vector<T> total(sizes.channels), factors(sizes.num_groups);

    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / sizes.num_queries;
      query.see(batch, i % sizes.num_queries);
      query.template weigh<lanes>(batch, i % sizes.num_queries);
      for (int64_t group = 0; group < sizes.num_groups; ++group) {
        statistics[(i * sizes.num_groups + group) * 2] = query.largest[group];
        statistics[(i * sizes.num_groups + group) * 2 + 1] = query.sum[group];
        factors[group] = inputs.kept_scale / query.sum[group];
      }
      std::fill(total.begin(), total.end(), T(0));
      for (const Sample<T>& sample : query.samples) {
        Corners<const Feature*> rows;
        Corners<T> weights;
        for (int corner = 0; corner < 4; ++corner) {
          rows[corner] = inputs.row(batch, sample.row[corner]);
          weights[corner] = corner_weight(sample.x, sample.y, corner);
        }
        for (int64_t group = 0; group < sizes.num_groups; ++group) {
          const T weight = query.powers[sample.weights + group] * factors[group];
          const Corners<T> scale = {weight * weights[0], weight * weights[1], weight * weights[2], weight * weights[3]};
          add_corners<lanes>(total.data(), rows, scale, group * group_channels, group_channels);
        }
      }
      convert<lanes>(output + i * sizes.channels, total.data(), sizes.channels);
    }
  }
};

constexpr int64_t CHUNK = 16;  // queries whose share of the cameras' gradients is summed before it is written

inline int64_t chunks_of(const Sizes& sizes) {
  return (sizes.num_queries + CHUNK - 1) / CHUNK;
}

// Where the backward writes; null where nothing is needed.
template <typename T, typename Logit>
struct Gradients {
  T* key_points;
  Logit* logits;
  T* camera_logits;  // (batch, chunks, num_cams, camera_width)
  // What the features' gradient is made of: (batch, num_queries, num_cams, num_points), and before the points the
  // levels, behind them the groups.
  Location<T>* locations;
  T* weights;
};

// All but the gradient of the features, for chunks [begin, end), numbered through the batch.
template <typename Feature, typename Logit>
struct Backward {
  using T = Compute<Feature>;

  const Inputs<Feature, Logit>& inputs;
  const T* statistics;
  const T* grad_output;  // (batch, num_queries, channels)
  Gradients<T, Logit> gradients;

  // What a thread works in.
  struct Workspace {
    explicit Workspace(const Inputs<Feature, Logit>& inputs)
        : query(inputs),
          inverse_sum(query.tile),
          mean(query.tile),
          of_weights(query.powers.size()),
          of_logits(inputs.camera_logits == nullptr ? 0 : inputs.sizes.camera_width()),
          of_locations(query.locations.size()) {}

    Query<Feature, Logit> query;
    std::vector<T> inverse_sum, mean;  // like `Query::sum`
    std::vector<T> of_weights;         // like `Query::powers`; in the end of the logits, pair by pair
    std::vector<T> of_logits;          // of all cameras together
    std::vector<Location<T>> of_locations;
  };

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = inputs.sizes;
    Workspace work(inputs);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t batch = chunk / chunks_of(sizes), first = chunk % chunks_of(sizes) * CHUNK;
      T* of_cameras = nullptr;
      if (gradients.camera_logits != nullptr) {
        of_cameras = gradients.camera_logits + chunk * static_cast<int64_t>(work.of_weights.size());
        std::fill(of_cameras, of_cameras + work.of_weights.size(), T(0));
      }
      for (int64_t number = first; number < std::min(first + CHUNK, sizes.num_queries); ++number) {
        const int64_t i = batch * sizes.num_queries + number;
        find_again<lanes>(batch, i, work);
        if (gradients.locations != nullptr) {
          write_samples(i, work);
        }
        differentiate_samples<lanes>(batch, i, work);
        if (gradients.key_points != nullptr) {
          differentiate_projection(batch, i, work);
        }
        differentiate_logits<lanes>(i, work, of_cameras);
      }
    }
  }

 private:
  template <int lanes>
  C10_ALWAYS_INLINE void find_again(int64_t batch, int64_t i, Workspace& work) const {
    Query<Feature, Logit>& query = work.query;
    query.see(batch, i % inputs.sizes.num_queries);
    query.template weigh_again<lanes>(
        batch, i % inputs.sizes.num_queries, statistics + i * inputs.sizes.num_groups * 2);
    for (int64_t j = 0; j < query.tile; ++j) {
      work.inverse_sum[j] = 1 / query.sum[j];
    }
  }

  // The weights of visible samples, and a location that nobody sees for the others.
  void write_samples(int64_t i, const Workspace& work) const {
    const Query<Feature, Logit>& query = work.query;
    const int64_t pairs = static_cast<int64_t>(query.locations.size());
    for (int64_t pair = 0; pair < pairs; ++pair) {
      gradients.locations[i * pairs + pair] = query.counts[pair] ? query.locations[pair] : Location<T>{-1, -1};
    }
    for (const Sample<T>& sample : query.samples) {
      T* weights = gradients.weights + i * query.end() + sample.weights;
      for (int64_t group = 0; group < inputs.sizes.num_groups; ++group) {
        weights[group] = query.powers[sample.weights + group] * (inputs.kept_scale * work.inverse_sum[group]);
      }
    }
  }

  // The gradients of weights and locations.
  template <int lanes>
  C10_ALWAYS_INLINE void differentiate_samples(int64_t batch, int64_t i, Workspace& work) const {
    const Sizes& sizes = inputs.sizes;
    const int64_t group_channels = sizes.group_channels();
    const Query<Feature, Logit>& query = work.query;
    std::fill(work.of_weights.begin(), work.of_weights.end(), T(0));
    std::fill(work.of_locations.begin(), work.of_locations.end(), Location<T>{0, 0});
    std::fill(work.mean.begin(), work.mean.end(), T(0));
    for (const Sample<T>& sample : query.samples) {
      Corners<const Feature*> rows;
      for (int corner = 0; corner < 4; ++corner) {
        rows[corner] = inputs.row(batch, sample.row[corner]);
      }
      Corners<T> weighted = {};  // the sum over groups of weight and dot product
      for (int64_t group = 0; group < sizes.num_groups; ++group) {
        Corners<T> dot = {};
        add_dot_products<lanes>(dot, grad_output + i * sizes.channels, rows, group * group_channels, group_channels);
        const T weight = query.powers[sample.weights + group] * work.inverse_sum[group];
        T of_weight = 0;
        for (int corner = 0; corner < 4; ++corner) {
          of_weight += corner_weight(sample.x, sample.y, corner) * dot[corner];
          weighted[corner] += weight * inputs.kept_scale * dot[corner];
        }
        of_weight *= inputs.kept_scale;
        work.of_weights[sample.weights + group] = of_weight;
        work.mean[group] += weight * of_weight;
      }
      Location<T>& of_location = work.of_locations[sample.pair];
      for (int corner = 0; corner < 4; ++corner) {
        add_location_gradient(of_location.x, of_location.y, sample.x, sample.y, corner, weighted[corner]);
      }
    }
    query.repeat(work.mean);
  }

  void differentiate_projection(int64_t batch, int64_t i, const Workspace& work) const {
    const Sizes& sizes = inputs.sizes;
    const Cameras<T> cameras = inputs.cameras.of_sample(batch, sizes.num_cams);
    for (int64_t p = 0; p < sizes.num_points; ++p) {
      const T* point = inputs.key_points + (i * sizes.num_points + p) * 3;
      T gradient[3] = {};
      for (int64_t camera = 0; camera < sizes.num_cams; ++camera) {
        const int64_t pair = camera * sizes.num_points + p;
        if (work.query.counts[pair]) {
          const Location<T>& of_location = work.of_locations[pair];
          cameras.add_gradient(camera, {point[0], point[1], point[2]}, of_location.x, of_location.y, gradient);
        }
      }
      std::copy(gradient, gradient + 3, gradients.key_points + (i * sizes.num_points + p) * 3);
    }
  }

  template <int lanes>
  C10_ALWAYS_INLINE void differentiate_logits(int64_t i, Workspace& work, T* of_cameras) const {
    const Query<Feature, Logit>& query = work.query;
    T* of_pairs = work.of_weights.data();
    for (int64_t first = 0; first < query.end(); first += query.tile) {
      differentiate_softmax<lanes>(
          of_pairs + first, query.powers.data() + first, work.inverse_sum.data(), work.mean.data(),
          std::min(query.tile, query.end() - first));
    }
    query.set_hidden(of_pairs, 0);
    if (of_cameras != nullptr) {
      add_row<lanes>(of_cameras, of_pairs, query.end());
    }
    if (gradients.logits != nullptr && inputs.camera_logits == nullptr) {
      convert<lanes>(gradients.logits + i * query.end(), of_pairs, query.end());
    } else if (gradients.logits != nullptr) {
      const int64_t width = inputs.sizes.camera_width();
      std::fill(work.of_logits.begin(), work.of_logits.end(), T(0));
      for (int64_t first = 0; first < query.end(); first += width) {
        add_row<lanes>(work.of_logits.data(), of_pairs + first, width);
      }
      convert<lanes>(gradients.logits + i * width, work.of_logits.data(), width);
    }
  }
};

// The gradients of the cameras' logits of batch elements [begin, end), from those of the chunks; the first chunk's are
// lost.
template <typename T, typename Logit>
struct SumOfChunks {
  T* of_chunks;  // (batch, chunks, count)
  int64_t chunks, count;
  Logit* sum;  // (batch, count)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    for (int64_t batch = begin; batch < end; ++batch) {
      T* total = of_chunks + batch * chunks * count;
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        add_row<lanes>(total, total + chunk * count, count);
      }
      convert<lanes>(sum + batch * count, total, count);
    }
  }
};

// Calls `function` with the inputs in their types.
template <typename Function>
void with_inputs(
    const Sizes& sizes, const Operands& op, double attn_drop, bool visible_only, const Function& function) {
  const ReadableOperands readable(op);
  with_types("feature_maps", readable.features, readable.logits, [&](auto feature, auto logit) {
    using Feature = decltype(feature);
    using Logit = decltype(logit);
    using T = Compute<Feature>;
    function(
        Inputs<Feature, Logit>{
            sizes, read_levels(op.spatial_shape, op.scale_start_index, sizes.num_rows),
            static_cast<const Feature*>(readable.features.const_data_ptr()), readable.cameras.template cameras<T>(),
            static_cast<const T*>(readable.cameras.key_points.const_data_ptr()),
            static_cast<const Logit*>(readable.logits.const_data_ptr()),
            readable.camera_logits ? static_cast<const Logit*>(readable.camera_logits->const_data_ptr()) : nullptr,
            readable.keep ? static_cast<const bool*>(readable.keep->const_data_ptr()) : nullptr,
            static_cast<T>(readable.keep ? 1 / (1 - attn_drop) : 1), visible_only});
  });
}

template <typename Feature, typename Logit>
void run_forward(const Inputs<Feature, Logit>& inputs, const Tensor& output, const Tensor& statistics) {
  const Forward<Feature, Logit> kernel{
      inputs, static_cast<Feature*>(output.mutable_data_ptr()),
      static_cast<Compute<Feature>*>(statistics.mutable_data_ptr())};
  parallel_run(kernel, inputs.sizes.batch * inputs.sizes.num_queries, items_per_thread(inputs.work_of_query()));
}

// What the backward writes on the way to its results; of no element where that is not needed.
struct Written {
  Tensor locations;  // (batch, num_queries, num_points, num_cams, 2), the cameras before the points in memory
  Tensor
      weights;  // (batch, num_queries, num_points, num_cams, num_levels, num_groups), the points last but one in memory
  Tensor of_chunks;  // see `SumOfChunks`
};

Written allocate_written(const Tensor& like, const Sizes& sizes, bool samples, bool chunks) {
  const int64_t batch = sizes.batch, queries = sizes.num_queries, cams = sizes.num_cams, points = sizes.num_points;
  const int64_t levels = sizes.num_levels, groups = sizes.num_groups;
  Written written{allocate(like, {0}), allocate(like, {0}), allocate(like, {0})};
  if (samples) {
    written.locations = torch::stable::transpose(allocate(like, {batch, queries, cams, points, 2}), 2, 3);
    const Tensor weights = allocate(like, {batch, queries, cams, levels, points, groups});
    written.weights = torch::stable::transpose(torch::stable::transpose(weights, 3, 4), 2, 3);
  }
  if (chunks) {
    written.of_chunks = allocate(like, {batch, chunks_of(sizes), cams, sizes.camera_width()});
  }
  return written;
}

template <typename T>
T* data_or_null(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename Feature, typename Logit>
void run_backward(
    const Inputs<Feature, Logit>& inputs,
    const Tensor& grad_output,
    const Tensor& statistics,
    const Tensor& grad_points,
    const Tensor& grad_logits,
    const Tensor& grad_camera_logits,
    const Written& written) {
  using T = Compute<Feature>;
  const Sizes& sizes = inputs.sizes;
  const Backward<Feature, Logit> kernel{
      inputs,
      static_cast<const T*>(statistics.const_data_ptr()),
      static_cast<const T*>(grad_output.const_data_ptr()),
      {data_or_null<T>(grad_points), data_or_null<Logit>(grad_logits), data_or_null<T>(written.of_chunks),
       data_or_null<Location<T>>(written.locations), data_or_null<T>(written.weights)}};
  parallel_run(kernel, sizes.batch * chunks_of(sizes), items_per_thread(CHUNK * inputs.work_of_query()));
  if (written.of_chunks.numel() > 0) {
    const SumOfChunks<T, Logit> sum{
        data_or_null<T>(written.of_chunks), chunks_of(sizes), sizes.num_cams * sizes.camera_width(),
        data_or_null<Logit>(grad_camera_logits)};
    parallel_run(sum, sizes.batch, items_per_thread(sum.chunks * sum.count));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> forward_cpu(
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& key_points,
    const Tensor& projection_mat,
    const std::optional<Tensor>& image_wh,
    const Tensor& logits,
    const std::optional<Tensor>& camera_logits,
    const std::optional<Tensor>& keep,
    double attn_drop,
    bool visible_only) {
  const Operands op{feature_maps, spatial_shape, scale_start_index, key_points, projection_mat,
                    image_wh,     logits,        camera_logits,     keep};
  const Sizes sizes = check(op, attn_drop);
  const std::initializer_list<int64_t> output_shape = {sizes.batch, sizes.num_queries, sizes.channels};
  const std::initializer_list<int64_t> statistics_shape = {sizes.batch, sizes.num_queries, sizes.num_groups, 2};
  if (sizes.nothing_to_sample()) {
    return {allocate_zeros(feature_maps, output_shape), allocate_zeros(key_points, statistics_shape)};
  }
  const Tensor output = allocate(feature_maps, output_shape), statistics = allocate(key_points, statistics_shape);
  with_inputs(sizes, op, attn_drop, visible_only, [&](const auto& inputs) { run_forward(inputs, output, statistics); });
  return {output, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
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
  Tensor grad_features = allocate(feature_maps, {0});
  Tensor grad_points = contiguous_gradient(key_points, needs_key_points);
  Tensor grad_logits = contiguous_gradient(logits, needs_logits);
  Tensor grad_camera_logits = contiguous_gradient(camera_logits.value_or(logits), camera_logits && needs_camera_logits);
  if (sizes.nothing_to_sample()) {
    if (needs_feature_maps) {
      grad_features = allocate_zeros(feature_maps, feature_maps.sizes());
    }
    torch::stable::zero_(grad_points);
    torch::stable::zero_(grad_logits);
    torch::stable::zero_(grad_camera_logits);
    return {grad_features, grad_points, grad_logits, grad_camera_logits};
  }
  Written written = allocate_written(key_points, sizes, needs_feature_maps, grad_camera_logits.numel() > 0);
  const Tensor grad_rows = as_contiguous(as_type(grad_output, compute_type(feature_maps)));
  with_inputs(sizes, op, attn_drop, visible_only, [&](const auto& inputs) {
    run_backward(inputs, grad_rows, as_contiguous(statistics), grad_points, grad_logits, grad_camera_logits, written);
  });
  if (needs_feature_maps) {
    grad_features = std::get<0>(aggregation::backward_cpu(
        grad_output, feature_maps, spatial_shape, scale_start_index, written.locations, written.weights, true, false,
        false, deterministic));
  }
  return {grad_features, grad_points, grad_logits, grad_camera_logits};
}

}  // namespace reimplementation::feature_aggregation
