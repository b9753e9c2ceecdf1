// torch's threads for the loops of the core.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace lead_fast::cpu {

// Calls body(begin, end) on parts of a range, of at least `grain` each unless the range is shorter.
constexpr auto parallel = [](int64_t begin, int64_t end, int64_t grain, const auto& body) {
  torch::stable::parallel_for(begin, end, grain, body);
};

}  // namespace lead_fast::cpu
