// With n tokens and n <= width the Gram matrices are smaller: G = sum_{t,t'} <d_t, d_t'> <h_t, h_t'>, of which one
// half is computed, without a call of a matrix product: a sample is too small for its overhead and its barriers.
// Longer samples: the columns of D^T H, by torch's products.
#include "cpu/grad_norm.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "cpu/matmul.h"
#include "cpu/row_kernels.h"

namespace lead_fast::cpu {

namespace {

constexpr int64_t kOuterRows = 256;  // of D^T H at once
constexpr int64_t kGramRows = 64;    // a thread's part of a sample's Gram matrices

Matrix rows_of(float* data, int64_t width, int64_t begin, int64_t end) {
  return {data + begin * width, ScalarType::Float, end - begin, width, width};
}

// Rows [begin, end) of the Gram matrices of the sample whose tokens start at `start`.
struct GramPart {
  int64_t sample, start, begin, end;
  double sum;

  int64_t inner_products() const { return (end - begin) * (begin + end); }
};

// Threads take the largest part that is left, so that none waits long for the last.
void sum_grams(const float* d, const float* h, int64_t width, std::vector<GramPart>& parts) {
  std::stable_sort(parts.begin(), parts.end(),
                   [](const GramPart& a, const GramPart& b) { return a.inner_products() > b.inner_products(); });
  std::atomic<size_t> next{0};
  int64_t work = 0;
  for (const GramPart& part : parts) work += part.inner_products();
  const int64_t worthwhile = std::max<int64_t>(1, work / grain(width));
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), worthwhile);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < parts.size(); i = next++) {
      GramPart& part = parts[i];
      const int64_t offset = part.start * width;
      part.sum = row_kernels().gram(d + offset, h + offset, part.begin, part.end, width);
    }
  });
}

// || D^T H ||^2 of one sample; the products and the sums over their tiles are threaded.
class OuterProduct {
 public:
  OuterProduct(float* d, float* h, int64_t width) : d_(d), h_(h), width_(width), rows_(kOuterRows) {}

  double norm(int64_t begin, int64_t end) {
    float* const product = reserve(product_, kOuterRows * width_);
    double total = 0;
    for (int64_t a = 0; a < width_; a += kOuterRows) {
      const int64_t rows = std::min(kOuterRows, width_ - a);
      const Matrix d_columns = {d_ + begin * width_ + a, ScalarType::Float, end - begin, rows, width_};
      multiply(d_columns.t(), rows_of(h_, width_, begin, end), {product, ScalarType::Float, rows, width_, width_});
      torch::stable::parallel_for(0, rows, grain(width_), [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; ++r) {
          const float* x = product + r * width_;
          rows_[r] = row_kernels().dot(x, x, width_);
        }
      });
      for (int64_t r = 0; r < rows; ++r) total += rows_[r];
    }
    return total;
  }

 private:
  float *d_, *h_;
  int64_t width_;
  std::optional<Tensor> product_;
  std::vector<double> rows_;
};

}  // namespace

std::vector<double> grad_norms(float* d, float* h, int64_t width, const std::vector<int64_t>& starts) {
  const int64_t samples = static_cast<int64_t>(starts.size()) - 1;
  std::vector<double> norms(samples);
  std::vector<GramPart> parts;
  OuterProduct outer(d, h, width);
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t n = starts[i + 1] - starts[i];
    if (n > width) {
      norms[i] = outer.norm(starts[i], starts[i + 1]);
      continue;
    }
    for (int64_t t = 0; t < n; t += kGramRows) parts.push_back({i, starts[i], t, std::min(t + kGramRows, n), 0});
  }
  sum_grams(d, h, width, parts);
  std::stable_sort(parts.begin(), parts.end(), [](const GramPart& a, const GramPart& b) {
    return a.sample != b.sample ? a.sample < b.sample : a.begin < b.begin;
  });
  for (const GramPart& part : parts) norms[part.sample] += part.sum;
  // Where a sample's gradients cancel, rounding may leave less than nothing; NaN stays.
  for (double& norm : norms) norm = norm < 0 ? 0 : norm;
  return norms;
}

}  // namespace lead_fast::cpu
