// Scratch memory that the process keeps from one call to the next.
#pragma once

#include <cstdint>
#include <optional>

#include "cpu/matmul.h"

namespace lead_fast::cpu {

// For what is large and needed at every step: 50 MB of fresh pages cost a call that computes for a second 2% to 4%.
// Calls that run at the same time have one each; the largest that is not above 256 MiB stays.
class KeptBuffer {
 public:
  KeptBuffer();
  ~KeptBuffer();
  KeptBuffer(const KeptBuffer&) = delete;
  KeptBuffer& operator=(const KeptBuffer&) = delete;

  float* reserve(int64_t numel) { return lead_fast::cpu::reserve(buffer_, numel); }

 private:
  std::optional<Tensor> buffer_;
};

}  // namespace lead_fast::cpu
