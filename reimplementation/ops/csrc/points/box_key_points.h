// Key points of boxes: the arguments of box_key_points, checked, what a call does on any device, and one point of one box, the
// same on every device.
//
// A place is in units of a box's sizes, from its centre: it is scaled by the sizes, turned by the yaw, moved to the centre.
// Fixed places are the same for every box; learned ones are sigmoid(logit) - 0.5, anywhere in the box.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "shared/checks.h"
#include "shared/platform.h"
#include "shared/tensors.h"

namespace reimplementation::points {

using torch::stable::Tensor;

constexpr int BOX_COLUMNS = 8;       // of an anchor: centre, logarithms of the sizes, sine and cosine of the yaw
constexpr int VELOCITY_COLUMNS = 3;  // that may follow; key points do not depend on them

struct BoxKeyPointsSizes {
  int64_t batch, num_anchors, columns;
  int64_t num_fixed, num_learned;

  HOST_DEVICE int64_t boxes() const {
    return batch * num_anchors;
  }
  HOST_DEVICE int64_t num_points() const {
    return num_fixed + num_learned;
  }
};

inline BoxKeyPointsSizes check_box_key_points(
    const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits) {
  check_dim("anchor", anchor, 3);
  check_dim("fix_scale", fix_scale, 2);
  if (logits) {
    check_dim("logits", *logits, 3);
  }
  const BoxKeyPointsSizes sizes{
      anchor.size(0), anchor.size(1), anchor.size(2), fix_scale.size(0), logits ? logits->size(2) / 3 : 0};
  STD_TORCH_CHECK(
      sizes.columns >= BOX_COLUMNS && sizes.columns <= BOX_COLUMNS + VELOCITY_COLUMNS,
      "anchor must have 8 to 11 columns; got shape ", shape_text(anchor));
  check_shape("fix_scale", fix_scale, {sizes.num_fixed, 3});
  check_real("anchor", anchor);
  check_like("fix_scale", fix_scale, "anchor", anchor);
  if (logits) {
    check_shape("logits", *logits, {sizes.batch, sizes.num_anchors, sizes.num_learned * 3});
    check_like("logits", *logits, "anchor", anchor);
  }
  return sizes;
}

inline void check_box_key_points_gradient(
    const Tensor& grad_output, const Tensor& anchor, const BoxKeyPointsSizes& sizes) {
  check_shape("grad_output", grad_output, {sizes.batch, sizes.num_anchors, sizes.num_points(), 3});
  check_like("grad_output", grad_output, "anchor", anchor);
}

// What a call reads.
template <typename T>
struct BoxKeyPoints {
  BoxKeyPointsSizes sizes;
  const T* anchors;    // (batch, num_anchors, columns)
  const T* fix_scale;  // (num_fixed, 3)
  const T* logits;     // (batch, num_anchors, num_learned, 3), or null where there are none

  HOST_DEVICE const T* anchor(int64_t box) const {
    return anchors + box * sizes.columns;
  }
  // Where the first of a learned point's three logits is, in `logits` and in their gradient.
  HOST_DEVICE int64_t logit(int64_t box, int64_t point) const {
    return (box * sizes.num_learned + point - sizes.num_fixed) * 3;
  }
  HOST_DEVICE bool is_learned(int64_t point) const {
    return point >= sizes.num_fixed;
  }
};

// The operands of a call that was checked, contiguous. They must outlive what reads them.
struct BoxKeyPointsOperands {
  BoxKeyPointsOperands(const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits)
      : anchor(as_contiguous(anchor)),
        fix_scale(as_contiguous(fix_scale)),
        logits(as_contiguous(logits)) {}

  template <typename T>
  BoxKeyPoints<T> op(const BoxKeyPointsSizes& sizes) const {
    return {
        sizes, static_cast<const T*>(anchor.const_data_ptr()), static_cast<const T*>(fix_scale.const_data_ptr()),
        logits ? static_cast<const T*>(logits->const_data_ptr()) : nullptr};
  }

  const Tensor anchor, fix_scale;
  const std::optional<Tensor> logits;
};

template <typename T>
HOST_DEVICE T sigmoid(T logit) {
  return 1 / (1 + std::exp(-logit));
}

template <typename T>
struct Place {
  T scale[3];    // in units of the box's sizes
  T sigmoid[3];  // of the logits, where the place is learned
};

template <typename T>
HOST_DEVICE Place<T> place_of(const BoxKeyPoints<T>& op, int64_t box, int64_t point) {
  Place<T> place{};
  for (int axis = 0; axis < 3; ++axis) {
    if (op.is_learned(point)) {
      place.sigmoid[axis] = sigmoid(op.logits[op.logit(box, point) + axis]);
      place.scale[axis] = place.sigmoid[axis] - static_cast<T>(0.5);
    } else {
      place.scale[axis] = op.fix_scale[point * 3 + axis];
    }
  }
  return place;
}

// The gradient of an anchor's first columns, added up over points; until `Box::end` that of the sizes themselves in the
// place of their logarithms'.
template <typename T>
struct BoxGradient {
  T sums[BOX_COLUMNS] = {};
};

template <typename T>
struct Box {
  T centre[3];
  T size[3];
  T sin, cos;

