// Argument checks that every binding of the bandit's operators shares, by shapes and dtypes alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/bandit.h"
#include "core/exp3.h"
#include "ops/array.h"

namespace lead_fast {

inline Exp3Probs check_exp3_probs(const Array& log_w, const Array& mask, double gamma) {
  const Arguments check("exp3_probs", log_w);
  const auto* weights = check.input<double>("log_w", log_w, {"K"});
  const auto* in_a = check.input<bool>("mask", mask, {log_w.shape[0]});
  check.require(gamma >= 0.0 && gamma <= 1.0, "gamma", "in [0, 1]", gamma);
  return {weights, in_a, gamma, log_w.shape[0]};
}

// What the CPU's bindings check of the values, too: CUDA's would have to wait for them.
inline void check_log_weights(const char* op, const double* log_w, const bool* mask, std::int64_t num_arms) {
  bool empty = true, possible = false;
  for (std::int64_t k = 0; k < num_arms; ++k) {
    if (!mask[k]) continue;
    if (!(log_w[k] < HUGE_VAL)) {
      throw std::invalid_argument(std::string(op) + ": `log_w` must be below inf at the arms of `mask`, got " +
                                  std::to_string(log_w[k]) + " at arm " + std::to_string(k));
    }
    empty = false;
    possible = possible || log_w[k] > -HUGE_VAL;
  }
  if (!empty && !possible) {
    throw std::invalid_argument(std::string(op) + ": `log_w` must be above -inf at an arm of `mask`, got none");
  }
}

inline void check_probabilities(const char* op, const char* name, const double* values, std::int64_t size) {
  for (std::int64_t i = 0; i < size; ++i) {
    if (values[i] >= 0.0 && values[i] <= 1.0) continue;
    throw std::invalid_argument(std::string(op) + ": `" + name + "` must be in [0, 1], got " +
                                std::to_string(values[i]));
  }
}

inline void check_values(const Exp3Probs& args) {
  check_log_weights("exp3_probs", args.log_w, args.mask, args.num_arms);
}

inline Exp3Draw check_exp3_draw(const Array& probs, const Array& uniforms) {
  const Arguments check("exp3_draw", probs);
  const auto* values = check.input<double>("probs", probs, {"K"});
  const auto* numbers = check.input<double>("uniforms", uniforms, {"m"});
  return {values, numbers, probs.shape[0], uniforms.shape[0]};
}

inline void check_values(const Exp3Draw& args) {
  check_probabilities("exp3_draw", "probs", args.probs, args.num_arms);
  check_probabilities("exp3_draw", "uniforms", args.uniforms, args.num_draws);
}

// What both operators that take rewards are told of them; `args` knows its number of arms.
template <class Args>
void check_rewards(const Arguments& check, const Array& mask, const Array& arms, const Array& rewards,
                   const Array& probs, double gamma, double share, Args& args) {
  args.mask = check.input<bool>("mask", mask, {args.num_arms});
  args.arms = check.input<std::int64_t>("arms", arms, {"m"});
  args.num_draws = arms.shape[0];
  args.rewards = check.input<double>("rewards", rewards, {args.num_draws});
  args.probs = check.input<double>("probs", probs, {args.num_draws});
  check.require(gamma >= 0.0 && gamma <= 1.0, "gamma", "in [0, 1]", gamma);
  check.require(share >= 0.0 && share <= 1.0, "share", "in [0, 1]", share);
  args.gamma = gamma;
  args.share = share;
}

inline Exp3Update check_exp3_update(const Array& log_w, const Array& mask, const Array& arms, const Array& rewards,
                                    const Array& probs, double gamma, std::int64_t variant, double share) {
  const Arguments check("exp3_update", log_w);
  Exp3Update args{};
  args.log_w = check.input<double>("log_w", log_w, {"K"});
  args.num_arms = log_w.shape[0];
  check.require(variant >= 0, "variant", "at least 0", variant);
  check_rewards(check, mask, arms, rewards, probs, gamma, share, args);
  args.variant = variant;
  return args;
}

inline ScaleRewards check_scale_rewards(const Array& scale, const Array& rewards) {
  const Arguments check("scale_rewards", scale);
  auto* running = check.inout<double>("scale", scale, {3});
  return {running, check.input<double>("rewards", rewards, {"m"}), rewards.shape[0]};
}

inline BanditDraw check_bandit_draw(const Array& log_w, const Array& counts, const Array& sums, const Array& mask,
                                    const Array& uniforms, double gamma, std::int64_t variant) {
  const Arguments check("bandit_draw", log_w);
  BanditDraw args{};
  args.log_w = check.input<double>("log_w", log_w, {"K"});
  args.num_arms = log_w.shape[0];
  args.counts = check.input<double>("counts", counts, {args.num_arms});
  args.sums = check.input<double>("sums", sums, {args.num_arms});
  args.mask = check.input<bool>("mask", mask, {args.num_arms});
  args.uniforms = check.input<double>("uniforms", uniforms, {"m"});
  args.num_draws = uniforms.shape[0];
  check.require(gamma >= 0.0 && gamma <= 1.0, "gamma", "in [0, 1]", gamma);
  check.require(variant >= 0 && variant <= kGreedy, "variant", "in [0, 4]", variant);
  args.gamma = gamma;
  args.variant = variant;
  return args;
}

inline void check_values(const BanditDraw& args) {
  if (args.variant < kUniform) check_log_weights("bandit_draw", args.log_w, args.mask, args.num_arms);
  check_probabilities("bandit_draw", "uniforms", args.uniforms, args.num_draws);
}

inline BanditUpdate check_bandit_update(const Array& log_w, const Array& scale, const Array& counts, const Array& sums,
                                        const Array& mask, const Array& arms, const Array& rewards, const Array& probs,
                                        double gamma, std::int64_t variant, double share) {
  const Arguments check("bandit_update", log_w);
  BanditUpdate args{};
  args.log_w = check.inout<double>("log_w", log_w, {"K"});
  args.num_arms = log_w.shape[0];
  args.scale = check.inout<double>("scale", scale, {3});
  args.counts = check.inout<double>("counts", counts, {args.num_arms});
  args.sums = check.inout<double>("sums", sums, {args.num_arms});
  check.require(variant >= 0 && variant <= kGreedy, "variant", "in [0, 4]", variant);
  check_rewards(check, mask, arms, rewards, probs, gamma, share, args);
  args.variant = variant;
  return args;
}

}  // namespace lead_fast
