// Argument checks that the CPU and the CUDA kernel of lead_fast::philox_uniform share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

namespace lead_fast {

inline void check_philox_uniform(int64_t stream, int64_t round, const torch::stable::Tensor& counters) {
  constexpr int64_t max_word = std::numeric_limits<uint32_t>::max();
  STD_TORCH_CHECK(0 <= stream && stream <= max_word, "philox_uniform: `stream` must be an integer in [0, 2**32), got ",
                  stream);
  STD_TORCH_CHECK(0 <= round && round <= max_word, "philox_uniform: `round` must be an integer in [0, 2**32), got ",
                  round);
  STD_TORCH_CHECK(counters.scalar_type() == torch::headeronly::ScalarType::Long,
                  "philox_uniform: `counters` must be int64, got ", counters.scalar_type());
}

}  // namespace lead_fast
