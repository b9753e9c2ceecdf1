// The EXP3 family over the arms that still have something to give, in log weights, fp64 throughout.
//
//   P_k = (1 - gamma) * softmax over A (log w)_k + gamma / |A|   for k in A, 0 elsewhere;   A = the arms that `mask`
//   holds
//
// Source: Auer, Cesa-Bianchi, Freund, Schapire, "The nonstochastic multiarmed bandit problem", SIAM J. Comput. 2002
// (EXP3, EXP3.S); Neu, "Explore no more", NeurIPS 2015 (EXP3-IX); Welford, Technometrics 1962 (running variance).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/host_device.h"

namespace lead_fast {

constexpr int kExp3 = 0, kExp3Ix = 1, kExp3s = 2;               // variant; any other leaves the weights alone
constexpr int kCount = 0, kMean = 1, kSquares = 2;              // entries of a reward scale
constexpr double kRelativeFloor = 0.05, kAbsoluteFloor = 1e-6;  // of the deviation that rewards are scaled by
constexpr double kRewardsBeforeScaling = 3.0;

// The largest log weight over A, -inf where A is empty.
LEAD_FAST_HOST_DEVICE inline double exp3_maximum(const double* log_w, const bool* mask, std::int64_t num_arms) {
  double maximum = -HUGE_VAL;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (mask[k] && log_w[k] > maximum) maximum = log_w[k];
  }
  return maximum;
}

LEAD_FAST_HOST_DEVICE inline std::int64_t exp3_size(const bool* mask, std::int64_t num_arms) {
  std::int64_t size = 0;
  for (std::int64_t k = 0; k < num_arms; ++k) size += mask[k];
  return size;
}

// The logarithm of the total weight over A.
LEAD_FAST_HOST_DEVICE inline double exp3_log_total(const double* log_w, const bool* mask, std::int64_t num_arms) {
  const double maximum = exp3_maximum(log_w, mask, num_arms);
  double total = 0.0;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (mask[k]) total += std::exp(log_w[k] - maximum);
  }
  return maximum + std::log(total);
}

// Writes the probabilities of `num_arms` arms; sums run in arm order. Of the arms in A at least one must have a log
// weight above -inf; where A is empty, all are 0. The maximum is taken over A only, so that a retired arm cannot
// underflow the others.
LEAD_FAST_HOST_DEVICE inline void exp3_probs(const double* log_w,  // [num_arms]
                                             const bool* mask,     // [num_arms]
                                             double gamma, std::int64_t num_arms,
                                             double* probs) {  // [num_arms]
  const double maximum = exp3_maximum(log_w, mask, num_arms);
  const auto size = static_cast<double>(exp3_size(mask, num_arms));
  double total = 0.0;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    probs[k] = mask[k] ? std::exp(log_w[k] - maximum) : 0.0;
    total += probs[k];
  }
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (mask[k]) probs[k] = (1.0 - gamma) * (probs[k] / total) + gamma / size;
  }
}

// The arm whose cumulative probability first exceeds `uniform` in [0, 1] of the total, or -1 when no probability is
// above 0. An arm of probability 0 is never drawn; where rounding leaves no such arm, the last possible one is.
LEAD_FAST_HOST_DEVICE inline std::int64_t exp3_draw(const double* probs,  // [num_arms]
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

// One arm for each uniform number, without replacement; -1 once no probability is left. `left` holds the probabilities
// and loses those of the arms drawn.
LEAD_FAST_HOST_DEVICE inline void exp3_draw_without_replacement(double* left,            // [num_arms]
                                                                const double* uniforms,  // [num_draws]
                                                                std::int64_t num_arms, std::int64_t num_draws,
                                                                std::int64_t* arms) {  // [num_draws]
  for (std::int64_t i = 0; i < num_draws; ++i) {
    arms[i] = exp3_draw(left, num_arms, uniforms[i]);
    if (arms[i] >= 0) left[arms[i]] = 0.0;
  }
}

// log(exp(a) + exp(b)) without overflow.
LEAD_FAST_HOST_DEVICE inline double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return high == -HUGE_VAL ? high : high + std::log1p(std::exp(low - high));
}

