// The loops of a choice for the machine the program runs on. LEAD_FAST_CPU=portable asks for those of every machine.
#pragma once

#include <cstdlib>
#include <string>

#include "core/cpu_features.h"
#include "core/rank_keys.h"
#include "core/rank_keys_avx2.h"

namespace lead_fast {

struct RankLoops {
  decltype(&count_available_portable) count_available;
  decltype(&utility_keys_portable) utility_keys;
  decltype(&random_words_portable) random_words;
  decltype(&softmax_bounds_portable) softmax_bounds;
  decltype(&collect_portable) collect;
};

inline const RankLoops& rank_loops() {
  static const RankLoops loops = [] {
#if defined(__x86_64__)
    const char* asked = std::getenv("LEAD_FAST_CPU");
    if (cpu_features().avx2_fma && (asked == nullptr || std::string(asked) != "portable")) {
      return RankLoops{&avx2::count_available, &avx2::utility_keys, &avx2::random_words, &avx2::softmax_bounds,
                       &avx2::collect};
    }
#endif
    return RankLoops{&count_available_portable, &utility_keys_portable, &random_words_portable,
                     &softmax_bounds_portable, &collect_portable};
  }();
  return loops;
}

}  // namespace lead_fast
