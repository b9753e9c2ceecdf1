// What a round does to the table at its beginning and at its end.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "core/clock.h"
#include "core/exp3.h"
#include "core/table.h"

namespace lead_fast {

struct MarkChosen {
  const std::int64_t* rows;  // [size], distinct
  std::int64_t size, num_rows;
  const std::int32_t* position;  // [N]
  const std::int16_t* arm;       // [N], by position
  std::uint8_t* flags;           // [2, N + 1], moves
  std::int64_t* left;            // [K], moves
  std::int64_t num_arms, max_uses;
};

// Counts one use of the row at position p; whether it may not be chosen again, and was not barred before.
LEAD_FAST_HOST_DEVICE inline bool use_row(const MarkChosen& args, std::int64_t p) {
  const int uses = ++table_row(args.flags, kUses, args.num_rows)[p];
  return uses >= args.max_uses && table_row(args.flags, kQuarantined, args.num_rows)[p] == 0;
}

inline void mark_chosen(const MarkChosen& args) {
  check_rows("mark_chosen", args.rows, args.size, args.num_rows);
  for (std::int64_t i = 0; i < args.size; ++i) {
    const std::int64_t p = args.position[args.rows[i]];
    if (use_row(args, p)) args.left[args.arm[p]] -= 1;
  }
}

struct EndRound {
  const std::int64_t* rows;  // [size], of the round, distinct
  const float* begin_idu;    // [size] at its begin
  const float* drop;         // [size] in place of that of the coefficients, or null
  std::int64_t size;
  const std::int64_t* arms;  // [num_drawn], -1: none
  std::int64_t num_drawn, num_arms, num_rows;
  const std::int32_t* position;  // [N]
  const std::int16_t* arm;       // [N], by position like what follows
  float* values;                 // IDU moves
  const std::int32_t* seen;
  const std::uint8_t* flags;
  Coefficients coefficients;
  bool by_round;
  double smoothing;
  bool fall_of_utility;    // what a reward is the mean of; else the fall of the loss
  std::int64_t* counters;  // [4], moves
  double* unit;            // [2], moves
};

// What a round's end says of one of its rows.
struct RowEnd {
  std::int64_t arm;  // -1 where the row was not observed, or is set aside
  double gain, loss;
  bool quarantined;
};

// Carries entry i to the end of round number `round`, and writes its utility.
LEAD_FAST_HOST_DEVICE inline RowEnd end_row(const EndRound& args, std::int64_t i, std::int64_t round) {
  const std::int64_t p = args.position[args.rows[i]], n = args.num_rows;
  if (table_row(args.flags, kQuarantined, n)[p] != 0) return {-1, 0.0, 0.0, true};
  if (table_row(args.seen, kRound, n)[p] != round) return {-1, 0.0, 0.0, false};
  const float last = table_row(args.values, kLoss, n)[p];
  const float proxy = table_row(args.values, kProxy, n)[p];
  const std::int32_t index = table_row(args.seen, args.by_round ? kRound : kStep, n)[p];
  const float drop =
      args.drop != nullptr ? args.drop[i] : predicted_drop(args.coefficients.of_arm(args.arm[p]), index, proxy);
  const float now = lazy_loss(last, drop);
  const float idu = smoothed(Smoothing(args.smoothing), now, table_row(args.values, kPrevious, n)[p]);
  table_row(args.values, kIdu, n)[p] = idu;
  const double loss = last;
  const double gain = args.fall_of_utility ? static_cast<double>(args.begin_idu[i]) - static_cast<double>(idu)
                                           : loss - static_cast<double>(now);
  return {args.arm[p], gain, loss, false};
}

// Counts the round, and renews the unit of tau: peak learning rate times the mean number of steps a round.
LEAD_FAST_HOST_DEVICE inline void close_clock(std::int64_t* counters, double* unit) {
  counters[kNumRounds] += 1;
  const double steps = static_cast<double>(counters[kNumSteps]) / static_cast<double>(counters[kNumRounds]);
  const double renewed = unit[kPeakLr] * steps;
  if (renewed > 0.0) unit[kRoundLr] = renewed;
}

// Serial, in order of entries. Writes each drawn arm's reward, NaN where none of its rows was observed; the number of
// rows observed and the mean of their losses; and which rows are set aside.
inline void end_round(const EndRound& args, double* rewards,  // [num_drawn]
                      double* summary,                        // [2]
                      bool* quarantined) {                    // [size]
  check_rows("end_round", args.rows, args.size, args.num_rows);
  check_arms("end_round", args.arms, args.num_drawn, args.num_arms);
  const std::int64_t round = args.counters[kNumRounds] + 1;
  std::vector<double> gains(args.num_arms), counts(args.num_arms);
  double num_seen = 0.0, losses = 0.0;
  for (std::int64_t i = 0; i < args.size; ++i) {
    const RowEnd row = end_row(args, i, round);
    quarantined[i] = row.quarantined;
    if (row.arm < 0) continue;
    gains[row.arm] += row.gain;
    counts[row.arm] += 1.0;
    num_seen += 1.0;
    losses += row.loss;
  }
  for (std::int64_t i = 0; i < args.num_drawn; ++i) {
    const std::int64_t arm = args.arms[i];
    rewards[i] = arm >= 0 ? gains[arm] / counts[arm] : NAN;
  }
  summary[0] = num_seen;
  summary[1] = losses / num_seen;
  close_clock(args.counters, args.unit);
}

}  // namespace lead_fast
