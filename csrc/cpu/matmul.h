// Matrix products of the CPU operators, done by torch over memory that stays where it is.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace lead_fast::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Matrix {
  void* data;
  ScalarType dtype;
  int64_t rows, cols, row_stride, col_stride = 1;

  Matrix t() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
};

// At least so many bytes, or fp32 values, in `buffer`, aligned as torch aligns: where memory lies changes the bits of
// some products. In huge pages where it is large enough for them: fresh memory of 50 MB costs 12,000 page faults
// otherwise.
void* reserve_bytes(std::optional<Tensor>& buffer, int64_t bytes);
float* reserve(std::optional<Tensor>& buffer, int64_t numel);

// out = a b + bias; `bias` is of the shape of `out` with row_stride 0, or null; the sum is rounded once.
void multiply(const Matrix& a, const Matrix& b, const Matrix& out, const Matrix* bias = nullptr);

// out += a b, fp32: no copy of a transposed operand, no scratch.
void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out);

}  // namespace lead_fast::cpu
