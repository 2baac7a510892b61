// One query of deformable feature aggregation on the CPU: which samples it has, and what they weigh.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/exponential.h"
#include "cpu/operands.h"
#include "cpu/rows.h"
#include "cpu/vector.h"
#include "feature_aggregation/op.h"
#include "shared/footprint.h"

namespace reimplementation::feature_aggregation {

using namespace cpu;

// What the forward and the backward read, all of it contiguous.
template <typename Feature, typename Logit>
struct Inputs {
  using T = Compute<Feature>;

  Sizes sizes;
  std::vector<Level> levels;   // (num_cams, num_levels)
  const Feature* features;     // (batch, num_rows, channels)
  Cameras<T> cameras;          // of the whole batch
  const T* key_points;         // (batch, num_queries, num_points, 3)
  const Logit* logits;         // (batch, num_queries, one camera or all, camera_width)
  const Logit* camera_logits;  // (batch, num_cams, camera_width), or null
  const bool* keep;            // (batch, num_queries, num_cams, num_points), or null
  T kept_scale;                // of the weights, where some pairs were dropped
  bool visible_only;

  // About how many multiplications a query takes.
  int64_t work_of_query() const {
    return sizes.num_points * sizes.num_levels * (sizes.channels + 8 * sizes.num_cams * sizes.num_groups);
  }
  const Logit* logits_of(int64_t batch, int64_t query, int64_t camera) const {
    const int64_t row = batch * sizes.num_queries + query;
    return logits + (camera_logits == nullptr ? row * sizes.num_cams + camera : row) * sizes.camera_width();
  }
  const Feature* row(int64_t batch, int64_t row) const {
    return features + (batch * sizes.num_rows + row) * sizes.channels;
  }
};

// A visible (camera, level, point): a footprint of four pixels.
template <typename T>
struct Sample {
  int64_t pair;     // camera * num_points + point
  int64_t weights;  // where those of its groups begin among the query's
  Axis<T> x, y;
  Corners<int> row;
};

// The steps of a softmax, on rows of `count` numbers that hold all groups of one sample, then those of the next one.
// Sums, largest ones and the like are as long, and hold those of the groups again and again.

// tile = the larger one of it and the row, number by number.
template <int lanes, typename T>
C10_ALWAYS_INLINE void raise_to(T* tile, const T* row, int64_t count) {
  for (; count >= lanes; count -= lanes, tile += lanes, row += lanes) {
    store<lanes>(tile, larger<lanes, T>(load<lanes>(row), load<lanes>(tile)));
  }
  if constexpr (lanes > 1) {
    raise_to<lanes / 2>(tile, row, count);
  }
}

// row = exp(row - largest), and sum += row.
template <int lanes, typename T>
C10_ALWAYS_INLINE void exponentiate(T* row, const T* largest, T* sum, int64_t count) {
  for (; count >= lanes; count -= lanes, row += lanes, largest += lanes, sum += lanes) {
    const Vector<T, lanes> power = exponential<lanes>(load<lanes>(row) - load<lanes>(largest));
    store<lanes>(row, power);
    store<lanes>(sum, load<lanes>(sum) + power);
  }
  if constexpr (lanes > 1) {
    exponentiate<lanes / 2>(row, largest, sum, count);
  }
}

// gradient = weight * (gradient - mean), in place; the mean is that of the weights' gradients, weighted with them.
template <int lanes, typename T>
C10_ALWAYS_INLINE void differentiate_softmax(
    T* gradient, const T* power, const T* inverse_sum, const T* mean, int64_t count) {
  for (; count >= lanes; count -= lanes, gradient += lanes, power += lanes, inverse_sum += lanes, mean += lanes) {
    const Vector<T, lanes> weight = load<lanes>(power) * load<lanes>(inverse_sum);
    store<lanes>(gradient, weight * (load<lanes>(gradient) - load<lanes>(mean)));
  }
  if constexpr (lanes > 1) {
    differentiate_softmax<lanes / 2>(gradient, power, inverse_sum, mean, count);
  }
}

// sum += row.
template <int lanes, typename T>
C10_ALWAYS_INLINE void add_row(T* sum, const T* row, int64_t count) {
  for (; count >= lanes; count -= lanes, sum += lanes, row += lanes) {
    store<lanes>(sum, load<lanes>(sum) + load<lanes>(row));
  }
  if constexpr (lanes > 1) {
    add_row<lanes / 2>(sum, row, count);
  }
}

// row = a, or a + b where there is one.
template <int lanes, typename T, typename Logit>
C10_ALWAYS_INLINE void add_logits(T* row, const Logit* a, const Logit* b, int64_t count) {
  for (; count >= lanes; count -= lanes, row += lanes, a += lanes) {
    Vector<T, lanes> sum = load<lanes>(a);
    if (b != nullptr) {
      sum += load<lanes>(b);
      b += lanes;
    }
    store<lanes>(row, sum);
  }
  if constexpr (lanes > 1) {
    add_logits<lanes / 2>(row, a, b, count);
  }
}

// What a thread works in, query after query.
template <typename Feature, typename Logit>
class Query {
 public:
  using T = Compute<Feature>;

