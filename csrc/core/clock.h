// What training did at each optimizer step: one row of `clock` a step, sums up to it and without it.
//
//   clock [C + 1, 3 + K]:  LR, NUM_ITEMS of step s;  LR_SUM before step s;  each arm's part of LR_SUM
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/host_device.h"

namespace lead_fast {

constexpr int kLr = 0, kNumItems = 1, kLrSum = 2, kArmLrSum = 3;                    // columns of clock
constexpr int kNumSteps = 0, kNumRounds = 1, kNumQuarantined = 2, kOutOfRange = 3;  // entries of counters
constexpr int kPeakLr = 0, kRoundLr = 1;                                            // entries of unit

// The clocks as an operator's arguments hold them.
struct Clock {
  const double* entries;  // [size, 3 + num_arms]
  const double* unit;     // [2]
  std::int64_t size;      // C + 1
  std::int64_t num_arms;  // K
};

// Row s of the clock of `num_arms` arms.
LEAD_FAST_HOST_DEVICE inline const double* clock_entry(const double* clock, std::int64_t num_arms, std::int64_t s) {
  return clock + s * (kArmLrSum + num_arms);
}

// Advances by one optimizer step that trained on `arms` in equal parts; entries of -1 do not count. Serial: the sums of
// a run do not depend on an order of additions. The caller has made sure that the clock has an entry after this step.
LEAD_FAST_HOST_DEVICE inline void advance_clock(double lr, double num_items, const std::int64_t* arms,  // [num_drawn]
                                                std::int64_t num_drawn, std::int64_t num_arms,
                                                double* clock,           // [C + 1, 3 + num_arms]
                                                std::int64_t* counters,  // [4]
                                                double* unit) {          // [2]
  const std::int64_t width = kArmLrSum + num_arms;
  double* at = clock + counters[kNumSteps] * width;
  double* next = at + width;
  std::int64_t parts = 0;
  for (std::int64_t i = 0; i < num_drawn; ++i) parts += arms[i] >= 0;

  at[kLr] = lr;
  at[kNumItems] = num_items;
  next[kLrSum] = at[kLrSum] + lr;
  for (std::int64_t k = 0; k < num_arms; ++k) next[kArmLrSum + k] = at[kArmLrSum + k];
  for (std::int64_t i = 0; i < num_drawn; ++i) {
    if (arms[i] >= 0) next[kArmLrSum + arms[i]] += lr / static_cast<double>(parts);
  }
  counters[kNumSteps] += 1;
  if (lr > unit[kPeakLr]) unit[kPeakLr] = lr;
}

struct Step {
  const double* lr;         // [], or null: `lr_number`
  const double* num_items;  // [], or null: `num_items_number`
  double lr_number, num_items_number;
  const std::int64_t* arms;
  std::int64_t num_drawn;
  double* clock;
  std::int64_t clock_size, num_arms;
  std::int64_t* counters;
  double* unit;
};

LEAD_FAST_HOST_DEVICE inline void advance_clock(const Step& args) {
  advance_clock(args.lr == nullptr ? args.lr_number : *args.lr,
                args.num_items == nullptr ? args.num_items_number : *args.num_items, args.arms, args.num_drawn,
                args.num_arms, args.clock, args.counters, args.unit);
}

inline void step(const Step& args) {
  const std::int64_t s = args.counters[kNumSteps];
  if (s < 0 || s + 1 >= args.clock_size) {
    throw std::invalid_argument("step: `clock` must have an entry after step " + std::to_string(s) + ", got " +
                                std::to_string(args.clock_size) + " entries");
  }
  for (std::int64_t i = 0; i < args.num_drawn; ++i) {
    if (args.arms[i] >= -1 && args.arms[i] < args.num_arms) continue;
    throw std::invalid_argument("step: `arms` must be in [-1, " + std::to_string(args.num_arms) + "), got " +
                                std::to_string(args.arms[i]));
  }
  advance_clock(args);
}

}  // namespace lead_fast
