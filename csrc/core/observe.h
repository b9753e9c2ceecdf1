// Scatters one micro-batch's statistics into the table, and takes grad_norm's pairs before the table moves.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/clock.h"
#include "core/grad_norm.h"
#include "core/table.h"

namespace lead_fast {

struct Batch {
  const std::int64_t* rows;   // [size], -1: no row
  const float* loss;          // [size]
  const float* num_tokens;    // [size]
  const float* grad_norm_sq;  // [size]
  std::int64_t size;
  const std::int64_t* now;  // [1] optimizer steps completed, or null: up to now
};

// Rows of `before`: what stood of an entry's row when the entry came, and the loss that came.
enum Before { kBeforeRow, kBeforeArm, kBeforeRound, kBeforeLoss, kBeforeDrop, kBeforeObserved, kBeforeWidth };

struct Observe {
  Batch batch;
  Table table;
  Clock clock;
  std::int64_t* left;      // [K]
  std::int64_t* counters;  // [4]
  PairSums sums;
  std::int64_t max_uses;
  std::int64_t num_choosable;
  double* before;  // [kBeforeWidth, size], or null
};

// Raises where a row number or the number of steps is out of range, before anything is written.
inline void check_observed(const Observe& args) {
  for (std::int64_t i = 0; i < args.batch.size; ++i) {
    const std::int64_t row = args.batch.rows[i];
    if (row >= -1 && row < args.table.num_rows) continue;
    throw std::invalid_argument("observe: `rows` must be in [-1, " + std::to_string(args.table.num_rows) + "), got " +
                                std::to_string(row));
  }
  const std::int64_t now = args.batch.now ? *args.batch.now : args.counters[kNumSteps];
  if (now < 0 || now > args.counters[kNumSteps] || now >= args.clock.size) {
    throw std::invalid_argument("observe: `now` must be in [0, " + std::to_string(args.counters[kNumSteps]) +
                                "], the steps so far, got " + std::to_string(now));
  }
}

// The rows seen so far of one batch: a hash set, so that a batch of any size costs time in proportion.
class RowSet {
 public:
  explicit RowSet(std::int64_t size) {
    while ((std::int64_t{1} << bits_) < 2 * size) ++bits_;
    slots_.assign(std::size_t{1} << bits_, -1);
  }

  // Adds a row; false where it was there.
  bool insert(std::int32_t row) {
    const std::uint32_t mask = (1u << bits_) - 1;
    std::uint32_t at = (static_cast<std::uint32_t>(row) * 0x9E3779B9u) >> (32 - bits_);
    for (; slots_[at] >= 0; at = (at + 1) & mask) {
      if (slots_[at] == row) return false;
    }
    slots_[at] = row;
    return true;
  }

