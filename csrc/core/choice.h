// How many rows a task gives and what a choice goes by, one number at a time; the CPU's ranking is in core/rank.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"
#include "core/table.h"

namespace lead_fast {

constexpr int kTopk = 0, kSoftmax = 1, kRandom = 2;  // choose
// Streams of the counter-based generator: systematic thinning of the tasks, noise of the rows.
constexpr std::uint32_t kStreamTasks = 1, kStreamRows = 2;
// Guards ceil and floor of a share against products that are an integer but for rounding.
constexpr double kShareSlack = 1e-9;

struct Rank {
  // The pool, by position.
  std::int64_t num_rows, num_arms;
  const std::int64_t* group_offsets;  // [G + 1] groups (arm, task) as ranges of positions
  const std::int64_t* arm_groups;     // [K + 1] groups of arm k are arm_groups[k] .. arm_groups[k + 1]
  std::int64_t num_groups;            // G
  const std::int32_t* rows;
  const float* values;
  const std::int32_t* seen;
  const std::uint8_t* flags;
  Coefficients coefficients;       // of all arms
  const float* utility;            // in place of the table's IDU, or null
  const std::int32_t* num_tokens;  // or null
  // The choice.
  const std::int64_t* arm_drawn;  // [1], -1: nothing is chosen
  bool by_round;
  double smoothing, rate;
  std::int64_t cap;  // -1: none
  double token_budget, exclude_top;
  int choose;
  double temperature;
  std::uint64_t seed;
  std::uint32_t round;
  std::int64_t max_uses, max_arm_rows, capacity;
};

// What was chosen, in ascending position; then -1, 0, 0.
struct Chosen {
  std::int64_t* rows;  // [capacity]
  float* utility;      // [capacity]
  std::uint8_t* uses;  // [capacity], before this choice
};

// Rows to take of a task with `available` ones: the share `rate`, rounded up, at least one where there is any.
LEAD_FAST_HOST_DEVICE inline std::int64_t wanted_rows(double rate, std::int64_t available) {
  const auto wanted = static_cast<std::int64_t>(std::ceil(rate * static_cast<double>(available) - kShareSlack));
  const std::int64_t at_least_one = wanted < 1 ? 1 : wanted;
  return at_least_one < available ? at_least_one : available;
}

// Rows of highest utility to leave out of a task with `available` ones.
LEAD_FAST_HOST_DEVICE inline std::int64_t excluded_rows(double exclude_top, std::int64_t available) {
  return static_cast<std::int64_t>(std::floor(exclude_top * static_cast<double>(available) + kShareSlack));
}

// Rows of an arm at most, where they shall have `token_budget` tokens on average; never more than `cap` (-1: none).
LEAD_FAST_HOST_DEVICE inline std::int64_t cap_for_tokens(std::int64_t cap, double token_budget,
                                                         std::int64_t total_tokens, std::int64_t available) {
  const double mean = static_cast<double>(total_tokens) / static_cast<double>(available < 1 ? 1 : available);
  const double rows = std::rint(token_budget / (mean < 1.0 ? 1.0 : mean));
  // Above what is available no cap acts, and a number beyond int64 cannot be cast.
  const std::int64_t for_tokens = rows < 1.0                              ? 1
                                  : rows < static_cast<double>(available) ? static_cast<std::int64_t>(rows)
                                                                          : available;
  return cap < 0 || for_tokens < cap ? for_tokens : cap;
}

// Systematic thinning of `total` wanted rows to `cap`: a task whose wanted rows span (before, after] of the running sum
// gives thinned_edge(after) - thinned_edge(before). The edge of the last task is `cap` itself.
LEAD_FAST_HOST_DEVICE inline std::int64_t thinned_edge(std::int64_t before, std::int64_t cap, std::int64_t total,
                                                       double uniform) {
  const double share = static_cast<double>(cap) / static_cast<double>(total);
  const auto edge = static_cast<std::int64_t>(std::floor(static_cast<double>(before) * share + uniform));
  return edge < cap ? edge : cap;
}

// Keys that order as unsigned integers as their numbers do. Both zeros are one number; a NaN is below every other.
LEAD_FAST_HOST_DEVICE inline std::uint32_t order_key(float value) {
  if (!(value == value)) return 0;
  value += 0.0f;  // -0 becomes +0
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 31) != 0 ? 0xFFFFFFFFu : 0x80000000u);
}

LEAD_FAST_HOST_DEVICE inline std::uint64_t order_key(double value) {
  if (!(value == value)) return 0;
  value += 0.0;
  std::uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ ((bits >> 63) != 0 ? ~std::uint64_t{0} : std::uint64_t{1} << 63);
}

// A Gumbel(0, 1) number from a uniform one.
LEAD_FAST_HOST_DEVICE inline double gumbel(double uniform) { return -std::log(-std::log(uniform)); }

}  // namespace lead_fast
