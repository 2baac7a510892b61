// Every operator of the extension: schemas, and which function serves which device.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "points/box_key_points.h"
#include "aggregation/op.h"
#include "attention/op.h"
#include "attention_from_offsets/op.h"
#include "feature_aggregation/op.h"
#include "linear_relu_norm/op.h"
#include "module/op.h"
#include "points/project_points.h"

namespace reimplementation {
namespace {

using torch::stable::detail::StableLibrary;

void define_schemas(StableLibrary& m) {
  m.def(
      "deformable_aggregation(Tensor feature_maps, Tensor spatial_shape, Tensor scale_start_index, "
      "Tensor sampling_location, Tensor weights) -> Tensor");
  m.def(
      "deformable_aggregation_backward(Tensor grad_output, Tensor feature_maps, Tensor spatial_shape, "
      "Tensor scale_start_index, Tensor sampling_location, Tensor weights, bool needs_feature_maps, "
      "bool needs_sampling_location, bool needs_weights, bool deterministic=False) -> (Tensor, Tensor, Tensor)");
  m.def(
      "deformable_feature_aggregation(Tensor feature_maps, Tensor spatial_shape, Tensor scale_start_index, "
      "Tensor key_points, Tensor projection_mat, Tensor? image_wh, Tensor logits, Tensor? camera_logits, Tensor? keep, "
      "float attn_drop, bool visible_only) -> (Tensor, Tensor)");
  m.def(
      "deformable_feature_aggregation_backward(Tensor grad_output, Tensor feature_maps, Tensor spatial_shape, "
      "Tensor scale_start_index, Tensor key_points, Tensor projection_mat, Tensor? image_wh, Tensor logits, "
      "Tensor? camera_logits, Tensor? keep, Tensor statistics, float attn_drop, bool visible_only, "
      "bool needs_feature_maps, bool needs_key_points, bool needs_logits, bool needs_camera_logits, "
      "bool deterministic=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn(Tensor value, Tensor spatial_shapes, Tensor level_start_index, Tensor sampling_locations, "
      "Tensor attention_weights) -> Tensor");
  m.def(
      "ms_deform_attn_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor sampling_locations, Tensor attention_weights, bool needs_value, bool needs_sampling_locations, "
      "bool needs_attention_weights, bool deterministic=False, bool half_sums=True) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ms_deform_attn_from_offsets(Tensor value, Tensor spatial_shapes, Tensor level_start_index, "
      "Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, Tensor? offset_scale) -> Tensor");
  m.def(
      "ms_deform_attn_from_offsets_backward(Tensor grad_output, Tensor value, Tensor spatial_shapes, "
      "Tensor level_start_index, Tensor reference_points, Tensor sampling_offsets, Tensor attention_logits, "
      "Tensor? offset_scale, bool needs_value, bool needs_reference_points, bool needs_sampling_offsets, "
      "bool needs_attention_logits, bool deterministic=False, bool half_sums=True) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("box_key_points(Tensor anchor, Tensor fix_scale, Tensor? logits) -> Tensor");
  m.def(
      "box_key_points_backward(Tensor grad_output, Tensor anchor, Tensor fix_scale, Tensor? logits) -> "
      "(Tensor, Tensor)");
  m.def(
      "linear_relu_norm(Tensor feature, Tensor weight, Tensor bias, Tensor norm_weight, Tensor norm_bias, float "
      "eps=1e-05) "
      "-> "
      "Tensor");
  m.def(
      "linear_relu_norm_backward(Tensor grad_output, Tensor feature, Tensor weight, Tensor bias, Tensor norm_weight, "
      "Tensor norm_bias, float eps=1e-05, bool needs_feature=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "aggregation_module(Tensor instance_feature, Tensor places, Tensor anchor_embed, Tensor feature_maps, "
      "Tensor spatial_shape, Tensor scale_start_index, Tensor projection_mat, Tensor? image_wh, Tensor? keep, "
      "Tensor? fix_scale, Tensor? points_weight, Tensor? points_bias, Tensor weights_weight, Tensor weights_bias, "
      "Tensor output_weight, Tensor output_bias, Tensor? first_weight, Tensor? first_bias, Tensor? first_norm_weight, "
      "Tensor? first_norm_bias, Tensor? second_weight, Tensor? second_bias, Tensor? second_norm_weight, Tensor? "
      "second_norm_bias, float[] epsilons, float attn_drop, str residual, "
      "int large) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "aggregation_module_backward(Tensor grad_output, Tensor instance_feature, Tensor places, Tensor anchor_embed, "
      "Tensor feature_maps, "
      "Tensor spatial_shape, Tensor scale_start_index, Tensor projection_mat, Tensor? image_wh, Tensor? keep, "
      "Tensor? fix_scale, Tensor? points_weight, Tensor? points_bias, Tensor weights_weight, Tensor weights_bias, "
      "Tensor output_weight, Tensor output_bias, Tensor? first_weight, Tensor? first_bias, Tensor? first_norm_weight, "
      "Tensor? first_norm_bias, Tensor? second_weight, Tensor? second_bias, Tensor? second_norm_weight, Tensor? "
      "second_norm_bias, "
      "Tensor learned, Tensor key_points, Tensor query, Tensor logits, Tensor camera_logits, Tensor features, "
      "Tensor statistics, Tensor first_camera_embed, Tensor camera_embed, float[] epsilons, float attn_drop, "
      "str residual, bool needs_feature_maps, bool needs_points, bool needs_encoder, bool deterministic) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("project_points(Tensor key_points, Tensor projection_mat, Tensor? image_wh) -> Tensor");
  m.def(
      "project_points_backward(Tensor grad_output, Tensor key_points, Tensor projection_mat, Tensor? image_wh) -> "
      "Tensor");
}

void implement_on_cpu(StableLibrary& m) {
  m.impl("deformable_aggregation", TORCH_BOX(&aggregation::forward_cpu));
  m.impl("deformable_aggregation_backward", TORCH_BOX(&aggregation::backward_cpu));
  m.impl("deformable_feature_aggregation", TORCH_BOX(&feature_aggregation::forward_cpu));
  m.impl("deformable_feature_aggregation_backward", TORCH_BOX(&feature_aggregation::backward_cpu));
  m.impl("ms_deform_attn", TORCH_BOX(&attention::forward_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&attention::backward_cpu));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&attention_from_offsets::forward_cpu));
  m.impl("ms_deform_attn_from_offsets_backward", TORCH_BOX(&attention_from_offsets::backward_cpu));
  m.impl("box_key_points", TORCH_BOX(&points::box_key_points_cpu));
  m.impl("box_key_points_backward", TORCH_BOX(&points::box_key_points_backward_cpu));
  m.impl("linear_relu_norm", TORCH_BOX(&linear_relu_norm::forward_cpu));
  m.impl("linear_relu_norm_backward", TORCH_BOX(&linear_relu_norm::backward_cpu));
  m.impl("aggregation_module", TORCH_BOX(&module::forward));
  m.impl("aggregation_module_backward", TORCH_BOX(&module::backward));
  m.impl("project_points", TORCH_BOX(&points::project_points_cpu));
  m.impl("project_points_backward", TORCH_BOX(&points::project_points_backward_cpu));
}

#ifdef REIMPLEMENTATION_WITH_CUDA
void implement_on_cuda(StableLibrary& m) {
  m.impl("deformable_aggregation", TORCH_BOX(&aggregation::forward_cuda));
  m.impl("deformable_aggregation_backward", TORCH_BOX(&aggregation::backward_cuda));
  m.impl("deformable_feature_aggregation", TORCH_BOX(&feature_aggregation::forward_cuda));
  m.impl("deformable_feature_aggregation_backward", TORCH_BOX(&feature_aggregation::backward_cuda));
  m.impl("ms_deform_attn", TORCH_BOX(&attention::forward_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&attention::backward_cuda));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&attention_from_offsets::forward_cuda));
  m.impl("ms_deform_attn_from_offsets_backward", TORCH_BOX(&attention_from_offsets::backward_cuda));
  m.impl("box_key_points", TORCH_BOX(&points::box_key_points_cuda));
  m.impl("box_key_points_backward", TORCH_BOX(&points::box_key_points_backward_cuda));
  m.impl("linear_relu_norm", TORCH_BOX(&linear_relu_norm::forward_cuda));
  m.impl("linear_relu_norm_backward", TORCH_BOX(&linear_relu_norm::backward_cuda));
  m.impl("aggregation_module", TORCH_BOX(&module::forward));
  m.impl("aggregation_module_backward", TORCH_BOX(&module::backward));
  m.impl("project_points", TORCH_BOX(&points::project_points_cuda));
  m.impl("project_points_backward", TORCH_BOX(&points::project_points_backward_cuda));
}
#endif

// PyTorch takes one definition of a namespace. STABLE_TORCH_LIBRARY does not notice a refusal, and goes on with a handle that it
// never got, so a second copy of this library in a process would crash it. This looks first.
bool namespace_is_free() {
  TorchLibraryHandle trial = nullptr;
  if (aoti_torch_library_init_def("reimplementation", __FILE__, __LINE__, &trial) != AOTI_TORCH_SUCCESS) {
    return false;
  }
  aoti_torch_delete_library_object(trial);
  return true;
}

// Registers the operators for as long as this library is loaded; nothing, where another copy of it has them registered.
class Registration {
 public:
  Registration() {
    if (!namespace_is_free()) {
      return;
    }
    definitions_.emplace(StableLibrary::Kind::DEF, &define_schemas, "reimplementation", nullptr, __FILE__, __LINE__);
    on_cpu_.emplace(StableLibrary::Kind::IMPL, &implement_on_cpu, "reimplementation", "CPU", __FILE__, __LINE__);
#ifdef REIMPLEMENTATION_WITH_CUDA
    on_cuda_.emplace(StableLibrary::Kind::IMPL, &implement_on_cuda, "reimplementation", "CUDA", __FILE__, __LINE__);
#endif
  }

