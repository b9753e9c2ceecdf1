// Argument checks that every binding of the state's operators shares (NumPy, torch on the CPU, torch on CUDA), by
// shapes, dtypes and settings alone; what is in the arrays is checked where it can be read. What the values mean is in
// lead_fast/reference_state.py.
#pragma once

#include <cstdint>
#include <optional>

#include "core/choice.h"
#include "core/observe.h"
#include "core/round.h"
#include "core/utility.h"
#include "ops/array.h"

namespace lead_fast {

inline Observe check_observe(const Array& rows, const Array& loss, const Array& num_tokens, const Array& grad_norm_sq,
                             const std::optional<Array>& now, const Array& position, const Array& arm,
                             const Array& values, const Array& seen, const Array& flags, const Array& left,
                             const Array& counters, const Array& clock, const Array& unit,
                             const std::optional<Array>& pairs, const std::optional<Array>& totals,
                             const std::optional<Array>& fit, double adam_beta1, std::int64_t max_uses,
                             std::int64_t num_choosable, const std::optional<Array>& before) {
  const Arguments check("observe", values);
  Observe args{};
  args.batch.rows = check.input<std::int64_t>("rows", rows, {"S"});
  args.batch.size = rows.shape[0];
  args.batch.loss = check.input<float>("loss", loss, {rows.shape[0]});
  args.batch.num_tokens = check.input<float>("num_tokens", num_tokens, {rows.shape[0]});
  args.batch.grad_norm_sq = check.input<float>("grad_norm_sq", grad_norm_sq, {rows.shape[0]});
  if (now) args.batch.now = check.input<std::int64_t>("now", *now, {1});

  args.table.position = check.input<std::int32_t>("position", position, {"N"});
  const std::int64_t num_rows = args.table.num_rows = position.shape[0];
  args.table.arm = check.input<std::int16_t>("arm", arm, {num_rows});
  args.table.values = check.inout<float>("values", values, {4, num_rows + 1});
  args.table.seen = check.inout<std::int32_t>("seen", seen, {2, num_rows + 1});
  args.table.flags = check.inout<std::uint8_t>("flags", flags, {2, num_rows + 1});
  args.left = check.inout<std::int64_t>("left", left, {"K"});
  const std::int64_t num_arms = args.clock.num_arms = left.shape[0];
  args.counters = check.inout<std::int64_t>("counters", counters, {4});
  args.clock.entries = check.input<double>("clock", clock, {"C + 1", kArmLrSum + num_arms});
  args.clock.size = clock.shape[0];
  args.clock.unit = check.input<double>("unit", unit, {2});

  if (pairs) {
    if (!totals) check.fail("totals", "given with `pairs`", "none");
    if (!fit) check.fail("fit", "given with `pairs`", "none");
    args.sums.pairs = check.inout<double>("pairs", *pairs, {"Q", num_arms, kPairWidth});
    args.sums.num_kappas = pairs->shape[0];
    args.sums.totals = check.inout<double>("totals", *totals, {kErrors + args.sums.num_kappas});
    args.sums.fit = check.input<double>("fit", *fit, {1 + args.sums.num_kappas, kArmOffsets + num_arms});
  }
  args.sums.adam_beta1 = adam_beta1;
  args.max_uses = max_uses;
  args.num_choosable = num_choosable;
  if (before) args.before = check.inout<double>("before", *before, {kBeforeWidth, rows.shape[0]});
  return args;
}

inline Step check_step_by_numbers(double lr, double num_items, const Array& arms, const Array& clock,
                                  const Array& counters, const Array& unit, const char* name = "step_by_numbers") {
  const Arguments check(name, clock);
  Step args{};
  args.lr_number = lr;
  args.num_items_number = num_items;
  args.arms = check.input<std::int64_t>("arms", arms, {"A"});
  args.num_drawn = arms.shape[0];
  args.clock = check.inout<double>("clock", clock, {"C + 1", "3 + K"});
  args.clock_size = clock.shape[0];
  args.num_arms = clock.shape[1] - kArmLrSum;
  check.require(args.num_arms >= 0, "clock", "of at least 3 columns", clock.shape[1]);
  args.counters = check.inout<std::int64_t>("counters", counters, {4});
  args.unit = check.inout<double>("unit", unit, {2});
  return args;
}

inline Step check_step(const Array& lr, const Array& num_items, const Array& arms, const Array& clock,
                       const Array& counters, const Array& unit) {
  const Arguments check("step", clock);
  Step args = check_step_by_numbers(0.0, 0.0, arms, clock, counters, unit, "step");
  args.lr = check.input<double>("lr", lr, {});
  args.num_items = check.input<double>("num_items", num_items, {});
  return args;
}

inline GradNormCoefficients check_grad_norm_coefficients(const Array& clock, const Array& counters, const Array& unit,
                                                         const Array& fit, double adam_beta1, std::int64_t num_steps) {
  const Arguments check("grad_norm_coefficients", clock);
  GradNormCoefficients args{};
  args.clock.entries = check.input<double>("clock", clock, {"C + 1", "3 + K"});
  args.clock.size = clock.shape[0];
  args.clock.num_arms = clock.shape[1] - kArmLrSum;
  check.require(args.clock.num_arms >= 0, "clock", "of at least 3 columns", clock.shape[1]);
  check.input<std::int64_t>("counters", counters, {4});
  args.clock.unit = check.input<double>("unit", unit, {2});
  args.fit_row = check.input<double>("fit", fit, {"1 + Q", kArmOffsets + args.clock.num_arms});
  check.require(fit.shape[0] > 0, "fit", "of at least one row", fit.shape[0]);
  check.require(num_steps >= 0 && num_steps < clock.shape[0], "num_steps",
                "in [0, " + std::to_string(clock.shape[0]) + ")", num_steps);
  args.adam_beta1 = adam_beta1;
  args.num_steps = num_steps;
  return args;
}

inline Coefficients check_coefficients(const Arguments& check, const Array& coefficients, Extent num_arms) {
  const auto* data = check.input<double>("coefficients", coefficients, {2, num_arms, "n"});
  const std::int64_t size = coefficients.shape[2];
  return {data, data + coefficients.shape[1] * size, size};
}

inline Utility check_utility(const Array& rows, const Array& position, const Array& arm, const Array& values,
                             const Array& seen, const Array& coefficients, bool by_round, double smoothing) {
  const Arguments check("utility", values);
  Utility args{};
  args.rows = check.input<std::int64_t>("rows", rows, {"R"});
  args.size = rows.shape[0];
  args.position = check.input<std::int32_t>("position", position, {"N"});
  const std::int64_t num_rows = args.num_rows = position.shape[0];
  args.arm = check.input<std::int16_t>("arm", arm, {num_rows});
  args.values = check.input<float>("values", values, {4, num_rows + 1});
  args.seen = check.input<std::int32_t>("seen", seen, {2, num_rows + 1});
  args.coefficients = check_coefficients(check, coefficients, "K");
  args.by_round = by_round;
  args.smoothing = smoothing;
  return args;
}

inline MarkChosen check_mark_chosen(const Array& rows, const Array& position, const Array& arm, const Array& flags,
                                    const Array& left, std::int64_t max_uses) {
  const Arguments check("mark_chosen", flags);
  MarkChosen args{};
  args.rows = check.input<std::int64_t>("rows", rows, {"R"});
  args.size = rows.shape[0];
  args.position = check.input<std::int32_t>("position", position, {"N"});
  const std::int64_t num_rows = args.num_rows = position.shape[0];
  args.arm = check.input<std::int16_t>("arm", arm, {num_rows});
  args.flags = check.inout<std::uint8_t>("flags", flags, {2, num_rows + 1});
  args.left = check.inout<std::int64_t>("left", left, {"K"});
  args.num_arms = left.shape[0];
  args.max_uses = max_uses;
  return args;
}

inline EndRound check_end_round(const Array& rows, const Array& begin_idu, const std::optional<Array>& drop,
                                const Array& arms, const Array& position, const Array& arm, const Array& values,
                                const Array& seen, const Array& flags, const Array& coefficients, bool by_round,
                                double smoothing, bool fall_of_utility, const Array& counters, const Array& unit) {
  const Arguments check("end_round", values);
  EndRound args{};
  args.rows = check.input<std::int64_t>("rows", rows, {"R"});
  args.size = rows.shape[0];
  args.begin_idu = check.input<float>("begin_idu", begin_idu, {args.size});
  if (drop) args.drop = check.input<float>("drop", *drop, {args.size});
  args.arms = check.input<std::int64_t>("arms", arms, {"m"});
  args.num_drawn = arms.shape[0];
  args.position = check.input<std::int32_t>("position", position, {"N"});
  const std::int64_t num_rows = args.num_rows = position.shape[0];
  args.arm = check.input<std::int16_t>("arm", arm, {num_rows});
  args.values = check.inout<float>("values", values, {4, num_rows + 1});
  args.seen = check.input<std::int32_t>("seen", seen, {2, num_rows + 1});
  args.flags = check.input<std::uint8_t>("flags", flags, {2, num_rows + 1});
  args.coefficients = check_coefficients(check, coefficients, "K");
  args.num_arms = coefficients.shape[1];
  args.by_round = by_round;
  args.smoothing = smoothing;
  args.fall_of_utility = fall_of_utility;
  args.counters = check.inout<std::int64_t>("counters", counters, {4});
  args.unit = check.inout<double>("unit", unit, {2});
  return args;
}

inline Calibrate check_calibrate(const Array& pairs, const Array& totals, const Array& fit, double prior_pairs,
                                 double min_pairs) {
  const Arguments check("calibrate", pairs);
  Calibrate args{};
  args.pairs = check.input<double>("pairs", pairs, {"Q", "K", kPairWidth});
  args.num_kappas = pairs.shape[0];
  args.num_arms = pairs.shape[1];
  check.require(args.num_kappas > 0, "pairs", "of at least one kappa", args.num_kappas);
  args.totals = check.input<double>("totals", totals, {kErrors + args.num_kappas});
  args.fit = check.inout<double>("fit", fit, {1 + args.num_kappas, kArmOffsets + args.num_arms});
  check.require(prior_pairs > 0.0, "prior_pairs", "above 0", prior_pairs);
  args.prior_pairs = prior_pairs;
  args.min_pairs = min_pairs;
  return args;
}

inline Rank check_rank(const Array& arm_drawn, const Array& group_offsets, const Array& arm_groups, const Array& rows,
                       const Array& values, const Array& seen, const Array& flags, const Array& coefficients,
                       bool by_round, const std::optional<Array>& utility, const std::optional<Array>& num_tokens,
                       double smoothing, double rate, std::int64_t cap, double token_budget, double exclude_top,
                       std::int64_t choose, double temperature, std::int64_t seed, std::int64_t round,
                       std::int64_t max_uses, std::int64_t max_arm_rows, std::int64_t capacity) {
  const Arguments check("rank", values);
  Rank args{};
  args.arm_drawn = check.input<std::int64_t>("arm_drawn", arm_drawn, {1});
  args.group_offsets = check.input<std::int64_t>("group_offsets", group_offsets, {"G + 1"});
  args.num_groups = group_offsets.shape[0] - 1;
  check.require(args.num_groups >= 0, "group_offsets", "of at least one entry", group_offsets.shape[0]);
  args.arm_groups = check.input<std::int64_t>("arm_groups", arm_groups, {"K + 1"});
  args.num_arms = arm_groups.shape[0] - 1;
  check.require(args.num_arms >= 0, "arm_groups", "of at least one entry", arm_groups.shape[0]);
  args.rows = check.input<std::int32_t>("rows", rows, {"N"});
  const std::int64_t num_rows = args.num_rows = rows.shape[0];
  args.values = check.input<float>("values", values, {4, num_rows + 1});
  args.seen = check.input<std::int32_t>("seen", seen, {2, num_rows + 1});
  args.flags = check.input<std::uint8_t>("flags", flags, {2, num_rows + 1});
  args.coefficients = check_coefficients(check, coefficients, args.num_arms);
  if (utility) args.utility = check.input<float>("utility", *utility, {num_rows});
  if (num_tokens) args.num_tokens = check.input<std::int32_t>("num_tokens", *num_tokens, {num_rows});

  check.require(rate >= 0.0 && rate <= 1.0, "rate", "in [0, 1]", rate);
  check.require(exclude_top >= 0.0 && exclude_top <= 1.0, "exclude_top", "in [0, 1]", exclude_top);
  check.require(choose >= kTopk && choose <= kRandom, "choose", "0, 1 or 2", choose);
  check.require(choose != kSoftmax || temperature > 0.0, "temperature", "above 0", temperature);
  check.require(round >= 0 && round <= 0xFFFFFFFFll, "round", "an integer in [0, 2**32)", round);
  check.require(capacity >= 0, "capacity", "at least 0", capacity);
  args.by_round = by_round;
  args.smoothing = smoothing;
  args.rate = rate;
  args.cap = cap;
  args.token_budget = token_budget;
  args.exclude_top = exclude_top;
  args.choose = static_cast<int>(choose);
  args.temperature = temperature;
  args.seed = static_cast<std::uint64_t>(seed);
  args.round = static_cast<std::uint32_t>(round);
  args.max_uses = max_uses;
  args.max_arm_rows = max_arm_rows;
  args.capacity = capacity;
  return args;
}

}  // namespace lead_fast