 private:
  int bits_ = 1;
  std::vector<std::int32_t> slots_;
};

enum class Entry : std::uint8_t { kIgnored, kValid, kBad };

// Where an entry's row stands in the table, -1 where the entry is absent.
inline std::vector<std::int32_t> places(const Batch& batch, const Table& table) {
  // A large table is far from the caches: all reads of a batch are under way before the first is needed.
  for (std::int64_t i = 0; i < batch.size; ++i) {
    if (batch.rows[i] >= 0) __builtin_prefetch(table.position + batch.rows[i]);
  }
  std::vector<std::int32_t> at(batch.size, -1);
  for (std::int64_t i = 0; i < batch.size; ++i) {
    if (batch.rows[i] < 0 || !(batch.num_tokens[i] > 0.0f)) continue;
    const std::int32_t p = at[i] = table.position[batch.rows[i]];
    for (int row = kLoss; row <= kProxy; ++row) __builtin_prefetch(table_row(table.values, row, table.num_rows) + p, 1);
    for (int row = kStep; row <= kRound; ++row) __builtin_prefetch(table_row(table.seen, row, table.num_rows) + p, 1);
    __builtin_prefetch(table_row(table.flags, kQuarantined, table.num_rows) + p);
    __builtin_prefetch(table.arm + p);
  }
  return at;
}

// What each entry does: of a row that occurs twice the last finite loss counts.
inline std::vector<Entry> sorted_out(const Batch& batch, const Table& table, const std::vector<std::int32_t>& at) {
  const std::uint8_t* quarantined = table_row(table.flags, kQuarantined, table.num_rows);
  std::vector<Entry> entries(batch.size, Entry::kIgnored);
  RowSet later(batch.size);
  for (std::int64_t i = batch.size - 1; i >= 0; --i) {
    if (at[i] < 0) continue;
    if (!std::isfinite(batch.loss[i])) {
      entries[i] = Entry::kBad;
    } else if (quarantined[at[i]] == 0 && later.insert(at[i])) {
      entries[i] = Entry::kValid;
    }
  }
  return entries;
}

// The pair that one observation is for the regression of every kappa: what was predicted, what came.
inline void take_pair(const Observe& args, std::int64_t p, float loss, std::int64_t now) {
  const Table& table = args.table;
  const std::int64_t step = table_row(table.seen, kStep, table.num_rows)[p];
  if (step >= now) return;  // seen again before any optimizer step, a row teaches nothing
  const PairSums& sums = args.sums;
  const std::int64_t arm = table.arm[p], num_arms = args.clock.num_arms;
  const Since since = since_step(args.clock.entries, args.clock.unit, num_arms, step, now, arm, sums.adam_beta1);
  const float proxy = table_row(table.values, kProxy, table.num_rows)[p];
  const double truth = static_cast<double>(table_row(table.values, kLoss, table.num_rows)[p] - loss);

  for (std::int64_t q = 0; q < sums.num_kappas; ++q) {
    const double* fit_row = sums.fit + (1 + q) * (kArmOffsets + num_arms);
    const Features features = pair_features(since, proxy, fit_row[kKappa]);
    const double error = predict(features, fit_row, arm) - truth;
    sums.totals[kErrors + q] += error * error;
    add_pair(features, truth, sums.pairs + (q * num_arms + arm) * kPairWidth);
  }
  sums.totals[kAllPairs] += 1.0;
  if (table_row(table.seen, kRound, table.num_rows)[p] > 0) sums.totals[kRevisits] += 1.0;
}

// Of an entry that the table does not take: row -1, and zeros.
LEAD_FAST_HOST_DEVICE inline void record_nothing(const Observe& args, std::int64_t i) {
  for (int row = 0; row < kBeforeWidth; ++row) args.before[row * args.batch.size + i] = row == kBeforeRow ? -1.0 : 0.0;
}

// Of entry i, whose row stands at position p: its arm, round and loss, the fall that the fit in use predicts, and the
// loss that the table is about to take.
LEAD_FAST_HOST_DEVICE inline void record_before(const Observe& args, std::int64_t i, std::int64_t p, std::int64_t now) {
  const Table& table = args.table;
  const std::int64_t arm = table.arm[p], num_arms = args.clock.num_arms, size = args.batch.size;
  args.before[kBeforeRow * size + i] = static_cast<double>(args.batch.rows[i]);
  args.before[kBeforeArm * size + i] = static_cast<double>(arm);
  args.before[kBeforeRound * size + i] = table_row(table.seen, kRound, table.num_rows)[p];
  args.before[kBeforeObserved * size + i] = args.batch.loss[i];
  args.before[kBeforeLoss * size + i] = table_row(table.values, kLoss, table.num_rows)[p];
  double drop = 0.0;
  if (args.sums.pairs != nullptr) {
    const std::int64_t seen = table_row(table.seen, kStep, table.num_rows)[p], step = seen < now ? seen : now;
    const Since since = since_step(args.clock.entries, args.clock.unit, num_arms, step, now, arm, args.sums.adam_beta1);
    const SlopeLevel coefficient = grad_norm_coefficient(since, args.sums.fit, arm);
    drop = coefficient.slope * table_row(table.values, kProxy, table.num_rows)[p] + coefficient.level;
  }
  args.before[kBeforeDrop * size + i] = drop;
}

// Counts a loss that is not finite, and sets its row aside for good.
inline void quarantine(const Observe& args, std::int64_t p) {
  args.counters[kNumQuarantined] += 1;
  std::uint8_t& flag = table_row(args.table.flags, kQuarantined, args.table.num_rows)[p];
  if (flag != 0) return;
  flag = 1;
  const bool could_be_chosen = p < args.num_choosable && args.table.flags[p] < args.max_uses;  // USES is the first row
  if (could_be_chosen) args.left[args.table.arm[p]] -= 1;
}

// Serial, in order of entries: sums are the same for any number of threads.
inline void observe(const Observe& args) {
  check_observed(args);
  const Batch& batch = args.batch;
  const Table& table = args.table;
  const std::int64_t now = batch.now ? *batch.now : args.counters[kNumSteps];
  const std::int64_t round = args.counters[kNumRounds] + 1;
  const std::vector<std::int32_t> at = places(batch, table);
  const std::vector<Entry> entries = sorted_out(batch, table, at);

  for (std::int64_t i = 0; i < batch.size; ++i) {
    const std::int64_t p = at[i];
    if (args.before != nullptr) record_nothing(args, i);
    if (entries[i] == Entry::kBad) quarantine(args, p);
    if (entries[i] != Entry::kValid) continue;
    if (args.before != nullptr) record_before(args, i, p, now);
    if (args.sums.pairs != nullptr) take_pair(args, p, batch.loss[i], now);
    table_row(table.values, kPrevious, table.num_rows)[p] = table_row(table.values, kIdu, table.num_rows)[p];
    table_row(table.values, kLoss, table.num_rows)[p] = batch.loss[i];
    table_row(table.values, kProxy, table.num_rows)[p] = gradient_proxy(batch.grad_norm_sq[i], batch.num_tokens[i]);
    table_row(table.seen, kStep, table.num_rows)[p] = static_cast<std::int32_t>(now);
    table_row(table.seen, kRound, table.num_rows)[p] = static_cast<std::int32_t>(round);
  }
}

}  // namespace lead_fast
