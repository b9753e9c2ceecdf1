// Utility of any rows now, lazily, and the coefficients and fits it rests on.
#pragma once

#include <cstdint>

#include "core/clock.h"
#include "core/grad_norm.h"
#include "core/table.h"

namespace lead_fast {

struct Utility {
  const std::int64_t* rows;  // [size]
  std::int64_t size;
  std::int64_t num_rows;         // N
  const std::int32_t* position;  // [N]
  const std::int16_t* arm;       // [N], by position like what follows
  const float* values;
  const std::int32_t* seen;
  Coefficients coefficients;
  bool by_round;
  double smoothing;
};

// Writes IDU and the loss now of each row, fp32 [size]. `parallel` is called as parallel(begin, end, grain, body).
template <class Parallel>
void utility(const Utility& args, const Parallel& parallel, float* idu, float* loss) {
  check_rows("utility", args.rows, args.size, args.num_rows);
  const float* last = table_row(args.values, kLoss, args.num_rows);
  const float* previous = table_row(args.values, kPrevious, args.num_rows);
  const float* proxy = table_row(args.values, kProxy, args.num_rows);
  const std::int32_t* index = table_row(args.seen, args.by_round ? kRound : kStep, args.num_rows);
  const Smoothing b(args.smoothing);
  constexpr std::int64_t grain = 2048;
  parallel(0, args.size, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t p = args.position[args.rows[i]];
      loss[i] = lazy_loss(last[p], predicted_drop(args.coefficients.of_arm(args.arm[p]), index[p], proxy[p]));
      idu[i] = smoothed(b, loss[i], previous[p]);
    }
  });
}

struct GradNormCoefficients {
  Clock clock;
  const double* fit_row;  // [4 + K] the one in use
  double adam_beta1;
  std::int64_t num_steps;
};

// Writes slope and level, fp64 [2, K, num_steps + 1].
template <class Parallel>
void grad_norm_coefficients(const GradNormCoefficients& args, const Parallel& parallel, double* out) {
  const std::int64_t size = args.num_steps + 1, num_arms = args.clock.num_arms;
  double *slope = out, *level = out + num_arms * size;
  constexpr std::int64_t grain = 1024;
  parallel(0, size, grain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      const Since since = since_step(args.clock.entries, args.clock.unit, num_arms, s, args.num_steps, args.adam_beta1);
      const double decayed = decayed_rate(since, args.fit_row[kKappa]);
      for (std::int64_t k = 0; k < num_arms; ++k) {
        const Since own = in_arm(since, args.clock.entries, num_arms, s, args.num_steps, k);
        const SlopeLevel row = grad_norm_coefficient(own, decayed, args.fit_row, k);
        slope[k * size + s] = row.slope;
        level[k * size + s] = row.level;
      }
    }
  });
}

struct Calibrate {
  const double* pairs;   // [Q, K, 12]
  const double* totals;  // [2 + Q]
  double* fit;           // [1 + Q, 4 + K]
  std::int64_t num_kappas, num_arms;
  double prior_pairs, min_pairs;
};

inline void calibrate(const Calibrate& args) {
  const std::int64_t width = kArmOffsets + args.num_arms;
  for (std::int64_t q = 0; q < args.num_kappas; ++q) {
    calibrate_kappa(args.pairs + q * args.num_arms * kPairWidth, args.totals, args.num_arms, args.prior_pairs,
                    args.min_pairs, args.fit + (1 + q) * width);
  }
  choose_kappa(args.totals, args.num_kappas, args.num_arms, args.fit);
}

}  // namespace lead_fast
