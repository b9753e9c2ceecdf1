// lead_fast::linear_cross_entropy.cpp for CPU tensors: the contract is in lead_fast/reference.py, the schema in
// lead_fast/ops.py.
//
// Supervised tokens are gathered first, so that ignored ones cost nothing, and go through in chunks:
//   a = h W^T              product, [rows, V]; in bf16 with the bias
//   a <- d nll / d a       row_kernels.h, in place
//   d = a W                product
//   dW += a^T (scale * h)  product, only with a trained head
// The logits of one chunk are all that is ever held.
//
// The floor at (T, H, V) = (2048, 576, 49152) in fp32: two products of 116 GFLOP; 16 chunks that each read W (113 MB)
// twice, 3.6 GB; and 4 passes over 403 MB of logits (written, read and written by the row kernel, read), which meet
// main memory only where a chunk outgrows the last-level cache. The row kernel takes two exponentials a logit.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/cpu_features.h"
#include "cpu/grad_norm.h"
#include "cpu/matmul.h"
#include "cpu/row_kernels.h"
#include "cpu/supervised_tokens.h"
#include "ops/linear_cross_entropy.h"

namespace {

using lead_fast::StatsLevel;
using lead_fast::cpu::grain;
using lead_fast::cpu::LogitMap;
using lead_fast::cpu::Matrix;
using lead_fast::cpu::StoredRows;
using lead_fast::cpu::SupervisedTokens;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Rows of a chunk. Logits of 24 MiB stay in a server's last-level cache and in memory that malloc keeps; where that
// would be fewer than 128 rows, too few for a product that reads all of W, 192 rows go through main memory. Measured on
// Zen 5.
int64_t chunk_rows(int64_t vocab, int64_t bytes) {
  const int64_t rows = (int64_t{24} << 20) / (vocab * bytes) / 16 * 16;
  return rows < 128 ? 192 : std::min<int64_t>(rows, 512);
}

std::vector<int64_t> to_vector(const Tensor& integers) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(integers, ScalarType::Long));
  const int64_t* data = wide.const_data_ptr<int64_t>();
  return {data, data + wide.numel()};
}

void check_covers(const std::vector<int64_t>& cu_seqlens, int64_t tokens) {
  STD_TORCH_CHECK(
      cu_seqlens.front() == 0 && cu_seqlens.back() == tokens && std::is_sorted(cu_seqlens.begin(), cu_seqlens.end()),
      "linear_cross_entropy: `cu_seqlens` must be [S + 1] from 0 to ", tokens, ", not decreasing");
}

// What the chunks leave behind: per-token results and the gradients that were asked for (null otherwise).
template <class Stored>
struct Results {
  std::vector<float> nll, logit_grad_sq;
  Stored* d_hidden = nullptr;  // [M, H]
  float* d_weight = nullptr;   // [V, H]
  float* d_bias = nullptr;     // [V]
};

template <class Stored>
class Chunks {
 public:
  Chunks(Stored* hidden, Stored* weight, Stored* bias, int64_t width, ScalarType dtype, const LogitMap& map,
         const SupervisedTokens& tokens, const StoredRows<Stored>& rows, Results<Stored>& results)
      : hidden_(hidden),
        bias_(bias),
        width_(width),
        dtype_(dtype),
        map_(map),
        tokens_(tokens),
        rows_(rows),
        results_(results),
        weight_{weight, dtype, map.vocab, width, width} {
    results_.nll.resize(tokens.size());
    results_.logit_grad_sq.resize(tokens.size());
  }