  bool succeeded() const {
    return definitions_.has_value();
  }

 private:
  std::optional<torch::stable::detail::StableTorchLibraryInit> definitions_, on_cpu_, on_cuda_;
};

const Registration registration;

}  // namespace
}  // namespace reimplementation

// The import that loads this library, and so registers the operators, is an empty module that says for which GPUs it was built.
#ifndef REIMPLEMENTATION_CUDA_ARCHITECTURES
#define REIMPLEMENTATION_CUDA_ARCHITECTURES ""
#endif

// A C++ program loads this library for its operators alone. It has no Python, and never calls PyInit__C.
#pragma weak PyModuleDef_Init
#pragma weak PyModule_AddStringConstant
#pragma weak PyErr_SetString
#pragma weak PyExc_ImportError

static int fill_module(PyObject* module) {
  if (!reimplementation::registration.succeeded()) {
    PyErr_SetString(
        PyExc_ImportError,
        "another copy of the kernels of reimplementation is loaded in this process, and has registered its operators: "
        "load one of the two alone");
    return -1;
  }
  return PyModule_AddStringConstant(module, "cuda_architectures", REIMPLEMENTATION_CUDA_ARCHITECTURES);
}

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  static PyModuleDef_Slot slots[] = {{Py_mod_exec, reinterpret_cast<void*>(&fill_module)}, {0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, slots};
  return PyModuleDef_Init(&definition);
}
