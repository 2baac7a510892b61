// The loops of multi-scale deformable attention on the CPU, whatever form its samples come in.
//
// The rows are short, 32 channels as a rule, so a sample's footprint would cost as much as its four rows. Footprints
// are therefore computed a block of samples at a time, one sample to a lane, and sums stay in registers over a block.
//
// Forward: threads share out the queries, and each takes a query's heads in turn: head by head, rows that are a power
// of two apart would compete for a small part of the cache. What remains is mostly the wait for rows from beyond it.
//
// Backward, without atomics and with the same bits for any number of threads:
// - gradients of weights and locations: threads share out the queries and read the value as the forward does;
// - gradient of the value: threads share out the (batch, head)s, and their channels too where there are many channels
//   or few heads. Whoever has one walks through all queries in their order and adds to rows of its own. These lie close
//   together, in a buffer that is written out once, for in the gradient itself they would again be that far apart.
//
// A *unit* is a query and a head, whose samples are numbered in the order (level, point). What the loops ask of a form
// `Form`:
// - `Unit`, which a thread works in: `find<lanes>(batch, query, head)`, and then `read(first, x, y, weight)`, which has
//   the locations and weights of a block of samples;
// - `Gradients`, and a `Writer`, by which a thread passes on the gradients of locations and weights, unit by unit.
#pragma once

#include "attention/op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/capability.h"
#include "cpu/footprints.h"
#include "cpu/operands.h"
#include "cpu/pages.h"
#include "cpu/rows.h"
#include "cpu/vector.h"

namespace reimplementation::attention {

using namespace cpu;

// How many samples make a block: a constant, and a multiple of the lanes of any vector.
constexpr int block_size = 16;

// The samples of a unit are numbered up to a whole number of blocks.
inline int64_t padded(int64_t num_samples) {
  return (num_samples + block_size - 1) / block_size * block_size;
}

// The level of every sample, attribute by attribute. Empty levels, and what fills up the last block, have a size that
// no location touches.
template <typename T>
struct SampleLevels {
  std::vector<T> width, height;
  std::vector<Integer<T>> row_width, start;  // row_width: width as an integer

  SampleLevels(const std::vector<Level>& levels, int64_t num_points)
      : width(padded(levels.size() * num_points), T(-1)),
        height(width.size(), T(-1)),
        row_width(width.size(), 0),
        start(width.size(), 0) {
    for (size_t i = 0; i < levels.size() * num_points; ++i) {
      const Level& level = levels[i / num_points];
      if (!level.empty()) {
        width[i] = static_cast<T>(level.width);
        height[i] = static_cast<T>(level.height);
        row_width[i] = level.width;
        start[i] = level.start;
      }
    }
  }
};

// A tensor (batch, num_queries, num_heads, num_levels, num_points, ...).
template <typename T, int dims>
class SampleView {
 public:
  explicit SampleView(const Tensor& tensor) : view_(tensor), offset_(padded(tensor.size(3) * tensor.size(4)), 0) {
    const int64_t num_points = tensor.size(4);
    for (int64_t i = 0; i < tensor.size(3) * num_points; ++i) {
      offset_[i] = i / num_points * view_.stride(3) + i % num_points * view_.stride(4);
    }
  }

  // Sample number 0; the others are `offset(number)` away.
  T* at(int64_t batch, int64_t query, int64_t head) const {
    return view_.at(batch, query, head);
  }

  int64_t offset(int64_t sample) const {
    return offset_[sample];
  }

  int64_t stride(int dim) const {
    return view_.stride(dim);
  }

 private:
  View<T, dims> view_;
  std::vector<int64_t> offset_;  // of fillers: 0, which can be read
};

// One block of samples. `row` and `scale` are for the loops over channels, which take sample by sample.
template <typename T, int lanes>
struct Block {
  static constexpr int vectors = block_size / lanes;

  Vector<T, lanes> attention[vectors];
  VectorAxis<T, lanes> x[vectors];
  VectorAxis<T, lanes> y[vectors];
  Vector<Integer<T>, lanes> touches[vectors];  // a mask

  Integer<T> touches_level[block_size];
  Integer<T> row[4][block_size];
  T scale[4][block_size];  // what the corner weighs, times the attention
};

// What the forward and the backward read.
template <typename Feature, typename Form>
struct Operands {
  using T = Compute<Feature>;

  Sizes sizes;
  SampleLevels<T> levels;
  const Feature* value;  // (batch, num_values, num_heads, channels)
  Form form;

  int64_t num_samples() const {
    return sizes.num_levels * sizes.num_points;
  }

  // From a row of the value to the next.
  int64_t row_stride() const {
    return sizes.num_heads * sizes.channels;
  }

