// On the CPU: threads share out the rows. Four rows at a time are multiplied by four rows of the weight, sixteen dot products in
// registers; the activated outputs are written where the output, or the gradient, shall be, and a row is normalised in place.
// The sums over rows, for the backward, are shared out by columns. The same bits for any number of threads.
#include "linear_relu_norm/op.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/capability.h"
#include "cpu/vector.h"

namespace reimplementation::linear_relu_norm {

using namespace cpu;

namespace {

constexpr int TILE = 4;             // rows, and outputs, whose dot products are made at a time
constexpr int64_t VECTORISED = 16;  // multiplications at a time, at best: as much less work is a dot product

// Adds to dots[r][o] the products of `count` elements of rows r of `feature` and o of `weight`, which are so far apart.
template <int lanes, int ROWS, int OUTPUTS, typename T>
C10_ALWAYS_INLINE void add_dots(
    T (&dots)[ROWS][OUTPUTS], const T* feature, int64_t row_step, const T* weight, int64_t output_step, int64_t count) {
  if (count >= lanes) {
    Vector<T, lanes> sums[ROWS][OUTPUTS] = {};
    for (; count >= lanes; count -= lanes, feature += lanes, weight += lanes) {
      for (int o = 0; o < OUTPUTS; ++o) {
        const Vector<T, lanes> factor = load<lanes>(weight + o * output_step);
        for (int r = 0; r < ROWS; ++r) {
          sums[r][o] += factor * load<lanes>(feature + r * row_step);
        }
      }
    }
    for (int r = 0; r < ROWS; ++r) {
      for (int o = 0; o < OUTPUTS; ++o) {
        dots[r][o] += sum_of_lanes<lanes, T>(sums[r][o]);
      }
    }
  }
  if constexpr (lanes > 1) {
    add_dots<lanes / 2>(dots, feature, row_step, weight, output_step, count);
  }
}

// The activated outputs of ROWS rows from `first` on, to `activated`, (ROWS, out_features).
template <int bytes, int ROWS, typename T>
C10_ALWAYS_INLINE void activate(const Layer<T>& layer, int64_t first, T* activated) {
  const int64_t in_features = layer.sizes.in_features, out_features = layer.sizes.out_features;
  const T* const feature = layer.feature + first * layer.row_step;
  auto make = [&](int64_t output, auto outputs) __attribute__((always_inline)) {
    constexpr int OUTPUTS = decltype(outputs)::value;
    T dots[ROWS][OUTPUTS] = {};
    add_dots<bytes / static_cast<int>(sizeof(T))>(
        dots, feature, layer.row_step, layer.weight + output * in_features, in_features, in_features);
    for (int r = 0; r < ROWS; ++r) {
      for (int o = 0; o < OUTPUTS; ++o) {
        const T value = dots[r][o] + layer.bias[output + o];
        activated[r * out_features + output + o] = value < 0 ? T(0) : value;  // NaN stays
      }
    }
  };
  int64_t output = 0;
  for (; output + TILE <= out_features; output += TILE) {
    make(output, std::integral_constant<int, TILE>{});
  }
  for (; output < out_features; ++output) {
    make(output, std::integral_constant<int, 1>{});
  }
}

// Rows [begin, end): as many tiles as there are, and the rest one by one.
template <int bytes, typename T>
C10_ALWAYS_INLINE void activate_rows(const Layer<T>& layer, int64_t begin, int64_t end, T* activated) {
  int64_t row = begin;
  for (; row + TILE <= end; row += TILE) {
    activate<bytes, TILE>(layer, row, activated + row * layer.sizes.out_features);
  }
  for (; row < end; ++row) {
    activate<bytes, 1>(layer, row, activated + row * layer.sizes.out_features);
  }
}

template <typename T>
struct Norm {
  T mean;
  T scale;

