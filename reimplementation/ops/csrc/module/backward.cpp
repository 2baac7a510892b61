// The module's backward: the derivatives of its layers, from the last to the first. Gradients that meet in a tensor are added by
// the products that make them.
#include <torch/csrc/stable/ops.h>

#include <array>

#include "module/layers.h"
#include "module/op.h"

namespace reimplementation::module {

namespace {

// Of a linear layer's weight and bias, from that of its output and from its input, as rows.
struct LinearGradients {
  Tensor weight, bias;
};

LinearGradients of_linear(const Kernels& kernels, const Tensor& of_output, const Tensor& input) {
  // The sum first: a thread whose first call on a GPU is cuBLAS's is warned of that by PyTorch.
  const Tensor of_bias = kernels.sum_rows(of_output);
  return {product(transposed(of_output), input), of_bias};
}

// The gradient of the output projection's result, as rows, and of the instance feature beside it, which has no elements where
// there is none.
struct OutputGradients {
  Tensor projected, residual;
};

OutputGradients split(const Tensor& grad_output, const Tensor& none, const std::string& residual) {
  const Tensor rows = rows_of(grad_output);
  if (residual != "cat") {
    return {rows, residual == "add" ? rows : none};
  }
  const int64_t channels = rows.size(1) / 2;
  auto half = [&](int64_t first) { return strided_view<2>(rows, {rows.size(0), channels}, {rows.size(1), 1}, first); };
  return {half(0), half(channels)};
}

// What flows from the key points to the anchors and to the layer of the learned places, and on to the feature.
struct PointGradients {
  Tensor places;
  LinearGradients learned;
};

PointGradients of_points(
    const Operands& operands, const Kernels& kernels, const Steps& steps, const Tensor& gradient, Tensor& of_feature) {
  const Tensor none = allocate(gradient, {0});
  if (!operands.fix_scale) {
    return {gradient, {none, none}};
  }
  const bool is_learned = operands.points_weight.has_value();
  const auto [of_anchors, of_logits] = kernels.box_key_points_backward(
      gradient, operands.places, *operands.fix_scale, if_there(steps.learned, is_learned));
  if (!is_learned) {
    return {of_anchors, {none, none}};
  }
  const Tensor rows = rows_of(of_logits), sum = allocate(of_feature, of_feature.sizes());
  multiply_and_add(of_feature, rows, *operands.points_weight, sum);  // not in place: it may be another's gradient
  of_feature = sum;
  return {of_anchors, of_linear(kernels, rows, rows_of(operands.instance_feature))};
}

using EncoderGradients = std::array<Tensor, LAYERS * PARAMETERS>;

// From the gradient of its output.
EncoderGradients of_encoder(const Operands& operands, const Kernels& kernels, const Steps& steps, Tensor gradient) {
  EncoderGradients found;
  for (int i = LAYERS - 1; i >= 0; --i) {
    const OptionalTensor* const parameter = &operands.encoder[i * PARAMETERS];
    const Tensor input = i > 0 ? steps.camera_embed[i - 1] : matrices_of(operands.projection_mat);
    Tensor* const to = &found[i * PARAMETERS];
    std::tie(gradient, to[0], to[1], to[2], to[3]) = kernels.linear_relu_norm_backward(
        gradient, input, *parameter[0], *parameter[1], *parameter[2], *parameter[3], operands.epsilons[i], i > 0);
  }
  return found;
}

}  // namespace

Gradients backward(
    const Tensor& grad_output,
    const Tensor& instance_feature,
    const Tensor& places,
    const Tensor& anchor_embed,
    const Tensor& feature_maps,
    const Tensor& spatial_shape,
    const Tensor& scale_start_index,
    const Tensor& projection_mat,
    const OptionalTensor& image_wh,
    const OptionalTensor& keep,
    const OptionalTensor& fix_scale,
    const OptionalTensor& points_weight,
    const OptionalTensor& points_bias,
    const Tensor& weights_weight,
    const Tensor& weights_bias,
    const Tensor& output_weight,
    const Tensor& output_bias,
    const OptionalTensor& first_weight,
    const OptionalTensor& first_bias,
    const OptionalTensor& first_norm_weight,
    const OptionalTensor& first_norm_bias,
    const OptionalTensor& second_weight,
    const OptionalTensor& second_bias,
    const OptionalTensor& second_norm_weight,
    const OptionalTensor& second_norm_bias,
    const Tensor& learned,
    const Tensor& key_points,
    const Tensor& query,
    const Tensor& logits,
    const Tensor& camera_logits,
    const Tensor& features,
    const Tensor& statistics,
    const Tensor& first_camera_embed,
    const Tensor& camera_embed,
    std::vector<double> epsilons,
    double attn_drop,
    std::string residual,
    bool needs_feature_maps,
    bool needs_points,
    bool needs_encoder,
    bool deterministic) {
  const Tensor feature = as_contiguous(instance_feature);
  const EncoderParameters encoder{first_weight,  first_bias,  first_norm_weight,  first_norm_bias,
                                  second_weight, second_bias, second_norm_weight, second_norm_bias};
  const Operands operands{feature,           places,         anchor_embed,   feature_maps, spatial_shape,
                          scale_start_index, projection_mat, image_wh,       keep,         fix_scale,
                          points_weight,     points_bias,    weights_weight, weights_bias, output_weight,
                          output_bias,       encoder,        epsilons,       attn_drop};
  check(operands);
  const int64_t batch = feature.size(0), queries = feature.size(1), channels = feature.size(2);
  check_shape("grad_output", grad_output, {batch, queries, residual == "cat" ? 2 * channels : channels});
  const Kernels& kernels = kernels_for(feature);
  const bool has_encoder = operands.has_encoder();
  const Steps steps{
      learned,
      key_points,
      query.numel() > 0 ? query : query_of(operands),
      logits,
      camera_logits,
      features,
      statistics,
      {first_camera_embed, camera_embed}};
  const Tensor none = allocate(feature, {0});

  const OutputGradients of_output = split(as_contiguous(grad_output), none, residual);
  const LinearGradients of_projection = of_linear(kernels, of_output.projected, rows_of(features));
  const Tensor of_features = product(of_output.projected, output_weight);

  const auto [of_maps, of_key_points, of_logits, of_camera_logits] = kernels.aggregate_backward(
      as_type(with_batch_of(of_features, feature), feature_maps.scalar_type()), feature_maps, spatial_shape,
      scale_start_index, fix_scale ? key_points : places, projection_mat, image_wh,
      logits.numel() > 0 ? logits : logits_of(operands, steps.query), if_there(camera_logits, has_encoder), keep,
      statistics, attn_drop, false, needs_feature_maps, needs_points, true, has_encoder, deterministic);

  const Tensor logit_rows = rows_of(of_logits);
  const LinearGradients of_weights = of_linear(kernels, logit_rows, rows_of(steps.query));
  EncoderGradients of_cameras;
  of_cameras.fill(none);
  if (has_encoder) {
    const Tensor rows = rows_of(of_camera_logits);
    multiply_and_add(of_weights.weight, transposed(rows), rows_of(camera_embed), of_weights.weight);
    if (needs_encoder) {
      of_cameras = of_encoder(operands, kernels, steps, with_batch_of(product(rows, weights_weight), projection_mat));
    }
  }

  const Tensor of_query = product(logit_rows, weights_weight);
  Tensor of_feature = of_output.residual.numel() > 0 ? sum_of(of_query, of_output.residual) : of_query;
  PointGradients of_places{none, {none, none}};
  if (needs_points) {
    of_places = of_points(operands, kernels, steps, of_key_points, of_feature);
  }
  if (of_feature.get() == of_query.get()) {  // who adds to one gradient in place must not change the other
    of_feature = copied(of_query, of_query.scalar_type());
  }
  auto shaped = [&](const Tensor& rows) { return with_batch_of(rows, feature); };
  const auto& c = of_cameras;
  return {
      shaped(of_feature),
      of_places.places,
      shaped(of_query),
      of_maps,
      of_places.learned.weight,
      of_places.learned.bias,
      of_weights.weight,
      of_weights.bias,
      of_projection.weight,
      of_projection.bias,
      c[0],
      c[1],
      c[2],
      c[3],
      c[4],
      c[5],
      c[6],
      c[7]};
}

}  // namespace reimplementation::module
