// The estimator grad_norm: per row, from its own gradient norm, calibrated online.
//
//   drop_i = (c + c_k) * lr_s / n_s * proxy_i * (1 - beta1^m) * exp(-kappa * tau)  +  d * tau_k  +  e * (tau - tau_k)
//
// s is the step the row was last seen at; m optimizer steps since, its own included; tau the learning rate summed
// since, in rounds at peak rate inside the exponential and raw elsewhere; tau_k the part of it in the row's own arm.
//
//   pairs  [Q, K, 12]     for each kappa and arm X^T X (9, row-major), X^T y (3)
//   totals [2 + Q]        REVISITS, ALL pairs, each kappa's past squared error
//   fit    [1 + Q, 4 + K] kappa, c, d, e, c_k of each kappa; row 0 is a copy of the one in use
#pragma once

#include <cmath>
#include <cstdint>

#include "core/clock.h"
#include "core/host_device.h"

namespace lead_fast {

constexpr int kPairWidth = 12, kPairY = 9;                                       // columns of pairs
constexpr int kRevisits = 0, kAllPairs = 1, kErrors = 2;                         // entries of totals
constexpr int kKappa = 0, kSlopeC = 1, kOwnD = 2, kOtherE = 3, kArmOffsets = 4;  // columns of fit

// The regression's state as `observe` moves it.
struct PairSums {
  double* pairs;  // null: no pairs are kept
  double* totals;
  const double* fit;
  std::int64_t num_kappas;  // Q
  double adam_beta1;
};

// What training did between step s and step `now`, for a row of one arm.
struct Since {
  double rate;   // lr_s / n_s * (1 - beta1^m); 0 at s = now
  double tau;    // in rounds at peak rate
  double own;    // learning rate summed in the row's arm
  double other;  // and in the others
};

// Of a row of no arm yet: all of the learning rate is other arms'.
LEAD_FAST_HOST_DEVICE inline Since since_step(const double* clock, const double* unit, std::int64_t num_arms,
                                              std::int64_t s, std::int64_t now, double adam_beta1) {
  const double* then = clock_entry(clock, num_arms, s);
  const double sum = clock_entry(clock, num_arms, now)[kLrSum] - then[kLrSum];
  const double items = then[kNumItems] < 1.0 ? 1.0 : then[kNumItems];
  const double momentum = now > s ? 1.0 - std::pow(adam_beta1, static_cast<double>(now - s)) : 0.0;
  return {then[kLr] / items * momentum, sum / unit[kRoundLr], 0.0, sum};
}

LEAD_FAST_HOST_DEVICE inline Since in_arm(const Since& since, const double* clock, std::int64_t num_arms,
                                          std::int64_t s, std::int64_t now, std::int64_t arm) {
  const double own =
      clock_entry(clock, num_arms, now)[kArmLrSum + arm] - clock_entry(clock, num_arms, s)[kArmLrSum + arm];
  return {since.rate, since.tau, own, since.other - own};
}

LEAD_FAST_HOST_DEVICE inline Since since_step(const double* clock, const double* unit, std::int64_t num_arms,
                                              std::int64_t s, std::int64_t now, std::int64_t arm, double adam_beta1) {
  return in_arm(since_step(clock, unit, num_arms, s, now, adam_beta1), clock, num_arms, s, now, arm);
}

struct Features {
  double x[3];
};

LEAD_FAST_HOST_DEVICE inline Features pair_features(const Since& since, float proxy, double kappa) {
  return {{since.rate * static_cast<double>(proxy) * std::exp(-kappa * since.tau), since.own, since.other}};
}

// The drop that one kappa's row of fit predicts.
LEAD_FAST_HOST_DEVICE inline double predict(const Features& features, const double* fit_row, std::int64_t arm) {
  const double c = fit_row[kSlopeC] + fit_row[kArmOffsets + arm];
  return c * features.x[0] + fit_row[kOwnD] * features.x[1] + fit_row[kOtherE] * features.x[2];
}

// Adds one pair to an arm's statistics; `pairs` [12] starts at (kappa, arm).
LEAD_FAST_HOST_DEVICE inline void add_pair(const Features& features, double truth, double* pairs) {
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) pairs[3 * i + j] += features.x[i] * features.x[j];
    pairs[kPairY + i] += features.x[i] * truth;
  }
}

// What is left of a row's own step: the part of its slope that no arm's coefficient enters.
LEAD_FAST_HOST_DEVICE inline double decayed_rate(const Since& since, double kappa) {
  return since.rate * std::exp(-kappa * since.tau);
}

// slope and level of a row seen at step s, by the fit in use.
struct SlopeLevel {
  double slope;
  double level;
};