  // A head's channels in the first row.
  const Feature* head_of(int64_t batch, int64_t head) const {
    return value + (batch * sizes.num_values * sizes.num_heads + head) * sizes.channels;
  }

  // The samples of a unit from number `first` on.
  template <int lanes>
  C10_ALWAYS_INLINE void read_block(Block<T, lanes>& block, const typename Form::Unit& unit, int64_t first) const {
    T x[block_size];
    T y[block_size];
    T weight[block_size];
    unit.read(first, x, y, weight);
    for (int i = 0; i < block.vectors; ++i) {
      const int64_t sample = first + i * lanes;
      const auto width = load<lanes>(&levels.width[sample]);
      const auto height = load<lanes>(&levels.height[sample]);
      const auto row_width = load<lanes>(&levels.row_width[sample]);
      const auto start = load<lanes>(&levels.start[sample]);
      const Vector<T, lanes> pixel_x = load<lanes>(x + i * lanes) * width - T(0.5);
      const Vector<T, lanes> pixel_y = load<lanes>(y + i * lanes) * height - T(0.5);
      block.touches[i] = (pixel_x > -1) & (pixel_x < width) & (pixel_y > -1) & (pixel_y < height);
      store<lanes>(block.touches_level + i * lanes, block.touches[i]);
      block.x[i] = bilinear_axes<lanes, T>(keep<lanes, T>(block.touches[i], pixel_x), width);
      block.y[i] = bilinear_axes<lanes, T>(keep<lanes, T>(block.touches[i], pixel_y), height);
      block.attention[i] = load<lanes>(weight + i * lanes);
      for (int corner = 0; corner < 4; ++corner) {
        store<lanes>(
            block.row[corner] + i * lanes,
            start + block.y[i].index[corner >> 1] * row_width + block.x[i].index[corner & 1]);
        store<lanes>(
            block.scale[corner] + i * lanes, block.attention[i] * corner_weight(block.x[i], block.y[i], corner));
      }
    }
  }
};

// sum += the block's samples, for `count` channels; `value` is row 0. Each vector has two sums, because a multiply-add
// waits for the one before it.
template <int vectors, int lanes, typename T, int block_lanes, typename Feature>
C10_ALWAYS_INLINE void add_samples(
    T* sum, const Block<T, block_lanes>& block, const Feature* value, int64_t row_stride, int64_t count) {
  constexpr int channels = vectors * lanes;
  for (; count >= channels; count -= channels, sum += channels, value += channels) {
    Vector<T, lanes> sums[2][vectors] = {};
    for (int i = 0; i < block_size; ++i) {
      if (block.touches_level[i]) {
        for (int corner = 0; corner < 4; ++corner) {
          const Feature* row = value + block.row[corner][i] * row_stride;
          for (int v = 0; v < vectors; ++v) {
            sums[corner & 1][v] += block.scale[corner][i] * load<lanes>(row + v * lanes);
          }
        }
      }
    }
    for (int v = 0; v < vectors; ++v) {
      store<lanes>(sum + v * lanes, load<lanes>(sum + v * lanes) + (sums[0][v] + sums[1][v]));
    }
  }
  if constexpr (vectors > 1) {
    add_samples<vectors / 2, lanes>(sum, block, value, row_stride, count);
  } else if constexpr (lanes > 1) {
    add_samples<1, lanes / 2>(sum, block, value, row_stride, count);
  }
}

// Adds to the rows of `sums`, `row_stride` apart, what the block's samples pass on of `count` channels of a gradient.
template <int vectors, int lanes, typename T, int block_lanes>
C10_ALWAYS_INLINE void add_to_rows(
    T* sums, int64_t row_stride, const Block<T, block_lanes>& block, const T* grad_output, int64_t count) {
  constexpr int channels = vectors * lanes;
  for (; count >= channels; count -= channels, sums += channels, grad_output += channels) {
    Vector<T, lanes> grad[vectors];
    for (int v = 0; v < vectors; ++v) {
      grad[v] = load<lanes>(grad_output + v * lanes);
    }
    for (int i = 0; i < block_size; ++i) {
      if (block.touches_level[i]) {
        for (int corner = 0; corner < 4; ++corner) {
          T* row = sums + block.row[corner][i] * row_stride;
          const T scale = block.scale[corner][i];
          for (int v = 0; v < vectors; ++v) {
            store<lanes>(row + v * lanes, load<lanes>(row + v * lanes) + scale * grad[v]);
          }
        }
      }
    }
  }
  if constexpr (vectors > 1) {
    add_to_rows<vectors / 2, lanes>(sums, row_stride, block, grad_output, count);
  } else if constexpr (lanes > 1) {
    add_to_rows<1, lanes / 2>(sums, row_stride, block, grad_output, count);
  }
}

// The output of queries [begin, end), numbered through the batch.
template <typename Feature, typename Form>
struct Forward {
  using T = Compute<Feature>;

