// Sums over the rows of a matrix, in an order that depends on its size alone: the gradient of a bias.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace reimplementation::sums {

using torch::stable::Tensor;

// From (rows, columns) of float32 or float64, whose columns are neighbours in memory, to (columns,).
Tensor sum_rows_cpu(const Tensor& matrix);
Tensor sum_rows_cuda(const Tensor& matrix);

}  // namespace reimplementation::sums
