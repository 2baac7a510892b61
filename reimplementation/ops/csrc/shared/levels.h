// Level metadata (shapes and first rows) as the kernels read it: bounded by the rows that there are.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

#include "shared/platform.h"
#include "shared/tensors.h"

namespace reimplementation {

struct Level {
  int height;
  int width;
  int start;  // first row

  // A level that is empty or does not fit its features: nothing may be read from it.
  HOST_DEVICE bool empty() const {
    return height == 0;
  }
};

// Integer tensors (levels, 2) and (levels), either of them int32 or int64.
struct LevelTable {
  const void* shapes;
  const void* starts;
  bool shapes_are_wide;
  bool starts_are_wide;
  int64_t num_rows;  // at most INT_MAX

  // Level number i; empty where the metadata reaches beyond the rows.
  HOST_DEVICE Level operator[](int64_t i) const {
    const int64_t height = read(shapes, shapes_are_wide, 2 * i);
    const int64_t width = read(shapes, shapes_are_wide, 2 * i + 1);
    const int64_t start = read(starts, starts_are_wide, i);
    const auto is_side = [&](int64_t size) {
      return static_cast<uint64_t>(size) - 1 < static_cast<uint64_t>(num_rows);
    };
    const bool fits = is_side(height) & is_side(width) & (start >= 0) & (start <= num_rows) &&
        static_cast<int64_t>(static_cast<uint32_t>(height)) * static_cast<uint32_t>(width) <= num_rows - start;
    return fits ? Level{static_cast<int>(height), static_cast<int>(width), static_cast<int>(start)} : Level{0, 0, 0};
  }

 private:
  HOST_DEVICE static int64_t read(const void* data, bool wide, int64_t i) {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// What the metadata of an op is called in errors.
struct LevelNames {
  const char* shapes;
  const char* starts;
  const char* rows;
};

// Refuses a level that reaches beyond the rows. Metadata on a GPU is not looked at, that would wait for it: kernels take such a
// level for an empty one.
inline void check_levels_fit(
    const torch::stable::Tensor& shapes,
    const torch::stable::Tensor& starts,
    int64_t num_rows,
    const LevelNames& names) {
  using torch::headeronly::ScalarType;
  if (!shapes.is_cpu() || !starts.is_cpu()) {
    return;
  }
  const torch::stable::Tensor wide_shapes = as_contiguous(as_type(shapes, ScalarType::Long));
  const torch::stable::Tensor wide_starts = as_contiguous(as_type(starts, ScalarType::Long));
  const int64_t* shape = static_cast<const int64_t*>(wide_shapes.const_data_ptr());
  const int64_t* start = static_cast<const int64_t*>(wide_starts.const_data_ptr());
  for (int64_t left = starts.numel(); left > 0; --left, shape += 2, ++start) {
    const int64_t height = shape[0], width = shape[1];
    const bool empty = height == 0 || width == 0;
    const bool fits = height >= 0 && width >= 0 && *start >= 0 && *start <= num_rows &&
        (empty || (height <= num_rows && width <= num_rows && height * width <= num_rows - *start));
    STD_TORCH_CHECK(
        fits, names.shapes, " and ", names.starts, " must stay within ", names.rows, "=", num_rows,
        " rows; got a level of ", height, " x ", width, " that starts at row ", *start);
  }
}

// Integer metadata as a table reads it, on the device where it is: contiguous, int32 or int64.
inline torch::stable::Tensor readable_metadata(const torch::stable::Tensor& metadata) {
  using torch::headeronly::ScalarType;
  return as_contiguous(metadata.scalar_type() == ScalarType::Int ? metadata : as_type(metadata, ScalarType::Long));
}

// The table of metadata that `readable_metadata` prepared; the tensors must outlive it.
inline LevelTable level_table(
    const torch::stable::Tensor& shapes, const torch::stable::Tensor& starts, int64_t num_rows) {
  using torch::headeronly::ScalarType;
  return {
      shapes.const_data_ptr(), starts.const_data_ptr(), shapes.scalar_type() == ScalarType::Long,
      starts.scalar_type() == ScalarType::Long, num_rows};
}

}  // namespace reimplementation
