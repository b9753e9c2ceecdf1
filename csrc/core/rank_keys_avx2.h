// The loops of core/rank_keys.h for AVX2. The target holds no FMA, so that no product is contracted.
#pragma once

#include <cstdint>
#include <numeric>

#include "core/rank_keys.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LEAD_FAST_AVX2 __attribute__((target("avx2")))

namespace lead_fast {

namespace avx2 {

// order_key of eight numbers, but 1 for a NaN.
LEAD_FAST_AVX2 inline __m256i available_keys(__m256 values) {
  values = _mm256_add_ps(values, _mm256_setzero_ps());
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i flip = _mm256_or_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MIN));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(1), is_nan);
}

LEAD_FAST_AVX2 inline __m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

LEAD_FAST_AVX2 inline void store(std::uint32_t* to, __m256i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
}

LEAD_FAST_AVX2 inline __m256i load_bytes(const std::uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

// slope * proxy + level of four rows, in fp64 and then fp32; nothing is read where `known` is 0.
LEAD_FAST_AVX2 inline __m128 drops(const Coefficients& of_arm, __m128i index, __m128i known, __m128 proxy) {
  const __m256d zero = _mm256_setzero_pd(), mask = _mm256_castsi256_pd(_mm256_cvtepi32_epi64(known));
  const __m256d slope = _mm256_mask_i32gather_pd(zero, of_arm.slope, index, mask, 8);
  const __m256d level = _mm256_mask_i32gather_pd(zero, of_arm.level, index, mask, 8);
  return _mm256_cvtpd_ps(_mm256_add_pd(_mm256_mul_pd(slope, _mm256_cvtps_pd(proxy)), level));
}

// Utility of the eight rows from position p on.
LEAD_FAST_AVX2 inline __m256 utilities(const ArmRows& arm, std::int64_t p) {
  if (arm.given != nullptr) return _mm256_loadu_ps(arm.given + p);
  const __m256i index = load(arm.index + p);
  const __m256i known = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(arm.of_arm.size)), index);
  const __m256 proxy = _mm256_loadu_ps(arm.proxy + p);
  const __m128 first =
      drops(arm.of_arm, _mm256_castsi256_si128(index), _mm256_castsi256_si128(known), _mm256_castps256_ps128(proxy));
  const __m128 second = drops(arm.of_arm, _mm256_extracti128_si256(index, 1), _mm256_extracti128_si256(known, 1),
                              _mm256_extractf128_ps(proxy, 1));
  const __m256 drop = _mm256_and_ps(_mm256_set_m128(second, first), _mm256_castsi256_ps(known));
  // The maximum gives its second operand where that is a NaN.
  const __m256 now = _mm256_max_ps(_mm256_setzero_ps(), _mm256_sub_ps(_mm256_loadu_ps(arm.loss + p), drop));
  return _mm256_add_ps(_mm256_mul_ps(_mm256_set1_ps(arm.b.now), now),
                       _mm256_mul_ps(_mm256_set1_ps(arm.b.previous), _mm256_loadu_ps(arm.previous + p)));
}

// All bits of a lane where the row may be chosen.
LEAD_FAST_AVX2 inline __m256i available(const ArmRows& arm, std::int64_t p) {
  return _mm256_and_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(arm.max_uses), load_bytes(arm.uses + p)),
                          _mm256_cmpeq_epi32(load_bytes(arm.quarantined + p), _mm256_setzero_si256()));
}

LEAD_FAST_AVX2 inline std::int64_t count_available(const ArmRows& arm, std::int64_t begin, std::int64_t end) {
  __m256i counts = _mm256_setzero_si256();
  std::int64_t p = begin;
  for (; p + 8 <= end; p += 8) counts = _mm256_sub_epi32(counts, available(arm, p));
  std::uint32_t lanes[8];
  store(lanes, counts);
  return std::accumulate(lanes, lanes + 8, count_available_portable(arm, p, end));
}

LEAD_FAST_AVX2 inline void utility_keys(const ArmRows& arm, std::int64_t begin, std::int64_t end, std::uint32_t* keys) {
  std::int64_t p = begin;
  for (; p + 8 <= end; p += 8) {
    store(keys + (p - begin), _mm256_and_si256(available_keys(utilities(arm, p)), available(arm, p)));
  }
  utility_keys_portable(arm, p, end, keys + (p - begin));
}

// For each set of lanes their numbers, first to last.
struct LaneNumbers {
  std::uint8_t of[256][8];

  LaneNumbers() : of{} {
    for (int lanes = 0; lanes < 256; ++lanes) {
      int size = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if ((lanes >> lane & 1) != 0) of[lanes][size++] = static_cast<std::uint8_t>(lane);
      }
    }
  }
};

