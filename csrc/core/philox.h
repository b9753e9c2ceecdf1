// Philox4x32-10: counter-based random numbers, the same on every device, thread count and library.
//
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace lead_fast {

constexpr std::uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr std::uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxBlock {
  std::uint32_t word[4];
};

struct PhiloxKey {
  std::uint32_t word[2];
};

// One block of four random words for one counter block and one key.
LEAD_FAST_HOST_DEVICE inline PhiloxBlock philox4x32_10(PhiloxBlock counter, PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t product_0 = static_cast<std::uint64_t>(kPhiloxMultiplier0) * counter.word[0];
    const std::uint64_t product_1 = static_cast<std::uint64_t>(kPhiloxMultiplier1) * counter.word[2];
    counter = {{static_cast<std::uint32_t>(product_1 >> 32) ^ counter.word[1] ^ key.word[0],
                static_cast<std::uint32_t>(product_1),
                static_cast<std::uint32_t>(product_0 >> 32) ^ counter.word[3] ^ key.word[1],
                static_cast<std::uint32_t>(product_0)}};
    key.word[0] += kPhiloxWeyl0;
    key.word[1] += kPhiloxWeyl1;
  }
  return counter;
}

// The random word of `counter` in one (seed, stream, round).
LEAD_FAST_HOST_DEVICE inline std::uint32_t philox_word(std::uint64_t seed, std::uint32_t stream, std::uint32_t round,
                                                       std::uint64_t counter) {
  return philox4x32_10(
             {{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32), round, stream}},
             {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}})
      .word[0];
}

// Its uniform number in (0, 1): exact in fp64, never 0 and never 1.
LEAD_FAST_HOST_DEVICE inline double uniform_of_word(std::uint32_t word) {
  return (static_cast<double>(word) + 0.5) * 0x1p-32;
}

LEAD_FAST_HOST_DEVICE inline double philox_uniform(std::uint64_t seed, std::uint32_t stream, std::uint32_t round,
                                                   std::uint64_t counter) {
  return uniform_of_word(philox_word(seed, stream, round, counter));
}

}  // namespace lead_fast
