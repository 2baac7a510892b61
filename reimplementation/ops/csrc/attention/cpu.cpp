// Multi-scale deformable attention on the CPU, of locations and weights that are in memory; attention/cpu.h has the loops.
#include "attention/cpu.h"

#include <optional>

namespace reimplementation::attention {
namespace {

template <typename T, typename Weight>
struct GivenSamples {
  SampleView<const T, 6> location;
  SampleView<const Weight, 5> attention;

  class Unit {
   public:
    explicit Unit(const GivenSamples& samples) : samples_(samples) {}

    template <int lanes>
    C10_ALWAYS_INLINE void find(int64_t batch, int64_t query, int64_t head) {
      locations_ = samples_.location.at(batch, query, head);
      weights_ = samples_.attention.at(batch, query, head);
    }

    C10_ALWAYS_INLINE void read(int64_t first, T* x, T* y, T* weight) const {
      for (int i = 0; i < block_size; ++i) {
        const T* xy = locations_ + samples_.location.offset(first + i);
        x[i] = xy[0];
        y[i] = xy[samples_.location.stride(5)];
        weight[i] = static_cast<T>(weights_[samples_.attention.offset(first + i)]);
      }
    }

   private:
    const GivenSamples& samples_;
    const T* locations_ = nullptr;
    const Weight* weights_ = nullptr;
  };

  // Of no element where not needed.
  struct Gradients {
    Gradients(const Tensor& of_location, const Tensor& of_attention) {
      if (of_location.numel() > 0) {
        location.emplace(of_location);
      }
      if (of_attention.numel() > 0) {
        attention.emplace(of_attention);
      }
    }

    std::optional<SampleView<T, 6>> location;
    std::optional<SampleView<Weight, 5>> attention;
  };

  class Writer {
   public:
    Writer(const GivenSamples&, const Gradients& gradients) : gradients_(gradients) {}

    bool needs_locations() const {
      return gradients_.location.has_value();
    }
    bool needs_weights() const {
      return gradients_.attention.has_value();
    }

    void begin_query(int64_t batch, int64_t query) {
      batch_ = batch;
      query_ = query;
    }
    void begin_unit(int64_t head) {
      head_ = head;
    }

    void put_locations(int64_t first, int64_t count, const T* x, const T* y) const {
      T* to = gradients_.location->at(batch_, query_, head_);
      for (int64_t i = 0; i < count; ++i) {
        T* xy = to + gradients_.location->offset(first + i);
        xy[0] = x[i];
        xy[gradients_.location->stride(5)] = y[i];
      }
    }
    void put_weights(int64_t first, int64_t count, const T* gradient) const {
      Weight* to = gradients_.attention->at(batch_, query_, head_);
      for (int64_t i = 0; i < count; ++i) {
        to[gradients_.attention->offset(first + i)] = static_cast<Weight>(gradient[i]);
      }
    }

    void end_unit(const Unit&) const {}
    void end_query() const {}

   private:
    const Gradients& gradients_;
    int64_t batch_ = 0, query_ = 0, head_ = 0;
  };
};

// Calls `function` with the operands in their types.
template <typename Function>
void with_operands(
    const Sizes& sizes,
    const std::vector<Level>& levels,
    const Tensor& value,
    const Tensor& sampling_locations,
    const Tensor& attention_weights,
    const Function& function) {
  with_types("value", value, attention_weights, [&](auto feature, auto weight) {
    using Feature = decltype(feature);
    using T = Compute<Feature>;
    using Form = GivenSamples<T, decltype(weight)>;
    function(
        Operands<Feature, Form>{
            sizes, SampleLevels<T>(levels, sizes.num_points), static_cast<const Feature*>(value.const_data_ptr()),
            Form{
                SampleView<const T, 6>(sampling_locations), SampleView<const decltype(weight), 5>(attention_weights)}});
  });
}

}  // namespace

Tensor forward_cpu(
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights) {
  const Sizes sizes = check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  const std::vector<Level> levels = read_levels(spatial_shapes, level_start_index, sizes.num_values);
  const auto output_size = {sizes.batch, sizes.num_queries, sizes.num_heads * sizes.channels};
  if (sizes.nothing_to_sample()) {
    return allocate_zeros(value, output_size);
  }
  const Tensor rows = as_contiguous(value);
  const Tensor output = allocate(value, output_size);
  with_operands(sizes, levels, rows, sampling_locations, attention_weights, [&](const auto& operands) {
    forward(operands, output);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_output,
    const Tensor& value,
    const Tensor& spatial_shapes,
    const Tensor& level_start_index,
    const Tensor& sampling_locations,
    const Tensor& attention_weights,
    bool needs_value,
    bool needs_sampling_locations,
    bool needs_attention_weights,
    bool /*deterministic*/,
    bool /*half_sums*/) {
  const Sizes sizes = check(value, spatial_shapes, level_start_index, sampling_locations, attention_weights);
  check_gradient(grad_output, value, sizes);
  const std::vector<Level> levels = read_levels(spatial_shapes, level_start_index, sizes.num_values);

  const Tensor rows = as_contiguous(value);
  Tensor grad_value = gradient_of(rows, needs_value);
  Tensor grad_location = gradient_of(sampling_locations, needs_sampling_locations);
  Tensor grad_attention = gradient_of(attention_weights, needs_attention_weights);
  if (sizes.nothing_to_sample()) {
    torch::stable::zero_(grad_value);
    torch::stable::zero_(grad_location);
    torch::stable::zero_(grad_attention);
    return {grad_value, grad_location, grad_attention};
  }

  const Tensor grad_rows = as_contiguous(as_type(grad_output, compute_type(value)));
  with_operands(sizes, levels, rows, sampling_locations, attention_weights, [&](const auto& operands) {
    if (needs_value) {
      backward_of_value(operands, grad_rows, grad_value);
    }
    if (needs_sampling_locations || needs_attention_weights) {
      backward_of_samples(operands, grad_rows, {grad_location, grad_attention});
    }
  });
  return {grad_value, grad_location, grad_attention};
}

}  // namespace reimplementation::attention
