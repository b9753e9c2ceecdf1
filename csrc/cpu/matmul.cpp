#include "cpu/matmul.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <array>

#include "core/cpu_features.h"
#include "ops/torch_macros.h"

// In torch builds with oneDNN only: elsewhere its address is null.
extern "C" AOTITorchError aoti_torch_cpu__linear_pointwise(AtenTensorHandle x, AtenTensorHandle w,
                                                           AtenTensorHandle* bias, const char* attr,
                                                           const double** scalars, int64_t num_scalars,
                                                           const char** algorithm, AtenTensorHandle* out)
    __attribute__((weak));

namespace lead_fast::cpu {

namespace {

const torch::stable::Device kCpu(torch::headeronly::DeviceType::CPU);

// A view without owner and without autograd.
Tensor view(const Matrix& m) {
  const std::array<int64_t, 2> sizes{m.rows, m.cols}, strides{m.row_stride, m.col_stride};
  return torch::stable::from_blob(m.data, sizes, strides, kCpu, m.dtype);
}

Tensor allocate(int64_t numel, ScalarType dtype) {
  return torch::stable::empty(std::array<int64_t, 1>{numel}, dtype, std::nullopt, kCpu);
}

}  // namespace

float* reserve(std::optional<Tensor>& buffer, int64_t numel) {
  if (!buffer || buffer->numel() < numel) buffer = allocate(numel, ScalarType::Float);
  return buffer->mutable_data_ptr<float>();
}

void multiply(const Matrix& a, const Matrix& b, const Matrix& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(view(out).get(), view(a).get(), view(b).get()));
}

void multiply_add(const Matrix& a, const Matrix& b, const Matrix& out) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(view(out).get(), view(out).get(), view(a).get(), view(b).get(),
                                                         /*beta=*/1, /*alpha=*/1));
}

Tensor linear(const Matrix& a, const Matrix& w, std::optional<Tensor>& scratch, const Matrix* bias) {
  if (bias == nullptr && a.dtype == ScalarType::Float && cpu_features().avx512 &&
      aoti_torch_cpu__linear_pointwise != nullptr) {
    AtenTensorHandle out = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu__linear_pointwise(view(a).get(), view(w).get(), nullptr, "none", nullptr, 0, nullptr, &out));
    return Tensor(out);
  }
  const int64_t numel = a.rows * w.rows;
  if (!scratch || scratch->numel() < numel) scratch = allocate(numel, a.dtype);
  const Matrix out = {scratch->data_ptr(), a.dtype, a.rows, w.rows, w.rows};
  if (bias == nullptr) {
    multiply(a, w.t(), out);
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(view(out).get(), view(*bias).get(), view(a).get(),
                                                           view(w.t()).get(), /*beta=*/1, /*alpha=*/1));
  }
  return view(out);
}

}  // namespace lead_fast::cpu
