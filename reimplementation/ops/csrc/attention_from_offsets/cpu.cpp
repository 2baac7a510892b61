// Multi-scale deformable attention from offsets and logits on the CPU; attention/cpu.h has the loops.
//
// A thread finds the locations and the softmax of a unit's samples, in buffers that stay in the cache, and goes on from them
// as if they had been given. In the backward it finds them again, once for the gradient of the value and once for the others:
// with w the weights and u their gradients, a logit has the gradient w * (u - sum of w * u over the unit).
#include "attention_from_offsets/op.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "attention/cpu.h"
#include "cpu/exponential.h"

namespace reimplementation::attention_from_offsets {

using namespace cpu;
using attention::SampleView;

namespace {

// (batch, num_queries, num_levels or 1, 2 or 4)
template <typename T>
struct References {
  View<T, 4> view;
  bool are_shared;  // by the levels
  bool are_boxes;

  explicit References(const Tensor& tensor)
      : view(tensor),
        are_shared(tensor.size(2) == 1),
        are_boxes(tensor.size(3) == 4) {}

  T* at(int64_t batch, int64_t query, int64_t level) const {
    return view.at(batch, query, are_shared ? 0 : level);
  }
};

template <typename T, typename Logit>
struct PredictedSamples {
  Sizes sizes;
  std::vector<Level> levels;
  References<const T> references;
  SampleView<const Logit, 6> offsets;
  SampleView<const Logit, 5> logits;
  std::vector<T> scales;  // of each level: how much of a box's size an offset of 1 is

  int64_t num_samples() const {
    return sizes.num_levels * sizes.num_points;
  }

  // Of the samples of a query in a level, along an axis.
  Reference<T> reference(int64_t batch, int64_t query, int64_t level, int axis) const {
    const T* values = references.at(batch, query, level);
    const T place = values[axis * references.view.stride(3)];
    if (references.are_boxes) {
      return {place, values[(axis + 2) * references.view.stride(3)] * scales[level], false};
    }
    return {place, static_cast<T>(axis == 0 ? levels[level].width : levels[level].height), true};
  }

  T offset(int64_t batch, int64_t query, int64_t head, int64_t sample, int axis) const {
    return static_cast<T>(offsets.at(batch, query, head)[offsets.offset(sample) + axis * offsets.stride(5)]);
  }

  class Unit {
   public:
    explicit Unit(const PredictedSamples& samples)
        : samples_(samples),
          x_(attention::padded(samples.num_samples()), 0),
          y_(x_),
          weights_(x_) {}

    template <int lanes>
    C10_ALWAYS_INLINE void find(int64_t batch, int64_t query, int64_t head) {
      const int64_t num_points = samples_.sizes.num_points;
      for (int64_t level = 0; level < samples_.sizes.num_levels; ++level) {
        const Reference<T> x = samples_.reference(batch, query, level, 0);
        const Reference<T> y = samples_.reference(batch, query, level, 1);
        for (int64_t i = level * num_points; i < (level + 1) * num_points; ++i) {
          x_[i] = x.location(samples_.offset(batch, query, head, i, 0));
          y_[i] = y.location(samples_.offset(batch, query, head, i, 1));
        }
      }
      weigh<lanes>(batch, query, head);
    }

    C10_ALWAYS_INLINE void read(int64_t first, T* x, T* y, T* weight) const {
      std::copy_n(x_.data() + first, attention::block_size, x);
      std::copy_n(y_.data() + first, attention::block_size, y);
      std::copy_n(weights_.data() + first, attention::block_size, weight);
    }

    T weight(int64_t sample) const {
      return weights_[sample];
    }

   private:
    // The softmax. A NaN or an infinite largest logit makes all of it NaN; what fills up the last block weighs nothing.
    template <int lanes>
    C10_ALWAYS_INLINE void weigh(int64_t batch, int64_t query, int64_t head) {
      const Logit* logits = samples_.logits.at(batch, query, head);
      const int64_t count = samples_.num_samples(), end = static_cast<int64_t>(weights_.size());
      T largest = -std::numeric_limits<T>::infinity();
      for (int64_t i = 0; i < count; ++i) {
        weights_[i] = static_cast<T>(logits[samples_.logits.offset(i)]);
        largest = weights_[i] > largest ? weights_[i] : largest;
      }
      std::fill(weights_.begin() + count, weights_.end(), -std::numeric_limits<T>::infinity());
      T sum = 0;
      for (int64_t i = 0; i < end; i += lanes) {
        store<lanes>(&weights_[i], exponential<lanes>(load<lanes>(&weights_[i]) - largest));
      }
      for (int64_t i = 0; i < count; ++i) {
        sum += weights_[i];
      }
      for (int64_t i = 0; i < end; i += lanes) {
        store<lanes>(&weights_[i], load<lanes>(&weights_[i]) * (1 / sum));
      }
    }

