// Argument checks that every compiled kernel of lead_fast::linear_cross_entropy shares. What the values mean is in
// lead_fast/reference.py.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace lead_fast {

enum class StatsLevel : int64_t { kNone = 0, kLoss = 1, kAll = 2 };

inline void check_linear_cross_entropy(const torch::stable::Tensor& hidden, const torch::stable::Tensor& weight,
                                       const std::optional<torch::stable::Tensor>& bias,
                                       const torch::stable::Tensor& labels, const torch::stable::Tensor& cu_seqlens,
                                       const torch::stable::Tensor& token_scale, int64_t stats) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(hidden.dim() == 2, "linear_cross_entropy: `hidden` must be [T, H], got ", hidden.dim(),
                  " dimensions");
  const int64_t tokens = hidden.size(0);
  const auto dtype = hidden.scalar_type();
  STD_TORCH_CHECK(hidden.size(1) > 0, "linear_cross_entropy: `hidden` must be [T, H] with H > 0, got H = 0");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden.size(1) && weight.size(0) > 0 &&
                      weight.size(0) <= std::numeric_limits<int32_t>::max(),
                  "linear_cross_entropy: `weight` must be [V, ", hidden.size(1),
                  "] with 0 < V < 2^31, got another shape");
  STD_TORCH_CHECK(weight.scalar_type() == dtype, "linear_cross_entropy: `weight` must have the dtype of `hidden`");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == dtype,
                    "linear_cross_entropy: `bias` must be [", weight.size(0), "] in the dtype of `weight`");
  }
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == tokens && labels.scalar_type() == ScalarType::Long,
                  "linear_cross_entropy: `labels` must be int64 [", tokens, "]");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 &&
                      (cu_seqlens.scalar_type() == ScalarType::Long || cu_seqlens.scalar_type() == ScalarType::Int),
                  "linear_cross_entropy: `cu_seqlens` must be int32 or int64 [S + 1]");
  STD_TORCH_CHECK(
      token_scale.dim() == 1 && token_scale.size(0) == tokens && token_scale.scalar_type() == ScalarType::Float,
      "linear_cross_entropy: `token_scale` must be fp32 [", tokens, "]");
  STD_TORCH_CHECK(0 <= stats && stats <= static_cast<int64_t>(StatsLevel::kAll),
                  "linear_cross_entropy: `stats` must be 0, 1 or 2, got ", stats);
}

}  // namespace lead_fast
