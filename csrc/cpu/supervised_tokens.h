// The supervised tokens of a batch: the fused loss gathers their rows, so that ignored ones cost nothing.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace lead_fast::cpu {

using torch::stable::Tensor;

// In order; results are indexed by place in this list.
struct SupervisedTokens {
  std::vector<int64_t> position;  // in the batch
  std::vector<int64_t> label;     // -1 where out of range
  std::vector<float> scale;
  int64_t bad = 0;

  SupervisedTokens(const Tensor& labels, const Tensor& token_scale, int64_t ignore_index, int64_t vocab) {
    const int64_t* label_of = labels.const_data_ptr<int64_t>();
    const float* scale_of = token_scale.const_data_ptr<float>();
    for (int64_t t = 0; t < labels.numel(); ++t) {
      if (label_of[t] == ignore_index) continue;
      const bool in_range = 0 <= label_of[t] && label_of[t] < vocab;
      bad += !in_range;
      position.push_back(t);
      label.push_back(in_range ? label_of[t] : -1);
      scale.push_back(scale_of[t]);
    }
  }

  int64_t size() const { return static_cast<int64_t>(position.size()); }

  // Where each sample's tokens begin in the list.
  std::vector<int64_t> starts(const std::vector<int64_t>& cu_seqlens) const {
    std::vector<int64_t> result;
    for (const int64_t boundary : cu_seqlens) {
      result.push_back(std::lower_bound(position.begin(), position.end(), boundary) - position.begin());
    }
    return result;
  }
};

// Rows `position` of `from` [T, width], or `from` itself when that is all of them.
inline Tensor gather(const Tensor& from, const std::vector<int64_t>& position) {
  if (static_cast<int64_t>(position.size()) == from.size(0)) return from;
  const size_t bytes = from.size(1) * from.element_size();
  const Tensor rows =
      torch::stable::new_empty(from, std::vector<int64_t>{static_cast<int64_t>(position.size()), from.size(1)});
  const char* in = static_cast<const char*>(from.const_data_ptr());
  char* out = static_cast<char*>(rows.mutable_data_ptr());
  for (size_t m = 0; m < position.size(); ++m) std::memcpy(out + m * bytes, in + position[m] * bytes, bytes);
  return rows;
}

// The other way: [tokens, width] with rows[m] at position[m] and zeros elsewhere.
inline Tensor scatter(const Tensor& rows, const std::vector<int64_t>& position, int64_t tokens) {
  if (rows.size(0) == tokens) return rows;
  const size_t bytes = rows.size(1) * rows.element_size();
  const Tensor to = torch::stable::new_zeros(rows, std::vector<int64_t>{tokens, rows.size(1)});
  const char* in = static_cast<const char*>(rows.const_data_ptr());
  char* out = static_cast<char*>(to.mutable_data_ptr());
  for (size_t m = 0; m < position.size(); ++m) std::memcpy(out + position[m] * bytes, in + m * bytes, bytes);
  return to;
}

}  // namespace lead_fast::cpu
