// The utility table, in position order: rows grouped by arm, then task, then row number, rows set aside last.
//
//   values [4, N + 1] fp32   LOSS last seen, IDU at the end of the round of the last visit, PREVIOUS the same of the
//                            visit before, PROXY = G_i / n_i when last seen
//   seen   [2, N + 1] int32  STEP: optimizer steps completed when last seen; ROUND: its number, 0 never
//   flags  [2, N + 1] uint8  USES: rounds that chose the row; QUARANTINED: a loss was not finite
//
// The last column is spare and never touched here.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "core/host_device.h"

namespace lead_fast {

constexpr int kLoss = 0, kIdu = 1, kPrevious = 2, kProxy = 3;  // rows of values
constexpr int kStep = 0, kRound = 1;                           // rows of seen
constexpr int kUses = 0, kQuarantined = 1;                     // rows of flags

// A pool's table as an operator's arguments hold it.
struct Table {
  std::int64_t num_rows;         // N
  const std::int32_t* position;  // [N] row -> position
  const std::int16_t* arm;       // [N] of each position
  float* values;
  std::int32_t* seen;
  std::uint8_t* flags;
};

// One row of `values`, `seen` or `flags` of a pool of `num_rows` rows.
template <class T>
LEAD_FAST_HOST_DEVICE inline T* table_row(T* table, int row, std::int64_t num_rows) {
  return table + row * (num_rows + 1);
}

// Raises where an operator was given a row that there is not, before anything is written.
inline void check_rows(const char* op, const std::int64_t* rows, std::int64_t size, std::int64_t num_rows) {
  for (std::int64_t i = 0; i < size; ++i) {
    if (rows[i] >= 0 && rows[i] < num_rows) continue;
    throw std::invalid_argument(std::string(op) + ": `rows` must be in [0, " + std::to_string(num_rows) + "), got " +
                                std::to_string(rows[i]));
  }
}

// slope and level [K, n] of the predicted fall of the loss: affine in the proxy, by arm and by the step (or round) that
// a row was last seen in.
struct Coefficients {
  const double* slope;
  const double* level;
  std::int64_t size;  // n

  LEAD_FAST_HOST_DEVICE Coefficients of_arm(std::int64_t arm) const {
    return {slope + arm * size, level + arm * size, size};
  }
};

// Predicted fall of the loss of a row last seen at `index`, under its arm's coefficients: 0 where there are none yet.
LEAD_FAST_HOST_DEVICE inline float predicted_drop(const Coefficients& of_arm, std::int64_t index, float proxy) {
  if (index >= of_arm.size) return 0.0f;
  return static_cast<float>(of_arm.slope[index] * static_cast<double>(proxy) + of_arm.level[index]);
}

// Loss now: max(0, loss last seen - drop); a NaN stays one.
LEAD_FAST_HOST_DEVICE inline float lazy_loss(float loss, float drop) {
  const float now = loss - drop;
  return now < 0.0f ? 0.0f : now;
}

// b of IDU = (1 - b) * loss now + b * previous IDU, as the two factors in fp32.
struct Smoothing {
  float now;
  float previous;

  LEAD_FAST_HOST_DEVICE explicit Smoothing(double b)
      : now(static_cast<float>(1.0 - b)), previous(static_cast<float>(b)) {}
};

LEAD_FAST_HOST_DEVICE inline float smoothed(const Smoothing& b, float loss_now, float previous) {
  return b.now * loss_now + b.previous * previous;
}

// What the table remembers of a sample's gradient: G_i / n_i, 0 where G_i is not finite.
LEAD_FAST_HOST_DEVICE inline float gradient_proxy(float grad_norm_sq, float num_tokens) {
  if (!std::isfinite(grad_norm_sq)) return 0.0f;
  return grad_norm_sq / (num_tokens < 1.0f ? 1.0f : num_tokens);
}

}  // namespace lead_fast
