// The bandit over arms as a state: what a draw and a reward are to each variant. EXP3's own arithmetic is in exp3.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/exp3.h"
#include "core/host_device.h"

namespace lead_fast {

constexpr int kUniform = 3, kGreedy = 4;  // variants beside those of exp3.h

struct BanditDraw {
  const double* log_w;   // [K]
  const double* counts;  // [K] rewards of each arm so far
  const double* sums;    // [K] their sum
  const bool* mask;      // [K]
  const double* uniforms;
  double gamma;
  std::int64_t variant, num_arms, num_draws;
};

// The arm of `mask` with the highest mean reward, one without rewards before any other; -1 where `mask` is empty.
LEAD_FAST_HOST_DEVICE inline std::int64_t best_arm(const BanditDraw& args) {
  std::int64_t best = -1;
  double highest = 0.0;
  for (std::int64_t k = 0; k < args.num_arms; ++k) {
    if (!args.mask[k]) continue;
    const double mean = args.counts[k] > 0.0 ? args.sums[k] / args.counts[k] : HUGE_VAL;
    if (best >= 0 && !(mean > highest)) continue;
    best = k;
    highest = mean;
  }
  return best;
}

// Probability of each arm in the next draw; all 0 where `mask` is empty.
LEAD_FAST_HOST_DEVICE inline void bandit_probs(const BanditDraw& args, double* probs) {  // [K]
  if (args.variant == kGreedy) {
    const std::int64_t best = best_arm(args);
    for (std::int64_t k = 0; k < args.num_arms; ++k) probs[k] = k == best ? 1.0 : 0.0;
  } else if (args.variant == kUniform) {
    const auto size = static_cast<double>(exp3_size(args.mask, args.num_arms));
    for (std::int64_t k = 0; k < args.num_arms; ++k) probs[k] = args.mask[k] ? 1.0 / size : 0.0;
  } else {
    // exp3_ix explores through its estimate of the loss, and mixes nothing in.
    exp3_probs(args.log_w, args.mask, args.variant == kExp3Ix ? 0.0 : args.gamma, args.num_arms, probs);
  }
}

// Draws without replacement, and tells with what probability each arm was drawn: min(1, draws * P), exact for one draw.
LEAD_FAST_HOST_DEVICE inline void bandit_draw(const BanditDraw& args,
                                              double* left,                           // [K] scratch
                                              std::int64_t* arms, double* arm_probs,  // [num_draws]
                                              double* probs) {                        // [K]
  bandit_probs(args, probs);
  for (std::int64_t k = 0; k < args.num_arms; ++k) left[k] = probs[k];
  exp3_draw_without_replacement(left, args.uniforms, args.num_arms, args.num_draws, arms);
  std::int64_t drawn = 0;
  for (std::int64_t i = 0; i < args.num_draws; ++i) drawn += arms[i] >= 0;
  for (std::int64_t i = 0; i < args.num_draws; ++i) {
    const double prob = arms[i] >= 0 ? static_cast<double>(drawn) * probs[arms[i]] : 0.0;
    arm_probs[i] = prob < 1.0 ? prob : 1.0;
  }
}

struct BanditUpdate {
  double* log_w;   // [K], moves like what follows
  double* scale;   // [3]
  double* counts;  // [K]
  double* sums;    // [K]
  const bool* mask;
  const std::int64_t* arms;
  const double* rewards;  // raw
  const double* probs;    // with which each arm was drawn
  double gamma, share;
  std::int64_t variant, num_arms, num_draws;
};

// Takes the rewards in order and writes them scaled. A reward of NaN, or of no arm, counts as nothing.
LEAD_FAST_HOST_DEVICE inline void take_rewards(const BanditUpdate& args, double* scaled) {  // [num_draws]
  for (std::int64_t i = 0; i < args.num_draws; ++i) {
    const std::int64_t arm = args.arms[i];
    const double reward = args.rewards[i];
    scaled[i] = 0.0;
    if (arm < 0 || std::isnan(reward)) continue;
    scaled[i] = scale_reward(reward, args.scale);
    args.counts[arm] += 1.0;
    args.sums[arm] += reward;
    exp3_update(args.mask, arm, scaled[i], args.probs[i], args.gamma, args.variant, args.share, args.num_arms,
                args.log_w);
  }
}

inline void bandit_update(const BanditUpdate& args, double* scaled) {
  check_arms("bandit_update", args.arms, args.num_draws, args.num_arms);
  take_rewards(args, scaled);
}

}  // namespace lead_fast
