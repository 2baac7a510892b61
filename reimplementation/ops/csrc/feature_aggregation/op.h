// The arguments of deformable feature aggregation, checked: what the cpu and the cuda kernels start from.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <optional>
#include <tuple>

#include "points/project_points.h"
#include "shared/checks.h"
#include "shared/levels.h"
#include "shared/tensors.h"

namespace reimplementation::feature_aggregation {

using points::Cameras;
using points::Location;
using torch::stable::Tensor;

struct Operands {
  Tensor feature_maps, spatial_shape, scale_start_index, key_points, projection_mat;
  std::optional<Tensor> image_wh;
  Tensor logits;
  std::optional<Tensor> camera_logits, keep;
};

struct Sizes {
  int64_t batch, num_rows, channels;
  int64_t num_cams, num_levels;
  int64_t num_queries, num_points, num_groups;

  int64_t group_channels() const {
    return channels / num_groups;
  }
  // Logits of a query and camera.
  int64_t camera_width() const {
    return num_levels * num_points * num_groups;
  }
  // No sample exists: the output and every gradient are zero.
  bool nothing_to_sample() const {
    return std::min({batch, num_rows, channels, num_cams, num_levels, num_queries, num_points}) == 0;
  }
};

// Logits come as one term a query and one a camera, or as one for each pair of these. Without samples there are none to
// count the groups of.
inline int64_t count_groups(const Operands& op, int64_t num_cams, int64_t num_levels, int64_t num_points) {
  const int64_t samples = (op.camera_logits ? 1 : num_cams) * num_levels * num_points, width = op.logits.size(2);
  const int64_t groups = std::max<int64_t>(width / std::max<int64_t>(samples, 1), 1);
  STD_TORCH_CHECK(
      width == samples * groups, "logits: of a query there must be a multiple of ", samples,
      ", its samples in the cameras; got ", width);
  return groups;
}

inline Sizes check(const Operands& op, double attn_drop) {
  check_dim("feature_maps", op.feature_maps, 3);
  check_dim("spatial_shape", op.spatial_shape, 3);
  check_dim("key_points", op.key_points, 4);
  check_dim("logits", op.logits, 3);
  const int64_t batch = op.feature_maps.size(0), num_cams = op.spatial_shape.size(0);
  const int64_t num_levels = op.spatial_shape.size(1), num_points = op.key_points.size(2);
  const Sizes sizes{
      batch,
      op.feature_maps.size(1),
      op.feature_maps.size(2),
      num_cams,
      num_levels,
      op.key_points.size(1),
      num_points,
      count_groups(op, num_cams, num_levels, num_points)};
  check_shape("spatial_shape", op.spatial_shape, {num_cams, num_levels, 2});
  check_shape("scale_start_index", op.scale_start_index, {num_cams, num_levels});
  check_shape("key_points", op.key_points, {batch, sizes.num_queries, num_points, 3});
  check_shape("projection_mat", op.projection_mat, {batch, num_cams, 4, 4});
  check_shape("logits", op.logits, {batch, sizes.num_queries, op.logits.size(2)});
  STD_TORCH_CHECK(
      sizes.channels % sizes.num_groups == 0, "logits: num_groups must divide the ", sizes.channels,
      " channels; got num_groups=", sizes.num_groups);

  check_features("feature_maps", op.feature_maps);
  check_metadata("spatial_shape", op.spatial_shape, op.feature_maps);
  check_metadata("scale_start_index", op.scale_start_index, op.feature_maps);
  STD_TORCH_CHECK(
      op.key_points.scalar_type() == compute_type(op.feature_maps),
      "key_points must be float64 for float64 features, else float32");
  check_same_device("key_points", op.key_points, op.feature_maps);
  check_like("projection_mat", op.projection_mat, "key_points", op.key_points);
  if (op.image_wh) {
    check_shape("image_wh", *op.image_wh, {batch, num_cams, 2});
    check_like("image_wh", *op.image_wh, "key_points", op.key_points);
  }
  STD_TORCH_CHECK(
      op.logits.scalar_type() == op.feature_maps.scalar_type() ||
          op.logits.scalar_type() == compute_type(op.feature_maps),
      "logits must have the features' dtype or float32");
  check_same_device("logits", op.logits, op.feature_maps);
  if (op.camera_logits) {
    check_shape("camera_logits", *op.camera_logits, {batch, num_cams, op.logits.size(2)});
    check_like("camera_logits", *op.camera_logits, "logits", op.logits);
  }
  if (op.keep) {
    check_shape("keep", *op.keep, {batch, sizes.num_queries, num_cams, num_points});
    STD_TORCH_CHECK(op.keep->scalar_type() == torch::headeronly::ScalarType::Bool, "keep must be bool");
    check_same_device("keep", *op.keep, op.feature_maps);
  }
  STD_TORCH_CHECK(attn_drop >= 0 && attn_drop < 1, "attn_drop must be in [0, 1); got ", attn_drop);
  STD_TORCH_CHECK(
      sizes.num_rows <= INT_MAX && num_cams * num_points <= INT_MAX / 4 && sizes.channels <= INT_MAX / 8 &&
          num_cams * sizes.camera_width() <= INT_MAX / 4,
      "num_feat must be below 2^31, num_cams * num_levels * num_pts * num_groups below 2^29, C below 2^28");
  check_levels_fit(
      op.spatial_shape, op.scale_start_index, sizes.num_rows, {"spatial_shape", "scale_start_index", "num_feat"});
  return sizes;
}

inline void check_gradient(
    const Tensor& grad_output, const Tensor& statistics, const Tensor& feature_maps, const Sizes& sizes) {
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_queries, sizes.channels});
  STD_TORCH_CHECK(
      grad_output.scalar_type() == feature_maps.scalar_type(), "grad_output must have the dtype of feature_maps");
  check_same_device("grad_output", grad_output, feature_maps);
  check_shape("statistics", statistics, {sizes.batch, sizes.num_queries, sizes.num_groups, 2});
  STD_TORCH_CHECK(
      statistics.scalar_type() == compute_type(feature_maps), "statistics must be what the forward returned");
  check_same_device("statistics", statistics, feature_maps);
}

// What the kernels read, contiguous. It must outlive what reads it.
struct ReadableOperands {
  explicit ReadableOperands(const Operands& op)
      : features(as_contiguous(op.feature_maps)),
        cameras(op.key_points, op.projection_mat, op.image_wh),
        logits(as_contiguous(op.logits)),
        camera_logits(as_contiguous(op.camera_logits)),
        keep(as_contiguous(op.keep)) {}

  const Tensor features;
  const points::ProjectPointsOperands cameras;  // and the key points
  const Tensor logits;
  const std::optional<Tensor> camera_logits, keep;
};

// One implementation per device; the CPU's backward gives the same bits every time, asked for or not. Beside the output
// the forward returns statistics (batch, num_queries, num_groups, 2) for the backward: a number that no logit exceeds,
// such as the largest, and the sum of the exponentials of the logits less that number. The backward returns the
// gradients of features, key points, logits and camera logits; one that is not needed has no elements.
using ForwardFunction = std::tuple<Tensor, Tensor>(
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
    bool visible_only);

using BackwardFunction = std::tuple<Tensor, Tensor, Tensor, Tensor>(
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
    bool deterministic);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;

}  // namespace reimplementation::feature_aggregation
