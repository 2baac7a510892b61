// DeformableFeatureAggregation, from a query and its anchor to its new feature, as two operators: all of its layers' kernels one
// after the other, and all of their derivatives. At batch 1 the module's time is the host's, and here nothing but the launches is
// left of it: no call of a module, of the dispatcher, or of autograd between them.
//
//   key points = box_key_points(anchor, fixed places, linear(feature)), or they are given
//   logits = linear(feature + embedding), and the cameras' = linear_relu_norm twice of their matrices, times the same weight
//   output = linear(deformable_feature_aggregation(...)), plus the feature, or beside it
//
// All tensors are of one type, float32 or float64, but for integers, and feature maps, which may be in half precision.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace reimplementation::module {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int LAYERS = 2;      // of the camera encoder, where there is one
constexpr int PARAMETERS = 4;  // of each: weight, bias, and these of the norm

using EncoderParameters = std::array<OptionalTensor, LAYERS * PARAMETERS>;

// What a call reads. Where key points are placed in boxes, `places` is anchors and `fix_scale` is there; else it is key points.
struct Operands {
  const Tensor& instance_feature;  // (batch, queries, channels)
  const Tensor& places;
  const Tensor& anchor_embed;  // that broadcasts to the feature
  const Tensor& feature_maps;
  const Tensor& spatial_shape;
  const Tensor& scale_start_index;
  const Tensor& projection_mat;  // (batch, cameras, 4, 4)
  const OptionalTensor& image_wh;
  const OptionalTensor& keep;
  const OptionalTensor& fix_scale;
  const OptionalTensor& points_weight;
  const OptionalTensor& points_bias;
  const Tensor& weights_weight;
  const Tensor& weights_bias;
  const Tensor& output_weight;
  const Tensor& output_bias;
  const EncoderParameters& encoder;  // all of them, or none
  const std::vector<double>& epsilons;
  double attn_drop;

  bool has_encoder() const {
    return !epsilons.empty();
  }
};

// What a forward makes on its way to the output, for the backward; without elements where it makes none. Nor has it the query, which
// is feature and embedding, and the logits where they are of more than `large` numbers: these are made again.
struct Steps {
  Tensor learned;
  Tensor key_points;
  Tensor query;
  Tensor logits;
  Tensor camera_logits;
  Tensor features;
  Tensor statistics;
  Tensor camera_embed[LAYERS];
};

// residual: "none", "add" or "cat". The output, and the steps in their order.
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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
    int64_t large);

// Of instance_feature, places, anchor_embed (as large as the feature), feature_maps, the six parameters of linear layers, and the
// encoder's; without elements where there is none, or where it is not needed.
using Gradients = std::tuple<
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,  //
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor>;

// needs_...: of the feature maps, of what key points follow from (places, points_weight or points_bias), and of the encoder. The
// other gradients are cheap, and made in any case.
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
    bool deterministic);

}  // namespace reimplementation::module
