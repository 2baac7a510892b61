// Key points of boxes on the CPU.
//
// Threads share out the boxes. Each takes the exponentials of a box's sizes once, for all of its points; the time goes into
// the sigmoids of learned places. The backward adds a box's gradient up over its points in their order: the same bits for
// any number of threads.
#include "points/box_key_points.h"

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <type_traits>

#include "cpu/capability.h"

namespace reimplementation::points {

using namespace cpu;

namespace {

constexpr int64_t WORK_OF_POINT = 64;  // about as many multiplications as a learned point takes, exponentials included

int64_t work_of_box(const BoxKeyPointsSizes& sizes) {
  return WORK_OF_POINT * (1 + sizes.num_points());
}

// The key points of boxes [begin, end), numbered through the batch.
template <typename T>
struct Forward {
  BoxKeyPoints<T> op;
  T* key_points;  // (batch, num_anchors, num_points, 3)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t num_points = op.sizes.num_points();
    for (int64_t i = begin; i < end; ++i) {
      const Box<T> box(op.anchor(i));
      for (int64_t point = 0; point < num_points; ++point) {
        box.put(place_of(op, i, point), key_points + (i * num_points + point) * 3);
      }
    }
  }
};

// The gradients of boxes [begin, end) and of their logits.
template <typename T>
struct Backward {
  BoxKeyPoints<T> op;
  const T* grad_key_points;
  T* grad_anchors;
  T* grad_logits;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t num_points = op.sizes.num_points();
    for (int64_t i = begin; i < end; ++i) {
      const Box<T> box(op.anchor(i));
      BoxGradient<T> gradient;
      for (int64_t point = 0; point < num_points; ++point) {
        const Place<T> place = place_of(op, i, point);
        T grad_scale[3];
        box.add_gradient(place, grad_key_points + (i * num_points + point) * 3, gradient, grad_scale);
        for (int axis = 0; op.is_learned(point) && axis < 3; ++axis) {
          grad_logits[op.logit(i, point) + axis] = logit_gradient(grad_scale[axis], place.sigmoid[axis]);
        }
      }
      box.end(gradient);
      for (int64_t column = 0; column < op.sizes.columns; ++column) {
        grad_anchors[i * op.sizes.columns + column] = column < BOX_COLUMNS ? gradient.sums[column] : 0;
      }
    }
  }
};

template <typename Kernel>
void share_out_boxes(const Kernel& kernel) {
  parallel_run(kernel, kernel.op.sizes.boxes(), items_per_thread(work_of_box(kernel.op.sizes)));
}

}  // namespace

Tensor box_key_points_cpu(const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits) {
  return run_box_key_points(anchor, fix_scale, logits, [](const auto& op, auto* key_points) {
    using T = std::remove_pointer_t<decltype(key_points)>;
    share_out_boxes(Forward<T>{op, key_points});
  });
}

std::tuple<Tensor, Tensor> box_key_points_backward_cpu(
    const Tensor& grad_output, const Tensor& anchor, const Tensor& fix_scale, const std::optional<Tensor>& logits) {
  return run_box_key_points_backward(
      grad_output, anchor, fix_scale, logits,
      [](const auto& op, const auto* grad_key_points, auto* grad_anchors, auto* grad_logits) {
        using T = std::remove_pointer_t<decltype(grad_anchors)>;
        share_out_boxes(Backward<T>{op, grad_key_points, grad_anchors, grad_logits});
      });
}

}  // namespace reimplementation::points