  explicit Query(const Inputs<Feature, Logit>& inputs)
      : tile(inputs.sizes.num_groups * std::max<int64_t>(least_tile / inputs.sizes.num_groups, 1)),
        largest(tile),
        sum(tile),
        powers(inputs.sizes.num_cams * inputs.sizes.camera_width()),
        locations(inputs.sizes.num_cams * inputs.sizes.num_points),
        counts(locations.size()),
        hidden(locations.size()),
        inputs_(inputs),
        sizes_(inputs.sizes) {}

  // Projects the key points: fills `locations`, `counts`, `hidden` and `samples`.
  void see(int64_t batch, int64_t query) {
    const int64_t row = batch * sizes_.num_queries + query;
    const Cameras<T> cameras = inputs_.cameras.of_sample(batch, sizes_.num_cams);
    const T* point = inputs_.key_points + row * sizes_.num_points * 3;
    const bool* keep = inputs_.keep == nullptr ? nullptr : inputs_.keep + row * sizes_.num_cams * sizes_.num_points;
    for (int64_t p = 0; p < sizes_.num_points; ++p, point += 3) {
      bool is_seen = false;
      for (int64_t camera = 0; camera < sizes_.num_cams; ++camera) {
        const int64_t pair = camera * sizes_.num_points + p;
        T depth;
        const Location<T> location = cameras.locate(camera, {point[0], point[1], point[2]}, depth);
        const bool inside = inside_unit_square(location.x, location.y);
        locations[pair] = location;
        counts[pair] = inside && (keep == nullptr || keep[pair]);
        hidden[pair] = !(inside && depth > Cameras<T>::min_depth());
        is_seen |= !hidden[pair];
      }
      for (int64_t pair = p; pair < sizes_.num_cams * sizes_.num_points; pair += sizes_.num_points) {
        hidden[pair] = hidden[pair] && is_seen && inputs_.visible_only;
      }
    }
    list_samples();
  }

  // The softmax: fills `powers`, `largest` and `sum`.
  template <int lanes>
  C10_ALWAYS_INLINE void weigh(int64_t batch, int64_t query) {
    fill_logits<lanes>(batch, query);
    std::fill(largest.begin(), largest.end(), -std::numeric_limits<T>::infinity());
    for (int64_t first = 0; first < end(); first += tile) {
      raise_to<lanes>(largest.data(), powers.data() + first, std::min(tile, end() - first));
    }
    for (int64_t i = sizes_.num_groups; i < tile; ++i) {
      T& of_group = largest[i % sizes_.num_groups];
      of_group = largest[i] > of_group ? largest[i] : of_group;
    }
    repeat(largest);
    exponentiate_all<lanes>();
    for (int64_t i = sizes_.num_groups; i < tile; ++i) {
      sum[i % sizes_.num_groups] += sum[i];
    }
    repeat(sum);
  }

  // The same, from the largest logits and the sums that the forward found: (num_groups, 2).
  template <int lanes>
  C10_ALWAYS_INLINE void weigh_again(int64_t batch, int64_t query, const T* statistics) {
    fill_logits<lanes>(batch, query);
    for (int64_t group = 0; group < sizes_.num_groups; ++group) {
      largest[group] = statistics[2 * group];
    }
    repeat(largest);
    exponentiate_all<lanes>();
    for (int64_t group = 0; group < sizes_.num_groups; ++group) {
      sum[group] = statistics[2 * group + 1];
    }
    repeat(sum);
  }