  T operator()(T activated) const {
    return (activated - mean) * scale;
  }
};

template <typename T>
C10_ALWAYS_INLINE Norm<T> norm_of(const T* activated, int64_t width, T eps) {
  T sum = 0;
  for (int64_t i = 0; i < width; ++i) {
    sum += activated[i];
  }
  const T mean = sum / static_cast<T>(width);
  T squares = 0;
  for (int64_t i = 0; i < width; ++i) {
    squares += (activated[i] - mean) * (activated[i] - mean);
  }
  return {mean, 1 / std::sqrt(squares / static_cast<T>(width) + eps)};
}

template <typename T>
struct Forward {
  Layer<T> layer;
  T* output;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    const int64_t width = layer.sizes.out_features;
    activate_rows<bytes>(layer, begin, end, output);
    for (int64_t row = begin; row < end; ++row) {
      T* const of_row = output + row * width;
      const Norm<T> norm = norm_of(of_row, width, layer.eps);
      for (int64_t i = 0; i < width; ++i) {
        of_row[i] = norm(of_row[i]) * layer.norm_weight[i] + layer.norm_bias[i];
      }
    }
  }
};

// The gradient of the linear layer's output, and the normalised outputs, of rows [begin, end).
template <typename T>
struct BackwardRows {
  Layer<T> layer;
  const T* grad_output;
  T* of_linear;  // (rows, out_features), and so is
  T* normalised;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    activate_rows<bytes>(layer, begin, end, of_linear);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = row * layer.sizes.out_features;
      differentiate(grad_output + first, of_linear + first, normalised + first);
    }
  }

  // `of_row` holds the activated outputs before.
  C10_ALWAYS_INLINE void differentiate(const T* gradient, T* of_row, T* normalised_row) const {
    const int64_t width = layer.sizes.out_features;
    const Norm<T> norm = norm_of(of_row, width, layer.eps);
    T sum = 0, sum_normalised = 0;
    for (int64_t i = 0; i < width; ++i) {
      normalised_row[i] = norm(of_row[i]);
      const T of_normalised = gradient[i] * layer.norm_weight[i];
      sum += of_normalised;
      sum_normalised += of_normalised * normalised_row[i];
    }
    const T mean = sum / static_cast<T>(width), mean_normalised = sum_normalised / static_cast<T>(width);
    for (int64_t i = 0; i < width; ++i) {
      const T centred = gradient[i] * layer.norm_weight[i] - mean - normalised_row[i] * mean_normalised;
      of_row[i] = of_row[i] <= 0 ? T(0) : centred * norm.scale;  // NaN passes
    }
  }
};

// The sums over rows, of columns [begin, end).
template <typename T>
struct BackwardSums {
  Sizes sizes;
  const T* grad_output;
  const T* of_linear;
  const T* normalised;
  T* sums[NUM_SUMS];

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    for (T* sum : sums) {
      std::fill(sum + begin, sum + end, T(0));
    }
    for (int64_t row = 0; row < sizes.rows(); ++row) {
      const int64_t first = row * sizes.out_features;
      for (int64_t i = begin; i < end; ++i) {
        sums[0][i] += of_linear[first + i];
        sums[1][i] += grad_output[first + i] * normalised[first + i];
        sums[2][i] += grad_output[first + i];
      }
    }
  }
};

int64_t work_of_row(const Sizes& sizes) {
  return 1 + (sizes.in_features / VECTORISED + 4) * sizes.out_features;
}

}  // namespace

Tensor forward_cpu(
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps) {
  return run_forward({feature, weight, bias, norm_weight, norm_bias, eps}, [](const auto& layer, auto* output) {
    using T = std::remove_pointer_t<decltype(output)>;
    parallel_run(Forward<T>{layer, output}, layer.sizes.rows(), items_per_thread(work_of_row(layer.sizes)));
  });
}

Gradients backward_cpu(
    const Tensor& grad_output,
    const Tensor& feature,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& norm_weight,
    const Tensor& norm_bias,
    double eps,
    bool needs_feature) {
  auto run = [&](const auto& layer, const auto* gradient, auto* of_linear, auto* sums) {
    using T = std::remove_pointer_t<decltype(of_linear)>;
    const Sizes& sizes = layer.sizes;
    const Tensor normalised = allocate(feature, {sizes.rows(), sizes.out_features});
    T* const to_normalised = static_cast<T*>(normalised.mutable_data_ptr());
    parallel_run(
        BackwardRows<T>{layer, gradient, of_linear, to_normalised}, sizes.rows(), items_per_thread(work_of_row(sizes)));
    parallel_run(
        BackwardSums<T>{sizes, gradient, of_linear, to_normalised, {sums[0], sums[1], sums[2]}}, sizes.out_features,
        items_per_thread(sizes.rows()));
  };
  return run_backward(grad_output, {feature, weight, bias, norm_weight, norm_bias, eps}, needs_feature, run);
}

}  // namespace reimplementation::linear_relu_norm