  void run(bool gradient) {
    const int64_t step = chunk_rows(map_.vocab, sizeof(Stored));
    for (int64_t begin = 0; begin < tokens_.size(); begin += step) {
      const int64_t end = std::min(begin + step, tokens_.size());
      const Matrix h = {hidden_ + begin * width_, dtype_, end - begin, width_, width_};
      const Matrix bias = {bias_, dtype_, h.rows, map_.vocab, 0};
      const Tensor logits = lead_fast::cpu::linear(h, weight_, logits_scratch_, bias_ == nullptr ? nullptr : &bias);
      const Matrix a = {logits.data_ptr(), dtype_, h.rows, map_.vocab, map_.vocab};
      loss_and_gradient(a, begin, gradient);
      if (results_.d_hidden != nullptr) {
        const Tensor d = lead_fast::cpu::linear(a, weight_.t(), d_scratch_);
        std::memcpy(results_.d_hidden + begin * width_, d.data_ptr(), h.rows * width_ * sizeof(Stored));
      }
      if (results_.d_bias != nullptr) add_bias_grad(a, begin);
      if (results_.d_weight != nullptr) add_weight_grad(a, h, begin);
    }
  }

 private:
  Stored* row(const Matrix& a, int64_t r) const { return static_cast<Stored*>(a.data) + r * a.row_stride; }

  void loss_and_gradient(const Matrix& a, int64_t first, bool gradient) {
    parallel_for(0, a.rows, grain(map_.vocab), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t label = tokens_.label[first + r];
        // All bits set is a NaN in fp32 and in bf16: one makes the loss and the whole gradient of its row NaN.
        if (label < 0) std::memset(row(a, r), 0xff, sizeof(Stored));
        const auto loss = rows_.loss(row(a, r), std::max<int64_t>(label, 0), map_, gradient);
        results_.nll[first + r] = loss.nll;
        results_.logit_grad_sq[first + r] = loss.logit_grad_sq;
      }
    });
  }

  void add_bias_grad(const Matrix& a, int64_t first) {
    parallel_for(0, map_.vocab, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t r = 0; r < a.rows; ++r) {
        const float scale = tokens_.scale[first + r];
        if (scale != 0) rows_.add(row(a, r) + begin, scale, results_.d_bias + begin, end - begin);
      }
    });
  }

  // The scales go to h, which is smaller than `a`; a row of scale 0 is cleared on both sides, since 0 * NaN is NaN.
  // `a` is not needed any more. In fp32 also for bf16, whose products torch would round before they are summed, by
  // column tiles that stay in the cache.
  void add_weight_grad(const Matrix& a, const Matrix& h, int64_t first) {
    constexpr int64_t tile = 4096;
    float* scaled_rows = lead_fast::cpu::reserve(scaled_, a.rows * width_);
    const Matrix scaled = {scaled_rows, ScalarType::Float, a.rows, width_, width_};
    for (int64_t r = 0; r < a.rows; ++r) {
      rows_.scale_to_f32(row(h, r), tokens_.scale[first + r], scaled_rows + r * width_, width_);
      if (tokens_.scale[first + r] == 0) std::memset(row(a, r), 0, map_.vocab * sizeof(Stored));
    }
    if (dtype_ == ScalarType::Float) return add_product(a, scaled, 0);
    float* column_rows = lead_fast::cpu::reserve(columns_, a.rows * std::min(tile, map_.vocab));
    for (int64_t v = 0; v < map_.vocab; v += tile) {
      const int64_t cols = std::min(tile, map_.vocab - v);
      parallel_for(0, a.rows, grain(cols), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) rows_.scale_to_f32(row(a, r) + v, 1, column_rows + r * cols, cols);
      });
      add_product({column_rows, ScalarType::Float, a.rows, cols, cols}, scaled, v);
    }
  }

  // dW[v : v + columns.cols] += columns^T scaled
  void add_product(const Matrix& columns, const Matrix& scaled, int64_t v) {
    float* to = results_.d_weight + v * width_;
    if (!lead_fast::cpu_features().amd_wide) {
      return lead_fast::cpu::multiply_add(columns.t(), scaled, {to, ScalarType::Float, columns.cols, width_, width_});
    }
    // There the detour through oneDNN is the faster way, a copy and a sum included.
    const Tensor product = lead_fast::cpu::linear(columns.t(), scaled.t(), product_scratch_);
    const float* from = product.const_data_ptr<float>();
    parallel_for(0, columns.cols, grain(width_), [&](int64_t begin, int64_t end) {
      const auto add = lead_fast::cpu::row_kernels().f32.add;
      add(from + begin * width_, 1, to + begin * width_, (end - begin) * width_);
    });
  }

  Stored* hidden_;
  Stored* bias_;
  int64_t width_;
  ScalarType dtype_;
  LogitMap map_;
  const SupervisedTokens& tokens_;
  const StoredRows<Stored>& rows_;
  Results<Stored>& results_;
  Matrix weight_;
  std::optional<Tensor> logits_scratch_, d_scratch_, product_scratch_, scaled_, columns_;
};