    const PredictedSamples& samples_;
    std::vector<T> x_, y_, weights_;  // of the samples, up to a whole number of blocks
  };

  // Of no element where not needed.
  struct Gradients {
    Gradients(const Tensor& of_references, const Tensor& of_offsets, const Tensor& of_logits) {
      if (of_references.numel() > 0) {
        references.emplace(of_references);
      }
      if (of_offsets.numel() > 0) {
        offsets.emplace(of_offsets);
      }
      if (of_logits.numel() > 0) {
        logits.emplace(of_logits);
      }
    }

    std::optional<References<T>> references;
    std::optional<SampleView<Logit, 6>> offsets;
    std::optional<SampleView<Logit, 5>> logits;
  };

  class Writer {
   public:
    Writer(const PredictedSamples& samples, const Gradients& gradients)
        : samples_(samples),
          gradients_(gradients),
          x_(samples.num_samples()),
          y_(x_),
          weights_(x_),
          references_(samples.sizes.num_levels * 4) {}

    bool needs_locations() const {
      return gradients_.offsets.has_value() || gradients_.references.has_value();
    }
    bool needs_weights() const {
      return gradients_.logits.has_value();
    }

    void begin_query(int64_t batch, int64_t query) {
      batch_ = batch;
      query_ = query;
      std::fill(references_.begin(), references_.end(), T(0));
    }
    void begin_unit(int64_t head) {
      head_ = head;
    }

    void put_locations(int64_t first, int64_t count, const T* x, const T* y) {
      std::copy_n(x, count, x_.data() + first);
      std::copy_n(y, count, y_.data() + first);
    }
    void put_weights(int64_t first, int64_t count, const T* gradient) {
      std::copy_n(gradient, count, weights_.data() + first);
    }

    void end_unit(const Unit& unit) {
      if (needs_locations()) {
        differentiate_locations(0, x_);
        differentiate_locations(1, y_);
      }
      if (needs_weights()) {
        differentiate_softmax(unit);
      }
    }

    void end_query() const {
      if (!gradients_.references) {
        return;
      }
      const int64_t num_levels = gradients_.references->are_shared ? 1 : samples_.sizes.num_levels;
      for (int64_t level = 0; level < num_levels; ++level) {
        T* to = gradients_.references->at(batch_, query_, level);
        for (int i = 0; i < (gradients_.references->are_boxes ? 4 : 2); ++i) {
          to[i * gradients_.references->view.stride(3)] = references_[4 * level + i];
        }
      }
    }

   private:
    // Of offsets, and of reference points: their places and, of boxes, their sizes.
    void differentiate_locations(int axis, const std::vector<T>& of_locations) {
      for (int64_t i = 0; i < samples_.num_samples(); ++i) {
        const int64_t level = i / samples_.sizes.num_points;
        if (gradients_.offsets) {
          const Reference<T> reference = samples_.reference(batch_, query_, level, axis);
          Logit* to = gradients_.offsets->at(batch_, query_, head_) + gradients_.offsets->offset(i);
          to[axis * gradients_.offsets->stride(5)] = static_cast<Logit>(reference.offset_gradient(of_locations[i]));
        }
        if (gradients_.references && of_locations[i] != 0) {
          T* sums = &references_[gradients_.references->are_shared ? 0 : 4 * level];
          sums[axis] += of_locations[i];
          sums[axis + 2] += of_locations[i] * samples_.offset(batch_, query_, head_, i, axis) * samples_.scales[level];
        }
      }
    }

    void differentiate_softmax(const Unit& unit) {
      T mean = 0;
      for (int64_t i = 0; i < samples_.num_samples(); ++i) {
        mean += unit.weight(i) * weights_[i];
      }
      Logit* to = gradients_.logits->at(batch_, query_, head_);
      for (int64_t i = 0; i < samples_.num_samples(); ++i) {
        to[gradients_.logits->offset(i)] = static_cast<Logit>(unit.weight(i) * (weights_[i] - mean));
      }
    }

