#include "cpu/matmul.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <array>

#include "ops/torch_macros.h"

namespace lead_fast::cpu {

namespace {

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

// A view without owner and without autograd.
Tensor view(const Matrix& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.cols}, strides{m.row_stride, m.col_stride};
  return torch::stable::from_blob(m.data, sizes, strides, kCpu, m.dtype);
}

void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  // A kernel that has none to give declines, and the memory is as good as before.
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

void* reserve_bytes(std::optional<Tensor>& buffer, int64_t bytes) {
  if (!buffer || buffer->numel() < bytes) {
    buffer = torch::stable::empty(std::array<int64_t, 1>{bytes}, ScalarType::Byte, std::nullopt, kCpu);
    ask_for_huge_pages(buffer->mutable_data_ptr(), bytes);
  }
  return buffer->mutable_data_ptr();
}

float* reserve(std::optional<Tensor>& buffer, int64_t numel) {
  return static_cast<float*>(reserve_bytes(buffer, numel * int64_t{sizeof(float)}));
}

void multiply(const Matrix& a, const Matrix& b, const Matrix& out, const Matrix* bias) {
  if (bias == nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(view(out).get(), view(a).get(), view(b).get()));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(view(out).get(), view(*bias).get(), view(a).get(),
                                                           view(b).get(), /*beta=*/1, /*alpha=*/1));
  }
}

void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(view(out).get(), view(out).get(), view(a).get(), view(b).get(),
                                                         /*beta=*/1, /*alpha=*/1));
}

}  // namespace lead_fast::cpu