Tensor to_fp32(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// [S, 5]; `hidden` and `d_hidden` [M, H] are needed for StatsLevel::kAll.
Tensor sample_stats(const SupervisedTokens& tokens, const std::vector<int64_t>& cu_seqlens,
                    const std::vector<float>& nll, const std::vector<float>& logit_grad_sq, const Tensor& hidden,
                    const Tensor& d_hidden, StatsLevel level) {
  const std::vector<int64_t> starts = tokens.starts(cu_seqlens);
  const int64_t samples = level == StatsLevel::kNone ? 0 : static_cast<int64_t>(starts.size()) - 1;
  const Tensor stats = torch::stable::new_zeros(hidden, std::vector<int64_t>{samples, 5}, ScalarType::Float);
  float* out = stats.mutable_data_ptr<float>();
  const bool all = level == StatsLevel::kAll;
  std::vector<double> hidden_grad_sq(tokens.size(), kNan), norms(samples, kNan);
  if (all) {
    const Tensor h = to_fp32(hidden), d = to_fp32(d_hidden);
    float* gradients = d.mutable_data_ptr<float>();
    const int64_t width = d.size(1);
    parallel_for(0, tokens.size(), grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        const float* row = gradients + m * width;
        hidden_grad_sq[m] = lead_fast::cpu::row_kernels().dot(row, row, width);
      }
    });
    norms = lead_fast::cpu::grad_norms(gradients, h.mutable_data_ptr<float>(), width, starts);
  }
  for (int64_t i = 0; i < samples; ++i, out += 5) {
    const int64_t begin = starts[i], end = starts[i + 1];
    if (begin == end) continue;
    double sums[3] = {};
    for (int64_t m = begin; m < end; ++m) {
      sums[0] += nll[m];
      sums[1] += all ? logit_grad_sq[m] : kNan;
      sums[2] += hidden_grad_sq[m];
    }
    const double n = static_cast<double>(end - begin);
    const double columns[5] = {sums[0] / n, n, sums[1] / n, sums[2] / n, norms[i]};
    std::copy(columns, columns + 5, out);
  }
  return stats;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Stored>