  const Operands<Feature, Form>& operands;
  Feature* output;  // (batch, num_queries, num_heads, channels)

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = operands.sizes;
    Block<T, lanes> block;
    typename Form::Unit unit(operands.form);
    std::vector<T> sum(sizes.channels);

    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / sizes.num_queries;
      const int64_t query = i % sizes.num_queries;
      for (int64_t head = 0; head < sizes.num_heads; ++head) {
        std::fill(sum.begin(), sum.end(), T(0));
        unit.template find<lanes>(batch, query, head);
        for (int64_t first = 0; first < operands.num_samples(); first += block_size) {
          operands.read_block(block, unit, first);
          add_samples<4, lanes>(
              sum.data(), block, operands.head_of(batch, head), operands.row_stride(), sizes.channels);
        }
        convert<lanes>(output + (i * sizes.num_heads + head) * sizes.channels, sum.data(), sizes.channels);
      }
    }
  }
};

// The gradients of the attention weights and locations of queries [begin, end), numbered through the batch.
template <typename Feature, typename Form>
struct BackwardOfSamples {
  using T = Compute<Feature>;

  const Operands<Feature, Form>& operands;
  const T* grad_output;  // (batch, num_queries, num_heads, channels)
  typename Form::Gradients gradients;

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = operands.sizes;
    Block<T, lanes> block;
    typename Form::Unit unit(operands.form);
    typename Form::Writer writer(operands.form, gradients);

    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / sizes.num_queries;
      const int64_t query = i % sizes.num_queries;
      writer.begin_query(batch, query);
      for (int64_t head = 0; head < sizes.num_heads; ++head) {
        const T* grad = grad_output + (i * sizes.num_heads + head) * sizes.channels;
        unit.template find<lanes>(batch, query, head);
        writer.begin_unit(head);
        for (int64_t first = 0; first < operands.num_samples(); first += block_size) {
          operands.read_block(block, unit, first);
          T dot[4][block_size];
          multiply<lanes>(dot, block, grad, operands.head_of(batch, head));
          if (writer.needs_locations()) {
            differentiate_locations(block, dot, first, writer);
          }
          if (writer.needs_weights()) {
            differentiate_weights(block, dot, first, writer);
          }
        }
        writer.end_unit(unit);
      }
      writer.end_query();
    }
  }

 private:
  // dot[corner][i] = the product of the gradient and the row at the sample's corner; 0 where nothing is sampled.
  template <int lanes>
  C10_ALWAYS_INLINE void multiply(
      T (&dot)[4][block_size], const Block<T, lanes>& block, const T* grad, const Feature* value) const {
    for (int i = 0; i < block_size; ++i) {
      Corners<T> product = {};
      if (block.touches_level[i]) {
        Corners<const Feature*> rows;
        for (int corner = 0; corner < 4; ++corner) {
          rows[corner] = value + block.row[corner][i] * operands.row_stride();
        }
        add_dot_products<lanes>(product, grad, rows, 0, operands.sizes.channels);
      }
      for (int corner = 0; corner < 4; ++corner) {
        dot[corner][i] = product[corner];
      }
    }
  }

  int64_t count_from(int64_t first) const {
    return std::min<int64_t>(block_size, operands.num_samples() - first);
  }

  template <int lanes>
  C10_ALWAYS_INLINE void differentiate_locations(
      const Block<T, lanes>& block, const T (&dot)[4][block_size], int64_t first, typename Form::Writer& writer) const {
    T grad_x[block_size];
    T grad_y[block_size];
    for (int i = 0; i < block.vectors; ++i) {
      Vector<T, lanes> x = {};
      Vector<T, lanes> y = {};
      for (int corner = 0; corner < 4; ++corner) {
        const Vector<T, lanes> along = block.attention[i] * load<lanes>(dot[corner] + i * lanes);
        add_location_gradient(x, y, block.x[i], block.y[i], corner, along);
      }
      store<lanes>(grad_x + i * lanes, keep<lanes, T>(block.touches[i], x));
      store<lanes>(grad_y + i * lanes, keep<lanes, T>(block.touches[i], y));
    }
    writer.put_locations(first, count_from(first), grad_x, grad_y);
  }

  template <int lanes>
  C10_ALWAYS_INLINE void differentiate_weights(
      const Block<T, lanes>& block, const T (&dot)[4][block_size], int64_t first, typename Form::Writer& writer) const {
    T grad[block_size];
    for (int i = 0; i < block.vectors; ++i) {
      Vector<T, lanes> sum = {};
      for (int corner = 0; corner < 4; ++corner) {
        sum += corner_weight(block.x[i], block.y[i], corner) * load<lanes>(dot[corner] + i * lanes);
      }
      store<lanes>(grad + i * lanes, keep<lanes, T>(block.touches[i], sum));
    }
    writer.put_weights(first, count_from(first), grad);
  }
};