// `decayed` is decayed_rate(since, kappa), which all arms share.
LEAD_FAST_HOST_DEVICE inline SlopeLevel grad_norm_coefficient(const Since& since, double decayed, const double* fit_row,
                                                              std::int64_t arm) {
  const double c = fit_row[kSlopeC] + fit_row[kArmOffsets + arm];
  return {c * decayed, fit_row[kOwnD] * since.own + fit_row[kOtherE] * since.other};
}

LEAD_FAST_HOST_DEVICE inline SlopeLevel grad_norm_coefficient(const Since& since, const double* fit_row,
                                                              std::int64_t arm) {
  return grad_norm_coefficient(since, decayed_rate(since, fit_row[kKappa]), fit_row, arm);
}

// Solves a x = b for a symmetric positive definite a, by its LDL^T factors.
LEAD_FAST_HOST_DEVICE inline void solve_3x3(const double a[9], const double b[3], double x[3]) {
  const double d0 = a[0];
  const double l10 = a[3] / d0, l20 = a[6] / d0;
  const double d1 = a[4] - l10 * a[3];
  const double l21 = (a[7] - l20 * a[3]) / d1;
  const double d2 = a[8] - l20 * a[6] - l21 * l21 * d1;

  const double y1 = b[1] - l10 * b[0];
  const double y2 = b[2] - l20 * b[0] - l21 * y1;
  x[2] = y2 / d2;
  x[1] = y1 / d1 - l21 * x[2];
  x[0] = b[0] / d0 - l10 * x[1] - l20 * x[2];
}

// Fits c, d, e and every c_k of one kappa: ridge regression on features scaled to unit mean square, with prior mean 0
// and the weight of `prior_pairs` pairs; c_k is the arm's own slope in what c leaves, shrunk by the same weight. What
// fewer than `min_pairs` pairs speak of keeps its prior.
LEAD_FAST_HOST_DEVICE inline void calibrate_kappa(const double* pairs,   // [num_arms, 12] of this kappa
                                                  const double* totals,  // [2 + Q]
                                                  std::int64_t num_arms, double prior_pairs, double min_pairs,
                                                  double* fit_row) {  // [4 + num_arms] of this kappa
  double sum[kPairWidth] = {};
  for (std::int64_t k = 0; k < num_arms; ++k) {
    for (int i = 0; i < kPairWidth; ++i) sum[i] += pairs[k * kPairWidth + i];
  }

  double inverse[3];  // one over each feature's root mean square, 0 where the feature is unknown
  for (int i = 0; i < 3; ++i) {
    const double count = totals[i == 0 ? kRevisits : kAllPairs];
    const double scale = std::sqrt(sum[4 * i] / (count < 1.0 ? 1.0 : count));
    inverse[i] = count >= min_pairs && scale > 0.0 ? 1.0 / (scale < 1e-300 ? 1e-300 : scale) : 0.0;
  }
  double gram[9], right[3], coefficients[3];
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      gram[3 * i + j] = sum[3 * i + j] * inverse[i] * inverse[j] + (i == j ? prior_pairs : 0.0);
    }
    right[i] = sum[kPairY + i] * inverse[i];
  }
  solve_3x3(gram, right, coefficients);
  for (int i = 0; i < 3; ++i) coefficients[i] *= inverse[i];

  const double revisits = totals[kRevisits] < 1.0 ? 1.0 : totals[kRevisits];
  const double prior = prior_pairs * (sum[0] / revisits);
  fit_row[kSlopeC] = coefficients[0];
  fit_row[kOwnD] = coefficients[1];
  fit_row[kOtherE] = coefficients[2];
  for (std::int64_t k = 0; k < num_arms; ++k) {
    const double* own = pairs + k * kPairWidth;
    const double left = own[kPairY] - (own[0] * coefficients[0] + own[1] * coefficients[1] + own[2] * coefficients[2]);
    const double weight = own[0] + prior;
    fit_row[kArmOffsets + k] = inverse[0] > 0.0 ? left / (weight < 1e-300 ? 1e-300 : weight) : 0.0;
  }
}

// Copies the row of the lowest past error, the first on ties, to row 0 of fit.
LEAD_FAST_HOST_DEVICE inline void choose_kappa(const double* totals, std::int64_t num_kappas, std::int64_t num_arms,
                                               double* fit) {
  std::int64_t best = 0;
  for (std::int64_t q = 1; q < num_kappas; ++q) {
    if (totals[kErrors + q] < totals[kErrors + best]) best = q;
  }
  const std::int64_t width = kArmOffsets + num_arms;
  for (std::int64_t i = 0; i < width; ++i) fit[i] = fit[(1 + best) * width + i];
}

}  // namespace lead_fast
