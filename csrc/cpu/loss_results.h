// What the fused loss leaves behind, whichever way it went.
#pragma once

#include <cstdint>
#include <vector>

namespace lead_fast::cpu {

// Of the M supervised tokens; gradients that were not asked for are null.
template <class Stored>
struct LossResults {
  std::vector<float> nll, logit_grad_sq;  // [M]
  Stored* d_hidden = nullptr;             // [M, H], set
  float* d_weight = nullptr;              // [V, H], added to
  float* d_bias = nullptr;                // [V], added to

  explicit LossResults(int64_t tokens) : nll(tokens), logit_grad_sq(tokens) {}
};

}  // namespace lead_fast::cpu
