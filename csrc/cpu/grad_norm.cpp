// With n tokens and n <= width the Gram matrices are smaller: G = sum_{t,t'} <d_t, d_t'> <h_t, h_t'>. They are
// symmetric: a tile of rows [a, b) needs the columns from a on, and those from b on count twice. Longer samples: the
// columns of D^T H.
#include "cpu/grad_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>

#include "cpu/matmul.h"
#include "cpu/row_kernels.h"

namespace lead_fast::cpu {

namespace {

constexpr int64_t kTile = 256;  // rows of a Gram tile or of D^T H: with n = 4,096 two tiles take 8 MiB
constexpr int64_t kSmall = 32;  // up to here the calls of a matrix product cost more than its arithmetic

Matrix rows_of(float* data, int64_t width, int64_t begin, int64_t end) {
  return {data + begin * width, ScalarType::Float, end - begin, width, width};
}

double small_gram(const float* d, const float* h, int64_t n, int64_t width) {
  const auto dot = row_kernels().dot;
  double total = 0;
  for (int64_t t = 0; t < n; ++t) {
    const float *d_t = d + t * width, *h_t = h + t * width;
    total += dot(d_t, d_t, width) * dot(h_t, h_t, width);
    for (int64_t u = 0; u < t; ++u) total += 2 * dot(d_t, d + u * width, width) * dot(h_t, h + u * width, width);
  }
  return total;
}

// One sample at a time; the products and the sums over their tiles are threaded.
class LargeSample {
 public:
  LargeSample(float* d, float* h, int64_t width, int64_t longest) : d_(d), h_(h), width_(width), rows_(kTile) {
    const int64_t numel = kTile * std::min(longest, width);
    float* tiles = reserve(tiles_, 2 * numel);
    first_ = tiles, second_ = tiles + numel;
  }

  double gram(int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t a = begin; a < end; a += kTile) {
      const int64_t rows = std::min(kTile, end - a), cols = end - a;
      const Matrix first = tile(first_, rows, cols), second = tile(second_, rows, cols);
      multiply(rows_of(d_, width_, a, a + rows), rows_of(d_, width_, a, end).t(), first);
      multiply(rows_of(h_, width_, a, a + rows), rows_of(h_, width_, a, end).t(), second);
      total += sum_rows(rows, [&](int64_t r) {
        const float *x = first_ + r * cols, *y = second_ + r * cols;
        return row_kernels().dot(x, y, rows) + 2 * row_kernels().dot(x + rows, y + rows, cols - rows);
      });
    }
    return total;
  }

  double outer(int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t a = 0; a < width_; a += kTile) {
      const int64_t rows = std::min(kTile, width_ - a);
      const Matrix d_columns = {d_ + begin * width_ + a, ScalarType::Float, end - begin, rows, width_};
      multiply(d_columns.t(), rows_of(h_, width_, begin, end), tile(first_, rows, width_));
      total += sum_rows(rows, [&](int64_t r) {
        const float* x = first_ + r * width_;
        return row_kernels().dot(x, x, width_);
      });
    }
    return total;
  }

 private:
  static Matrix tile(float* buffer, int64_t rows, int64_t cols) {
    return {buffer, ScalarType::Float, rows, cols, cols};
  }

  template <class Value>
  double sum_rows(int64_t rows, const Value& value) {
    torch::stable::parallel_for(0, rows, grain(width_), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) rows_[r] = value(r);
    });
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) total += rows_[r];
    return total;
  }

  float *d_, *h_;
  int64_t width_;
  std::optional<Tensor> tiles_;
  float *first_, *second_;
  std::vector<double> rows_;
};

}  // namespace

std::vector<double> grad_norms(float* d, float* h, int64_t width, const std::vector<int64_t>& starts) {
  const int64_t samples = static_cast<int64_t>(starts.size()) - 1;
  std::vector<double> norms(samples);
  int64_t longest = 0;
  for (int64_t i = 0; i < samples; ++i) longest = std::max(longest, starts[i + 1] - starts[i]);
  torch::stable::parallel_for(0, samples, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = starts[i + 1] - starts[i];
      if (n <= kSmall) norms[i] = small_gram(d + starts[i] * width, h + starts[i] * width, n, width);
    }
  });
  if (longest > kSmall) {
    LargeSample large(d, h, width, longest);
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t n = starts[i + 1] - starts[i];
      if (n > kSmall)
        norms[i] = n <= width ? large.gram(starts[i], starts[i + 1]) : large.outer(starts[i], starts[i + 1]);
    }
  }
  // Where a sample's gradients cancel, rounding may leave less than nothing; NaN stays.
  for (double& norm : norms) norm = norm < 0 ? 0 : norm;
  return norms;
}

}  // namespace lead_fast::cpu
