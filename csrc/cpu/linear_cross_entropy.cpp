// lead_fast::linear_cross_entropy.cpp for CPU tensors: the contract is in lead_fast/reference.py, the schema in
// lead_fast/ops.py.
//
// Supervised tokens are gathered first, so that ignored ones cost nothing. Their losses and gradients come from
// tiled_loss.cpp in fp32, and from product_loss.cpp in bf16 and on CPUs without tile kernels; the samples' statistics
// are made of them here.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/grad_norm.h"
#include "cpu/loss_results.h"
#include "cpu/product_loss.h"
#include "cpu/row_kernels.h"
#include "cpu/supervised_tokens.h"
#include "cpu/tile_kernels.h"
#include "cpu/tiled_loss.h"
#include "ops/linear_cross_entropy.h"

namespace {

using lead_fast::StatsLevel;
using lead_fast::cpu::grain;
using lead_fast::cpu::LogitMap;
using lead_fast::cpu::LossResults;
using lead_fast::cpu::StoredRows;
using lead_fast::cpu::SupervisedTokens;
using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

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

constexpr int64_t kFewestForTiles = 24;  // fewer leave too much of a panel's lanes empty; measured on Zen 4

void losses_and_gradients(float* hidden, float* weight, float* bias, int64_t width, const LogitMap& map,
                          const SupervisedTokens& tokens, const StoredRows<float>& rows, bool gradient,
                          LossResults<float>& results) {
  const auto* tiles = lead_fast::cpu::tile_kernels();
  if (tiles != nullptr && tokens.size() >= kFewestForTiles) {
    lead_fast::cpu::tiled_loss(hidden, weight, width, map, tokens, *tiles, gradient, results);
  } else {
    lead_fast::cpu::product_loss(hidden, weight, bias, width, map, tokens, rows, gradient, results);
  }
}

void losses_and_gradients(uint16_t* hidden, uint16_t* weight, uint16_t* bias, int64_t width, const LogitMap& map,
                          const SupervisedTokens& tokens, const StoredRows<uint16_t>& rows, bool gradient,
                          LossResults<uint16_t>& results) {
  lead_fast::cpu::product_loss(hidden, weight, bias, width, map, tokens, rows, gradient, results);
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

  LossResults<Stored> results(tokens.size());
  if (needs_d) results.d_hidden = static_cast<Stored*>(d_rows.mutable_data_ptr());
  if (weight_grad) results.d_weight = d_weight.mutable_data_ptr<float>();
  if (bias_grad) results.d_bias = d_bias.mutable_data_ptr<float>();
  auto* h = static_cast<Stored*>(supervised.mutable_data_ptr());
  auto* w = static_cast<Stored*>(weight.mutable_data_ptr());
  auto* b = static_cast<Stored*>(product_bias);
  const bool gradient = needs_d || weight_grad || bias_grad;
  losses_and_gradients(h, w, b, width, map, tokens, rows, gradient, results);

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