    const PredictedSamples& samples_;
    const Gradients& gradients_;
    std::vector<T> x_, y_, weights_;  // gradients of a unit's samples
    std::vector<T> references_;       // of a query's: x, y and, of boxes, width and height, level by level
    int64_t batch_ = 0, query_ = 0, head_ = 0;
  };
};

// Of each level half of its scale, which is 1 over the number of points where none is given.
template <typename T>
std::vector<T> halved_scales(const std::optional<Tensor>& offset_scale, const Sizes& sizes) {
  std::vector<T> scales(sizes.num_levels, static_cast<T>(0.5) / static_cast<T>(sizes.num_points));
  if (offset_scale) {
    const View<const T, 1> given(*offset_scale);
    for (int64_t level = 0; level < sizes.num_levels; ++level) {
      scales[level] = *given.at(level) / 2;
    }
  }
  return scales;
}

// Calls `function` with the operands in their types.
template <typename Function>
void with_operands(const Sizes& sizes, const Arguments& arguments, const Tensor& rows, const Function& function) {
  const std::vector<Level> levels =
      read_levels(arguments.spatial_shapes, arguments.level_start_index, sizes.num_values);
  with_types("value", rows, arguments.attention_logits, [&](auto feature, auto logit) {
    using Feature = decltype(feature);
    using Logit = decltype(logit);
    using T = Compute<Feature>;
    using Form = PredictedSamples<T, Logit>;
    function(
        attention::Operands<Feature, Form>{
            sizes, attention::SampleLevels<T>(levels, sizes.num_points),
            static_cast<const Feature*>(rows.const_data_ptr()),
            Form{
                sizes, levels, References<const T>(arguments.reference_points),
                SampleView<const Logit, 6>(arguments.sampling_offsets),
                SampleView<const Logit, 5>(arguments.attention_logits),
                halved_scales<T>(arguments.offset_scale, sizes)}});
  });
}

}  // namespace

Tensor forward_cpu(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    const std::optional<Tensor>& offset_scale) {
  const Arguments arguments{
      value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, offset_scale};
  const Sizes sizes = check(arguments);
  const auto output_size = {sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels};
  if (sizes.nothing_to_sample()) {
    return allocate_zeros(value, output_size);
  }
  const Tensor output = allocate(value, output_size);
  with_operands(sizes, arguments, as_contiguous(value), [&](const auto& operands) { forward(operands, output); });
  return output;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& reference_points,
    const Tensor& sampling_offsets,
    const Tensor& attention_logits,
    const std::optional<Tensor>& offset_scale,
    bool needs_value,
    bool needs_reference_points,
    bool needs_sampling_offsets,
    bool needs_attention_logits,
    bool /*deterministic*/,
    bool /*half_sums*/) {
  const Arguments arguments{
      value, spatial_shapes, level_start_index, reference_points, sampling_offsets, attention_logits, offset_scale};
  const Sizes sizes = check(arguments);
  attention::check_gradient(grad_output, value, sizes);
  Tensor grad_value = contiguous_gradient(value, needs_value);
  Tensor grad_references = contiguous_gradient(reference_points, needs_reference_points);
  Tensor grad_offsets = gradient_of(sampling_offsets, needs_sampling_offsets);
  Tensor grad_logits = gradient_of(attention_logits, needs_attention_logits);
  if (sizes.nothing_to_sample()) {
    for (Tensor* gradient : {&grad_value, &grad_references, &grad_offsets, &grad_logits}) {
      torch::stable::zero_(*gradient);
    }
    return {grad_value, grad_references, grad_offsets, grad_logits};
  }
  const Tensor grad_rows = as_contiguous(as_type(grad_output, compute_type(value)));
  with_operands(sizes, arguments, as_contiguous(value), [&](const auto& operands) {
    if (needs_value) {
      backward_of_value(operands, grad_rows, grad_value);
    }
    if (needs_reference_points || needs_sampling_offsets || needs_attention_logits) {
      backward_of_samples(operands, grad_rows, {grad_references, grad_offsets, grad_logits});
    }
  });
  return {grad_value, grad_references, grad_offsets, grad_logits};
}

}  // namespace reimplementation::attention_from_offsets
