// The module's forward.
#include <torch/csrc/stable/ops.h>

#include "module/layers.h"
#include "module/op.h"

namespace reimplementation::module {

namespace {

Tensor unless_large(const Tensor& tensor, int64_t large) {
  return tensor.numel() > large ? allocate(tensor, {0}) : tensor;
}

void place_key_points(const Operands& operands, const Kernels& kernels, Steps& steps) {
  if (!operands.fix_scale) {
    return;
  }
  OptionalTensor learned;
  if (operands.points_weight) {
    learned = steps.learned = linear(operands.instance_feature, *operands.points_weight, operands.points_bias);
  }
  steps.key_points = kernels.box_key_points(operands.places, *operands.fix_scale, learned);
}

void encode_cameras(const Operands& operands, const Kernels& kernels, Steps& steps) {
  if (!operands.has_encoder()) {
    return;
  }
  Tensor rows = matrices_of(operands.projection_mat);
  for (int i = 0; i < LAYERS; ++i) {
    const OptionalTensor* const parameter = &operands.encoder[i * PARAMETERS];
    rows = steps.camera_embed[i] = kernels.linear_relu_norm(
        rows, *parameter[0], *parameter[1], *parameter[2], *parameter[3], operands.epsilons[i]);
  }
  steps.camera_logits = linear(rows, operands.weights_weight, std::nullopt);
}

// The output projection of `features`, and what the residual mode makes of it and the instance feature.
Tensor project(const Operands& operands, const Tensor& features, const std::string& residual) {
  const Tensor& feature = operands.instance_feature;
  if (residual != "cat") {
    const Tensor output = linear(features, operands.output_weight, operands.output_bias);
    return residual == "add" ? sum_of(output, feature) : output;
  }
  const int64_t channels = feature.size(2), width = 2 * channels;
  const Tensor both = allocate(feature, {feature.size(0), feature.size(1), width});
  const int64_t rows = feature.size(0) * feature.size(1);
  multiply_and_add(
      operands.output_bias, rows_of(features), transposed(operands.output_weight),
      strided_view<2>(both, {rows, channels}, {width, 1}));
  Tensor beside = strided_view<2>(both, {rows, channels}, {width, 1}, channels);
  torch::stable::copy_(beside, rows_of(feature));
  return both;
}

}  // namespace

Forward forward(
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
    std::vector<double> epsilons,
    double attn_drop,
    std::string residual,
    int64_t large) {
  const Tensor feature = as_contiguous(instance_feature);
  const EncoderParameters encoder{first_weight,  first_bias,  first_norm_weight,  first_norm_bias,
                                  second_weight, second_bias, second_norm_weight, second_norm_bias};
  const Operands operands{feature,           places,         anchor_embed,   feature_maps, spatial_shape,
                          scale_start_index, projection_mat, image_wh,       keep,         fix_scale,
                          points_weight,     points_bias,    weights_weight, weights_bias, output_weight,
                          output_bias,       encoder,        epsilons,       attn_drop};
  check(operands);
  const Kernels& kernels = kernels_for(feature);
  const Tensor none = allocate(feature, {0});
  Steps steps{none, none, none, none, none, none, none, {none, none}};
  place_key_points(operands, kernels, steps);
  const Tensor query = query_of(operands);
  const Tensor logits = logits_of(operands, query);
  encode_cameras(operands, kernels, steps);
  Tensor features;
  std::tie(features, steps.statistics) = kernels.aggregate(
      feature_maps, spatial_shape, scale_start_index, fix_scale ? steps.key_points : places, projection_mat, image_wh,
      logits, if_there(steps.camera_logits, operands.has_encoder()), keep, attn_drop, false);
  steps.features = as_type(features, feature.scalar_type());
  const Tensor output = project(operands, steps.features, residual);
  return {
      output,
      steps.learned,
      steps.key_points,
      unless_large(query, large),
      unless_large(logits, large),
      steps.camera_logits,
      steps.features,
      steps.statistics,
      steps.camera_embed[0],
      steps.camera_embed[1]};
}

}  // namespace reimplementation::module