// Moves the log weights by one reward in [-1, 1] of the arm drawn with probability `prob`.
//   exp3:    + gamma/|A| * r / p
//   exp3s:   the same, then every arm of A receives e * share / |A| of the total weight before
//   exp3_ix: - gamma/|A| * l / (p + gamma/(2|A|)) with the loss l = (1 - r) / 2
// Then shifts the largest weight over A to 0: only differences matter, and a million updates at the bounds stay finite.
// Nothing moves where `arm` is -1, the reward is NaN or A is empty.
LEAD_FAST_HOST_DEVICE inline void exp3_update(const bool* mask,  // [num_arms]
                                              std::int64_t arm, double reward, double prob, double gamma,
                                              std::int64_t variant, double share, std::int64_t num_arms,
                                              double* log_w) {  // [num_arms]
  const auto size = static_cast<double>(exp3_size(mask, num_arms));
  if (arm < 0 || std::isnan(reward) || size == 0.0) return;
  const double rate = gamma / size;

  if (variant == kExp3Ix) {
    log_w[arm] -= rate * ((1.0 - reward) / 2.0) / (prob + rate / 2.0);
  } else if (variant == kExp3 || (variant == kExp3s && share == 0.0)) {
    log_w[arm] += rate * reward / prob;
  } else if (variant == kExp3s) {
    constexpr double e = 2.718281828459045;
    const double shared = exp3_log_total(log_w, mask, num_arms) + std::log(e * share / size);
    log_w[arm] += rate * reward / prob;
    for (std::int64_t k = 0; k < num_arms; ++k) {
      if (mask[k]) log_w[k] = log_add_exp(log_w[k], shared);
    }
  }
  const double maximum = exp3_maximum(log_w, mask, num_arms);
  for (std::int64_t k = 0; k < num_arms; ++k) log_w[k] -= maximum;
}

// Takes a raw reward into the running mean and squared deviations, and returns it scaled to [-1, 1] by the mean +- 2
// standard deviations: 0 until three rewards are known. A NaN is not counted and gives 0.
LEAD_FAST_HOST_DEVICE inline double scale_reward(double reward, double* scale) {  // [3]
  if (std::isnan(reward)) return 0.0;
  scale[kCount] += 1.0;
  const double delta = reward - scale[kMean];
  scale[kMean] += delta / scale[kCount];
  scale[kSquares] += delta * (reward - scale[kMean]);
  if (scale[kCount] < kRewardsBeforeScaling) return 0.0;

  double deviation = std::sqrt(scale[kSquares] / (scale[kCount] - 1.0));
  const double relative = kRelativeFloor * std::fabs(scale[kMean]);
  if (deviation < relative) deviation = relative;
  if (deviation < kAbsoluteFloor) deviation = kAbsoluteFloor;
  const double scaled = (reward - scale[kMean]) / (2.0 * deviation);
  return scaled < -1.0 ? -1.0 : scaled > 1.0 ? 1.0 : scaled;
}

struct Exp3Probs {
  const double* log_w;
  const bool* mask;
  double gamma;
  std::int64_t num_arms;
};

struct Exp3Draw {
  const double* probs;
  const double* uniforms;
  std::int64_t num_arms, num_draws;
};

inline void exp3_draw(const Exp3Draw& args, std::int64_t* arms) {
  std::vector<double> left(args.probs, args.probs + args.num_arms);
  exp3_draw_without_replacement(left.data(), args.uniforms, args.num_arms, args.num_draws, arms);
}

struct Exp3Update {
  const double* log_w;
  const bool* mask;
  const std::int64_t* arms;
  const double* rewards;
  const double* probs;
  double gamma, share;
  std::int64_t variant, num_arms, num_draws;
};

// Raises where an operator was given an arm that there is not.
inline void check_arms(const char* op, const std::int64_t* arms, std::int64_t num_draws, std::int64_t num_arms) {
  for (std::int64_t i = 0; i < num_draws; ++i) {
    if (arms[i] >= -1 && arms[i] < num_arms) continue;
    throw std::invalid_argument(std::string(op) + ": `arms` must be in [-1, " + std::to_string(num_arms) + "), got " +
                                std::to_string(arms[i]));
  }
}

// Writes the log weights after all rewards, taken in order.
inline void exp3_update(const Exp3Update& args, double* log_w) {
  check_arms("exp3_update", args.arms, args.num_draws, args.num_arms);
  std::copy(args.log_w, args.log_w + args.num_arms, log_w);
  for (std::int64_t i = 0; i < args.num_draws; ++i) {
    exp3_update(args.mask, args.arms[i], args.rewards[i], args.probs[i], args.gamma, args.variant, args.share,
                args.num_arms, log_w);
  }
}

struct ScaleRewards {
  double* scale;  // [3], moves
  const double* rewards;
  std::int64_t size;
};

inline void scale_rewards(const ScaleRewards& args, double* scaled) {
  for (std::int64_t i = 0; i < args.size; ++i) scaled[i] = scale_reward(args.rewards[i], args.scale);
}

}  // namespace lead_fast
