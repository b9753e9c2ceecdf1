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

// At least `numel` fp32 values in `buffer`, aligned as torch aligns: where memory lies changes the bits of some
// products.
float* reserve(std::optional<Tensor>& buffer, int64_t numel);

// out = a b
void multiply(const Matrix& a, const Matrix& b, const Matrix& out);

// out += a b, fp32, by torch.mm's library: no copy of a transposed operand, no scratch.
void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out);

// a w^T + bias, contiguous: a new tensor, or made in `scratch` (grown as needed, to be passed again) where torch can
// write there. `bias` is [a.rows, w.rows] with row_stride 0, or null; the sum is rounded once. fp32 without a bias goes
// through oneDNN on AVX-512: MKL, which serves torch.mm, runs at half its speed on Zen 5 (and level with it on Zen 4).
Tensor linear(const Matrix& a, const Matrix& w, std::optional<Tensor>& scratch, const Matrix* bias = nullptr);

}  // namespace lead_fast::cpu
