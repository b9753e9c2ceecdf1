// Which of n keys rank first, highest first, ties to the earlier one: exact, in one pass and a sample.
//
// Source: Floyd, Rivest, "Expected time bounds for selection", CACM 1975.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>

#include "core/rank_loops.h"

namespace lead_fast {

// Keys of a range of values, in order, with their places; and how many keys are above the range.
struct Found {
  std::uint32_t *keys, *places;  // room for all keys and kRankVector more
  std::int64_t size, above;
};

// A range of keys that holds those of ranks `first` to `last`, unless the sample deceives: three standard errors to
// either side.
struct Window {
  std::uint32_t low = 0, high = 0xFFFFFFFFu;
};

inline Window sampled_window(const std::uint32_t* keys, std::int64_t n, std::int64_t first, std::int64_t last,
                             std::uint32_t* sample) {
  constexpr std::int64_t stride = 32, least = 128 * stride;
  Window window;
  if (n < least) return window;
  std::int64_t size = 0;
  for (std::int64_t i = stride / 2; i < n; i += stride) sample[size++] = keys[i];
  const auto place_of = [=](std::int64_t rank, double errors) {
    const double share = static_cast<double>(rank) / static_cast<double>(n),
                 expected = share * static_cast<double>(size);
    return static_cast<std::int64_t>(expected + errors * (std::sqrt(expected * (1.0 - share)) + 1.0));
  };
  const std::int64_t high = place_of(first, -3.0), low = place_of(last, 3.0);
  std::uint32_t *from = sample, *end = sample + size;
  if (high > 0) {
    from += high;
    std::nth_element(sample, from, end, std::greater<>());
    window.high = *from;
  }
  if (low < size) {
    std::nth_element(from, sample + low, end, std::greater<>());
    window.low = sample[low];
  }
  return window;
}

inline void collect(const std::uint32_t* keys, std::int64_t n, const Window& window, Found& found) {
  const Collected collected =
      rank_loops().collect(keys, n, std::max(window.low, 1u), window.high, found.keys, found.places);
  found.size = collected.size;
  found.above = collected.above;
}

// Finds the keys of ranks `first` to `last` among others, of n keys of which at least `last` are not 0. The sample is
// kept in `found` until then.
inline void find_ranks(const std::uint32_t* keys, std::int64_t n, std::int64_t first, std::int64_t last, Found& found) {
  collect(keys, n, sampled_window(keys, n, first, last, found.keys), found);
  if (found.above >= first || last > found.above + found.size) collect(keys, n, Window{}, found);
}

// Keys above `key` are in, and the first `ties` of those equal to it.
struct Threshold {
  std::uint32_t key;
  std::int64_t ties;
};

// The threshold of the first `m` of n keys, of which `available` are not 0.
inline Threshold top(const std::uint32_t* keys, std::int64_t n, std::int64_t available, std::int64_t m, Found& found) {
  if (m <= 0) return {0xFFFFFFFFu, 0};
  if (m >= available) return {0, 0};
  find_ranks(keys, n, m, m, found);
  std::uint32_t *begin = found.keys, *place = begin + (m - found.above - 1);
  std::nth_element(begin, place, begin + found.size, std::greater<>());
  const std::uint32_t key = *place;
  // What stands before its place is not lower; the m-th takes as many of its equals as are missing.
  const auto higher = std::count_if(begin, place, [=](std::uint32_t other) { return other > key; });
  return {key, m - found.above - higher};
}

// One pass over keys in order, asking of each whether it is in.
class Taken {
 public:
  explicit Taken(const Threshold& threshold) : key_(threshold.key), ties_(threshold.ties) {}

  // Without branches: where many keys are in, they are not to be predicted.
  bool operator()(std::uint32_t key) {
    const bool equal = key == key_;
    ties_ -= equal;
    return static_cast<int>(key > key_) | (static_cast<int>(equal) & static_cast<int>(ties_ >= 0));
  }

 private:
  std::uint32_t key_;
  std::int64_t ties_;
};

}  // namespace lead_fast