LEAD_FAST_AVX2 inline Collected collect(const std::uint32_t* keys, std::int64_t n, std::uint32_t low,
                                        std::uint32_t high, std::uint32_t* found, std::uint32_t* places) {
  static const LaneNumbers lane_numbers;
  const __m256i lowest = _mm256_set1_epi32(static_cast<int>(low)),
                width = _mm256_set1_epi32(static_cast<int>(high - low));
  const __m256i highest = _mm256_set1_epi32(static_cast<int>(high));
  __m256i place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), not_above = _mm256_setzero_si256();
  std::int64_t size = 0, i = 0;
  for (; i + 8 <= n; i += 8, place = _mm256_add_epi32(place, _mm256_set1_epi32(8))) {
    const __m256i key = load(keys + i), over = _mm256_sub_epi32(key, lowest);
    const __m256i inside = _mm256_cmpeq_epi32(_mm256_min_epu32(over, width), over);
    not_above = _mm256_sub_epi32(not_above, _mm256_cmpeq_epi32(_mm256_min_epu32(key, highest), key));
    const auto lanes = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(inside)));
    const __m256i order = load_bytes(lane_numbers.of[lanes]);
    store(found + size, _mm256_permutevar8x32_epi32(key, order));
    store(places + size, _mm256_permutevar8x32_epi32(place, order));
    size += __builtin_popcount(lanes);
  }
  std::uint32_t lanes[8];
  store(lanes, not_above);
  Collected rest = collect_portable(keys + i, n - i, low, high, found + size, places + size);
  for (std::int64_t tail = size; tail < size + rest.size; ++tail) places[tail] += static_cast<std::uint32_t>(i);
  return {size + rest.size, i - std::accumulate(lanes, lanes + 8, std::int64_t{0}) + rest.above};
}

// High and low words of eight products with one factor.
struct Products {
  __m256i high, low;
};

LEAD_FAST_AVX2 inline Products multiply(std::uint32_t factor, __m256i words) {
  const __m256i by = _mm256_set1_epi32(static_cast<int>(factor));
  const __m256i even = _mm256_mul_epu32(words, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(words, 32), by);
  return {_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA),
          _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA)};
}

LEAD_FAST_AVX2 inline void random_words(const ArmRows& arm, std::uint64_t seed, std::uint32_t round, std::int64_t begin,
                                        std::int64_t end, std::uint32_t* words) {
  std::int64_t p = begin;
  for (; p + 8 <= end; p += 8) {
    __m256i word[4] = {load(arm.rows + p), _mm256_setzero_si256(), _mm256_set1_epi32(static_cast<int>(round)),
                       _mm256_set1_epi32(kStreamRows)};
    PhiloxKey key{{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}};
    for (int turn = 0; turn < kPhiloxRounds; ++turn) {
      const Products first = multiply(kPhiloxMultiplier0, word[0]), second = multiply(kPhiloxMultiplier1, word[2]);
      const __m256i key_0 = _mm256_set1_epi32(static_cast<int>(key.word[0]));
      const __m256i key_1 = _mm256_set1_epi32(static_cast<int>(key.word[1]));
      word[0] = _mm256_xor_si256(_mm256_xor_si256(second.high, word[1]), key_0);
      word[1] = second.low;
      word[2] = _mm256_xor_si256(_mm256_xor_si256(first.high, word[3]), key_1);
      word[3] = first.low;
      key.word[0] += kPhiloxWeyl0;
      key.word[1] += kPhiloxWeyl1;
    }
    store(words + (p - begin), word[0]);
  }
  random_words_portable(arm, seed, round, p, end, words + (p - begin));
}

// Keys of eight scaled utilities plus the bounds of their bins, rounded to fp32.
LEAD_FAST_AVX2 inline __m256i bound_keys(__m256d first, __m256d second, const float* bounds, __m256i bin) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
  const __m256 bound = _mm256_mask_i32gather_ps(_mm256_setzero_ps(), bounds, bin, all, 4);
  const __m128 low = _mm256_cvtpd_ps(_mm256_add_pd(first, _mm256_cvtps_pd(_mm256_castps256_ps128(bound))));
  const __m128 high = _mm256_cvtpd_ps(_mm256_add_pd(second, _mm256_cvtps_pd(_mm256_extractf128_ps(bound, 1))));
  return available_keys(_mm256_set_m128(high, low));
}

LEAD_FAST_AVX2 inline void softmax_bounds(double temperature, const std::uint32_t* keys, const std::uint32_t* words,
                                          std::int64_t n, std::uint32_t* upper, std::uint32_t* lower) {
  const GumbelBounds& bounds = GumbelBounds::get();
  const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi32(-1), top = _mm256_set1_epi32(INT32_MIN);
  const __m256d by = _mm256_set1_pd(temperature);
  std::int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i key = load(keys + i), word = load(words + i);
    const __m256i missing = _mm256_cmpeq_epi32(key, zero);
    // key_value: the top bit is set for numbers that are not negative, of whose bits only it was flipped.
    const __m256i flip = _mm256_or_si256(_mm256_xor_si256(_mm256_srai_epi32(key, 31), ones), top);
    const __m256 value = _mm256_castsi256_ps(_mm256_xor_si256(key, flip));
    const __m256d first = _mm256_div_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(value)), by);
    const __m256d second = _mm256_div_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(value, 1)), by);

    const __m256 distance = _mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_xor_si256(word, ones), 1));
    const __m256i number = _mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(distance), GumbelBounds::kShift),
                                            _mm256_set1_epi32(GumbelBounds::kFirst - 1));
    const __m256i bin = _mm256_max_epi32(number, zero);
    store(upper + i, _mm256_andnot_si256(missing, bound_keys(first, second, bounds.high, bin)));
    store(lower + i, _mm256_andnot_si256(missing, bound_keys(first, second, bounds.low, bin)));
  }
  softmax_bounds_portable(temperature, keys + i, words + i, n - i, upper + i, lower + i);
}

}  // namespace avx2

}  // namespace lead_fast
#endif
