#include "cpu/kept_buffer.h"

#include <mutex>
#include <utility>

namespace lead_fast::cpu {

namespace {

constexpr int64_t kMostKept = int64_t{256} << 20;

struct Kept {
  std::mutex mutex;
  std::optional<Tensor> buffer;
};

// Never destroyed: torch may be gone by then.
Kept& kept() {
  static Kept* const only = new Kept;
  return *only;
}

}  // namespace

KeptBuffer::KeptBuffer() {
  const std::lock_guard<std::mutex> lock(kept().mutex);
  std::swap(buffer_, kept().buffer);
}

KeptBuffer::~KeptBuffer() {
  if (!buffer_ || buffer_->numel() > kMostKept) return;
  const std::lock_guard<std::mutex> lock(kept().mutex);
  std::optional<Tensor>& other = kept().buffer;
  if (!other || other->numel() < buffer_->numel()) std::swap(buffer_, other);
}

}  // namespace lead_fast::cpu