  // Fills the rest of a tile with what its first groups hold.
  void repeat(std::vector<T>& numbers) const {
    for (int64_t i = sizes_.num_groups; i < tile; ++i) {
      numbers[i] = numbers[i - sizes_.num_groups];
    }
  }

  // Sets the numbers of hidden pairs in rows like `powers`.
  void set_hidden(T* rows, T value) const {
    if (!inputs_.visible_only) {
      return;
    }
    for (int64_t camera = 0; camera < sizes_.num_cams; ++camera) {
      for (int64_t level = 0; level < sizes_.num_levels; ++level) {
        for (int64_t point = 0; point < sizes_.num_points; ++point, rows += sizes_.num_groups) {
          if (hidden[camera * sizes_.num_points + point]) {
            std::fill(rows, rows + sizes_.num_groups, value);
          }
        }
      }
    }
  }

  // How many numbers the rows of all cameras hold.
  int64_t end() const {
    return static_cast<int64_t>(powers.size());
  }

  const int64_t tile;  // so many of these are worked on at a time
  // By group, repeated to the length of a tile.
  std::vector<T> largest, sum;
  std::vector<T> powers;  // (num_cams, num_levels, num_points, num_groups): exp(logit - largest of the group)
  // By pair: camera * num_points + point.
  std::vector<Location<T>> locations;
  std::vector<char> counts;  // a sample is taken there
  std::vector<char> hidden;  // its logits are left out of the softmax
  std::vector<Sample<T>> samples;

 private:
  static constexpr int64_t least_tile = 64;  // numbers: some vectors, so that the loops over them are worth their while

  void list_samples() {
    samples.clear();
    for (int64_t camera = 0; camera < sizes_.num_cams; ++camera) {
      for (int64_t level = 0; level < sizes_.num_levels; ++level) {
        const int64_t number = camera * sizes_.num_levels + level;
        const Level& shape = inputs_.levels[number];
        for (int64_t point = 0; point < sizes_.num_points && !shape.empty(); ++point) {
          const int64_t pair = camera * sizes_.num_points + point;
          if (counts[pair]) {
            samples.push_back(sample_at(pair, (number * sizes_.num_points + point) * sizes_.num_groups, shape));
          }
        }
      }
    }
  }

  Sample<T> sample_at(int64_t pair, int64_t weights, const Level& shape) const {
    const Axis<T> column = bilinear_axis(pixel_position(locations[pair].x, shape.width), shape.width);
    const Axis<T> line = bilinear_axis(pixel_position(locations[pair].y, shape.height), shape.height);
    const int first = shape.start + line.index[0] * shape.width;
    const int second = shape.start + line.index[1] * shape.width;
    return {
        pair,
        weights,
        column,
        line,
        {first + column.index[0], first + column.index[1], second + column.index[0], second + column.index[1]}};
  }

  template <int lanes>
  C10_ALWAYS_INLINE void fill_logits(int64_t batch, int64_t query) {
    const int64_t width = sizes_.camera_width();
    for (int64_t camera = 0; camera < sizes_.num_cams; ++camera) {
      const Logit* of_camera = inputs_.camera_logits == nullptr
          ? nullptr
          : inputs_.camera_logits + (batch * sizes_.num_cams + camera) * width;
      add_logits<lanes>(powers.data() + camera * width, inputs_.logits_of(batch, query, camera), of_camera, width);
    }
    set_hidden(powers.data(), -std::numeric_limits<T>::infinity());
  }

  template <int lanes>
  C10_ALWAYS_INLINE void exponentiate_all() {
    std::fill(sum.begin(), sum.end(), T(0));
    for (int64_t first = 0; first < end(); first += tile) {
      exponentiate<lanes>(powers.data() + first, largest.data(), sum.data(), std::min(tile, end() - first));
    }
  }

  const Inputs<Feature, Logit>& inputs_;
  const Sizes& sizes_;
};

}  // namespace reimplementation::feature_aggregation