  HOST_DEVICE explicit Box(const T* anchor)
      : centre{anchor[0], anchor[1], anchor[2]},
        size{std::exp(anchor[3]), std::exp(anchor[4]), std::exp(anchor[5])},
        sin(anchor[6]),
        cos(anchor[7]) {}

  HOST_DEVICE void put(const Place<T>& place, T* key_point) const {
    const T x = place.scale[0] * size[0];
    const T y = place.scale[1] * size[1];
    const T z = place.scale[2] * size[2];
    key_point[0] = cos * x - sin * y + centre[0];
    key_point[1] = sin * x + cos * y + centre[1];
    key_point[2] = z + centre[2];
  }

  // Adds what the box gets from a key point's gradient, and leaves in `grad_scale` what the place gets.
  HOST_DEVICE void add_gradient(
      const Place<T>& place, const T* grad, BoxGradient<T>& gradient, T (&grad_scale)[3]) const {
    const T x = place.scale[0] * size[0];
    const T y = place.scale[1] * size[1];
    const T turned_back[3] = {cos * grad[0] + sin * grad[1], cos * grad[1] - sin * grad[0], grad[2]};
    for (int axis = 0; axis < 3; ++axis) {
      gradient.sums[axis] += grad[axis];
      gradient.sums[3 + axis] += turned_back[axis] * place.scale[axis];
      grad_scale[axis] = turned_back[axis] * size[axis];
    }
    gradient.sums[6] += grad[1] * x - grad[0] * y;
    gradient.sums[7] += grad[0] * x + grad[1] * y;
  }

  // Once all points have been added: turns the gradient of the sizes into that of their logarithms.
  HOST_DEVICE void end(BoxGradient<T>& gradient) const {
    for (int axis = 0; axis < 3; ++axis) {
      gradient.sums[3 + axis] *= size[axis];
    }
  }
};

template <typename T>
HOST_DEVICE T logit_gradient(T grad_scale, T sigmoid) {
  return grad_scale * (1 - sigmoid) * sigmoid;
}

// The op on any device: `run(op, key_points)` gets what the call reads and where it writes, in the anchors' type.
template <typename Run>
Tensor run_box_key_points(
    const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits, const Run& run) {
  const BoxKeyPointsSizes sizes = check_box_key_points(anchor, fix_scale, logits);
  const BoxKeyPointsOperands operands(anchor, fix_scale, logits);
  const Tensor key_points = allocate(anchor, {sizes.batch, sizes.num_anchors, sizes.num_points(), 3});
  if (key_points.numel() > 0) {
    with_real_type(anchor, [&](auto zero) {
      using T = decltype(zero);
      run(operands.op<T>(sizes), static_cast<T*>(key_points.mutable_data_ptr()));
    });
  }
  return key_points;
}

// Its backward: `run(op, grad_key_points, grad_anchors, grad_logits)`.
template <typename Run>
std::tuple<Tensor, Tensor> run_box_key_points_backward(
    const Tensor& grad_output,
    const Tensor& anchor,
    const Tensor& fix_scale,
    const std::optional<Tensor>& logits,
    const Run& run) {
  const BoxKeyPointsSizes sizes = check_box_key_points(anchor, fix_scale, logits);
  check_box_key_points_gradient(grad_output, anchor, sizes);
  const BoxKeyPointsOperands operands(anchor, fix_scale, logits);
  const Tensor grad_key_points = as_contiguous(grad_output);
  const Tensor grad_anchors = allocate(anchor, {sizes.batch, sizes.num_anchors, sizes.columns});
  const Tensor grad_logits =
      logits ? allocate(anchor, {sizes.batch, sizes.num_anchors, sizes.num_learned * 3}) : allocate(anchor, {0});
  if (grad_anchors.numel() > 0) {
    with_real_type(anchor, [&](auto zero) {
      using T = decltype(zero);
      run(operands.op<T>(sizes), static_cast<const T*>(grad_key_points.const_data_ptr()),
          static_cast<T*>(grad_anchors.mutable_data_ptr()), static_cast<T*>(grad_logits.mutable_data_ptr()));
    });
  }
  return {grad_anchors, grad_logits};
}

// One implementation per device, each of them bitwise reproducible. The backward returns the gradients of anchor and
// logits; the latter has no elements where there are no logits.
Tensor box_key_points_cpu(const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits);

std::tuple<Tensor, Tensor> box_key_points_backward_cpu(
    const Tensor& grad_output, const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits);

Tensor box_key_points_cuda(const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits);

std::tuple<Tensor, Tensor> box_key_points_backward_cuda(
    const Tensor& grad_output, const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits);

}  // namespace reimplementation::points