// The gradient of the value: slices [begin, end), numbered through batch, heads and the slices of a head's channels.
template <typename Feature, typename Form>
struct BackwardOfValue {
  using T = Compute<Feature>;

  const Operands<Feature, Form>& operands;
  const T* grad_output;  // (batch, num_queries, num_heads, channels)
  Feature* grad_value;   // (batch, num_values, num_heads, channels)
  int64_t slice_channels;

  int64_t slices_per_head() const {
    return (operands.sizes.channels + slice_channels - 1) / slice_channels;
  }

  template <int bytes>
  C10_ALWAYS_INLINE void run(int64_t begin, int64_t end) const {
    constexpr int lanes = bytes / sizeof(T);
    const Sizes& sizes = operands.sizes;
    Block<T, lanes> block;
    typename Form::Unit unit(operands.form);
    std::vector<T> sums(sizes.num_values * slice_channels);  // a row of the slice after the other

    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t batch = slice / slices_per_head() / sizes.num_heads;
      const int64_t head = slice / slices_per_head() % sizes.num_heads;
      const int64_t first_channel = slice % slices_per_head() * slice_channels;
      const int64_t channels = std::min(slice_channels, sizes.channels - first_channel);
      const int64_t first_element = head * sizes.channels + first_channel;

      std::fill(sums.begin(), sums.end(), T(0));
      for (int64_t query = 0; query < sizes.num_queries; ++query) {
        const T* grad = grad_output + (batch * sizes.num_queries + query) * operands.row_stride() + first_element;
        unit.template find<lanes>(batch, query, head);
        for (int64_t first = 0; first < operands.num_samples(); first += block_size) {
          operands.read_block(block, unit, first);
          add_to_rows<4, lanes>(sums.data(), slice_channels, block, grad, channels);
        }
      }
      Feature* rows = grad_value + batch * sizes.num_values * operands.row_stride() + first_element;
      for (int64_t row = 0; row < sizes.num_values; ++row) {
        convert<lanes>(rows + row * operands.row_stride(), sums.data() + row * slice_channels, channels);
      }
    }
  }
};

// About how many multiplications a query takes.
inline int64_t work_of_query(const Sizes& sizes) {
  return sizes.num_heads * sizes.num_levels * sizes.num_points * sizes.channels;
}

template <typename Feature, typename Form>
void forward(const Operands<Feature, Form>& operands, const Tensor& output) {
  const Sizes& sizes = operands.sizes;
  const Forward<Feature, Form> kernel{operands, static_cast<Feature*>(output.mutable_data_ptr())};
  parallel_run(kernel, sizes.batch * sizes.num_queries, items_per_thread(work_of_query(sizes)));
}

template <typename Feature, typename Form>
void backward_of_samples(
    const Operands<Feature, Form>& operands, const Tensor& grad_output, const typename Form::Gradients& gradients) {
  const Sizes& sizes = operands.sizes;
  const BackwardOfSamples<Feature, Form> kernel{
      operands, static_cast<const Compute<Feature>*>(grad_output.const_data_ptr()), gradients};
  parallel_run(kernel, sizes.batch * sizes.num_queries, items_per_thread(work_of_query(sizes)));
}

template <typename Feature, typename Form>
void backward_of_value(const Operands<Feature, Form>& operands, const Tensor& grad_output, const Tensor& grad_value) {
  const Sizes& sizes = operands.sizes;
  const int64_t threads = torch::stable::get_num_threads();
  BackwardOfValue<Feature, Form> kernel{
      operands, static_cast<const Compute<Feature>*>(grad_output.const_data_ptr()),
      static_cast<Feature*>(grad_value.mutable_data_ptr()),
      32};  // wider slices would leave the cache; narrower ones compute the same footprints more often
  const auto num_slices = [&] { return sizes.batch * sizes.num_heads * kernel.slices_per_head(); };
  while (num_slices() < threads && kernel.slice_channels > 8) {
    kernel.slice_channels /= 2;
  }
  advise_huge_pages(kernel.grad_value, grad_value.numel() * sizeof(Feature));
  parallel_run(kernel, num_slices(), 1);
}

}  // namespace reimplementation::attention