Outputs forward(const Tensor& hidden, const Tensor& weight, void* product_bias, LogitMap map,
                const SupervisedTokens& tokens, const std::vector<int64_t>& cu_seqlens, const StoredRows<Stored>& rows,
                bool hidden_grad, bool weight_grad, bool bias_grad, StatsLevel level) {
  const int64_t num_tokens = hidden.size(0), width = hidden.size(1);
  const bool all = level == StatsLevel::kAll, needs_d = hidden_grad || all;
  const auto zeros = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_zeros(hidden, sizes, dtype);
  };
  const Tensor supervised = lead_fast::cpu::gather(hidden, tokens.position);
  const Tensor d_rows = needs_d ? torch::stable::empty_like(supervised) : zeros({0}, hidden.scalar_type());
  const Tensor d_weight =
      zeros(weight_grad ? std::vector{map.vocab, width} : std::vector<int64_t>{0}, ScalarType::Float);
  const Tensor d_bias = zeros({bias_grad ? map.vocab : 0}, ScalarType::Float);

  Results<Stored> results;
  if (needs_d) results.d_hidden = static_cast<Stored*>(d_rows.mutable_data_ptr());
  if (weight_grad) results.d_weight = d_weight.mutable_data_ptr<float>();
  if (bias_grad) results.d_bias = d_bias.mutable_data_ptr<float>();
  auto* h = static_cast<Stored*>(supervised.mutable_data_ptr());
  auto* w = static_cast<Stored*>(weight.mutable_data_ptr());
  auto* b = static_cast<Stored*>(product_bias);
  Chunks<Stored>(h, w, b, width, hidden.scalar_type(), map, tokens, rows, results)
      .run(needs_d || weight_grad || bias_grad);

  const Tensor nll = zeros({num_tokens}, ScalarType::Float), loss = zeros({}, ScalarType::Float);
  double total = 0;
  for (int64_t m = 0; m < tokens.size(); ++m) {
    nll.mutable_data_ptr<float>()[tokens.position[m]] = results.nll[m];
    if (tokens.scale[m] != 0) total += double(tokens.scale[m]) * results.nll[m];
  }
  *loss.mutable_data_ptr<float>() = static_cast<float>(total);
  const Tensor bad = zeros({}, ScalarType::Long);
  *bad.mutable_data_ptr<int64_t>() = tokens.bad;
  const Tensor statistics =
      sample_stats(tokens, cu_seqlens, results.nll, results.logit_grad_sq, supervised, d_rows, level);
  const Tensor d_hidden =
      hidden_grad ? lead_fast::cpu::scatter(d_rows, tokens.position, num_tokens) : zeros({0}, hidden.scalar_type());
  return {loss, nll, d_hidden, d_weight, d_bias, statistics, bad};
}

Outputs linear_cross_entropy(Tensor hidden, Tensor weight, std::optional<Tensor> bias, Tensor labels, Tensor cu_seqlens,
                             Tensor token_scale, int64_t ignore_index, double softcap, double logit_scale,
                             bool hidden_grad, bool weight_grad, bool bias_grad, int64_t stats) {
  lead_fast::check_linear_cross_entropy(hidden, weight, bias, labels, cu_seqlens, token_scale, stats);
  const std::vector<int64_t> boundaries = to_vector(cu_seqlens);
  check_covers(boundaries, hidden.size(0));
  hidden = torch::stable::contiguous(hidden);
  weight = torch::stable::contiguous(weight);
  // The row kernel adds the bias in fp32; in bf16 the product does, which rounds after it: where both are large and
  // their sum is small, a logit rounded before would have no digits left.
  const bool fp32 = hidden.scalar_type() == ScalarType::Float;
  const Tensor whole_bias = torch::stable::contiguous(bias.value_or(token_scale));
  void* bias_data = bias.has_value() ? whole_bias.mutable_data_ptr() : nullptr;
  const LogitMap map = {weight.size(0), fp32 ? static_cast<const float*>(bias_data) : nullptr,
                        static_cast<float>(logit_scale), static_cast<float>(softcap)};
  const SupervisedTokens tokens(torch::stable::contiguous(labels), torch::stable::contiguous(token_scale), ignore_index,
                                map.vocab);

  const auto& kernels = lead_fast::cpu::row_kernels();
  const auto level = static_cast<StatsLevel>(stats);
  const auto run = [&](const auto& rows) {
    return forward(hidden, weight, fp32 ? nullptr : bias_data, map, tokens, boundaries, rows, hidden_grad, weight_grad,
                   bias_grad, level);
  };
  if (fp32) return run(kernels.f32);
  STD_TORCH_CHECK(hidden.scalar_type() == ScalarType::BFloat16,
                  "linear_cross_entropy: `hidden` must be fp32 or bf16 on the CPU, got another dtype");
  return run(kernels.bf16);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CPU, library) {
  library.impl("linear_cross_entropy.cpp", TORCH_BOX(&linear_cross_entropy));
}
