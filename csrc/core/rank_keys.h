// What a choice goes by, row after row of a drawn arm: keys that order as unsigned integers, 0 where a row is not
// available. Written once for every machine here and once for AVX2 in core/rank_keys_avx2.h, bit-identical.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/choice.h"
#include "core/philox.h"
#include "core/table.h"

namespace lead_fast {

// The columns of the table that a choice in one arm reads.
struct ArmRows {
  const float *loss, *previous, *proxy;
  const std::int32_t* index;  // step or round last seen
  const std::uint8_t *uses, *quarantined;
  const std::int32_t* rows;
  const float* given;  // utility in place of the table's IDU, or null
  Coefficients of_arm;
  Smoothing b;
  int max_uses;

  bool available(std::int64_t p) const {
    return static_cast<int>(uses[p] < max_uses) & static_cast<int>(quarantined[p] == 0);
  }

  float utility(std::int64_t p) const {
    if (given != nullptr) return given[p];
    return smoothed(b, lazy_loss(loss[p], predicted_drop(of_arm, index[p], proxy[p])), previous[p]);
  }
};

// Key of a row that may be chosen: 0 is left to those that may not.
inline std::uint32_t available_key(float value) {
  const std::uint32_t key = order_key(value);
  return key == 0 ? 1 : key;
}

inline float key_value(std::uint32_t key) {
  const std::uint32_t bits = (key >> 31) != 0 ? key ^ 0x80000000u : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// How many rows of positions [begin, end) may be chosen.
inline std::int64_t count_available_portable(const ArmRows& arm, std::int64_t begin, std::int64_t end) {
  std::int64_t available = 0;
  for (std::int64_t p = begin; p < end; ++p) available += arm.available(p);
  return available;
}

// Writes the utility keys of positions [begin, end).
inline void utility_keys_portable(const ArmRows& arm, std::int64_t begin, std::int64_t end, std::uint32_t* keys) {
  for (std::int64_t p = begin; p < end; ++p) {
    keys[p - begin] = arm.available(p) ? available_key(arm.utility(p)) : 0;
  }
}

// Vectors of at most this many keys are stored whole: what loops write to needs room for one more than it holds.
constexpr std::int64_t kRankVector = 8;

struct Collected {
  std::int64_t size;   // keys from `low` to `high`
  std::int64_t above;  // keys above `high`
};

// Collects the keys from `low` to `high` and their places, in order.
inline Collected collect_portable(const std::uint32_t* keys, std::int64_t n, std::uint32_t low, std::uint32_t high,
                                  std::uint32_t* found, std::uint32_t* places) {
  const std::uint32_t width = high - low;
  Collected collected{0, 0};
  for (std::int64_t i = 0; i < n; ++i) {  // without branches: what is found is not to be predicted
    found[collected.size] = keys[i];
    places[collected.size] = static_cast<std::uint32_t>(i);
    collected.size += keys[i] - low <= width;
    collected.above += keys[i] > high;
  }
  return collected;
}

// Writes the random word of each row of positions [begin, end): its uniform number is (word + 0.5) * 2^-32.
inline void random_words_portable(const ArmRows& arm, std::uint64_t seed, std::uint32_t round, std::int64_t begin,
                                  std::int64_t end, std::uint32_t* words) {
  for (std::int64_t p = begin; p < end; ++p) {
    words[p - begin] = philox_word(seed, kStreamRows, round, static_cast<std::uint64_t>(arm.rows[p]));
  }
}

// Gumbel numbers between bounds, by a few high bits of the distance of the random word from its end, where the numbers
// are largest. A choice sorts out by the bounds and takes logarithms of the few rows that are left.
class GumbelBounds {
 public:
  static constexpr int kShift = 18;                              // 5 bits of mantissa a bin
  static constexpr std::int32_t kFirst = (127 << 23) >> kShift;  // the bin of distance 1; bin 0 is distance 0
  static constexpr int kBins = ((158 << 23) >> kShift) - kFirst + 2;

  static int bin(std::uint32_t word) {
    const auto distance = static_cast<float>(static_cast<std::int32_t>(~word >> 1));
    std::int32_t bits;
    std::memcpy(&bits, &distance, sizeof bits);
    const std::int32_t number = (bits >> kShift) - kFirst + 1;
    return number < 0 ? 0 : number;
  }

  static const GumbelBounds& get() {
    static const GumbelBounds bounds;
    return bounds;
  }

  float low[kBins], high[kBins];

 private:
  GumbelBounds() {
    for (int number = 0; number < kBins; ++number) {
      // Distances of this bin, a little wider: a distance is rounded before its bits are read.
      constexpr double wider = 1.0 + 0x1p-23;
      const double first = number == 0 ? 0.0 : std::floor(edge(number) / wider);
      const double last = number == 0 ? 1.0 : std::ceil(edge(number + 1) * wider);
      high[number] = std::nextafter(static_cast<float>(gumbel(uniform(2.0 * first))), HUGE_VALF);
      low[number] = std::nextafter(static_cast<float>(gumbel(uniform(2.0 * last + 1.0))), -HUGE_VALF);
    }
  }

  static double edge(int number) {
    const std::int32_t bits = (number - 1 + kFirst) << kShift;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // The uniform number of the word that is `distance` below the last one.
  static double uniform(double distance) {
    const double word = 0x1p32 - 1.0 - distance;
    return ((word < 0.0 ? 0.0 : word) + 0.5) * 0x1p-32;
  }
};

// Writes keys of an upper and a lower bound of utility / temperature + Gumbel number, from n utility keys and random
// words. fp64 to fp32 rounds monotonically, so the exact number rounded to fp32 lies between them.
inline void softmax_bounds_portable(double temperature, const std::uint32_t* keys, const std::uint32_t* words,
                                    std::int64_t n, std::uint32_t* upper, std::uint32_t* lower) {
  const GumbelBounds& bounds = GumbelBounds::get();
  for (std::int64_t i = 0; i < n; ++i) {
    const int bin = GumbelBounds::bin(words[i]);
    const double scaled = static_cast<double>(key_value(keys[i])) / temperature;
    const auto bound_key = [&](float bound) {
      return keys[i] == 0 ? 0 : available_key(static_cast<float>(scaled + static_cast<double>(bound)));
    };
    upper[i] = bound_key(bounds.high[bin]);
    lower[i] = bound_key(bounds.low[bin]);
  }
}

}  // namespace lead_fast
