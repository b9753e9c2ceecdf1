// EXP3 over the arms that still have something to give, in log weights.
//
//   P_k = (1 - gamma) * softmax over A (log w)_k + gamma / |A|   for k in A, 0 elsewhere;   A = the arms that `mask`
//   holds
//
// Source: Auer, Cesa-Bianchi, Freund, Schapire, "The nonstochastic multiarmed bandit problem", SIAM J. Comput. 2002.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace lead_fast {

// Writes the probabilities of `num_arms` arms; sums run in arm order, in fp64. At least one arm must be in A, with a
// log weight above -inf. The maximum is taken over A only, so that a retired arm cannot underflow the others.
inline void exp3_probs(const double* log_w,  // [num_arms]
                       const bool* mask,     // [num_arms]
                       double gamma, std::int64_t num_arms,
                       double* probs) {  // [num_arms]
  double maximum = -std::numeric_limits<double>::infinity();
  std::int64_t size_of_a = 0;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (!mask[k]) continue;
    ++size_of_a;
    if (log_w[k] > maximum) maximum = log_w[k];
  }

  double total = 0.0;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    probs[k] = mask[k] ? std::exp(log_w[k] - maximum) : 0.0;
    total += probs[k];
  }
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (mask[k]) probs[k] = (1.0 - gamma) * (probs[k] / total) + gamma / static_cast<double>(size_of_a);
  }
}

// The arm whose cumulative probability first exceeds `uniform` in [0, 1] of the total, or -1 when no probability is
// above 0. An arm of probability 0 is never drawn; where rounding leaves no such arm, the last possible one is.
inline std::int64_t exp3_draw(const double* probs,  // [num_arms]
                              std::int64_t num_arms, double uniform) {
  double total = 0.0;
  for (std::int64_t k = 0; k < num_arms; ++k) total += probs[k];

  double cumulative = 0.0;
  std::int64_t last_possible = -1;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (!(probs[k] > 0.0)) continue;
    cumulative += probs[k];
    last_possible = k;
    if (cumulative > uniform * total) break;
  }
  return last_possible;
}

}  // namespace lead_fast
