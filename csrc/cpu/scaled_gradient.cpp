// lead_fast::scaled_gradient.cpp for CPU tensors: the contract is in lead_fast/reference.py, the schema in
// lead_fast/ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "cpu/row_kernels.h"

namespace {

using lead_fast::cpu::StoredRows;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows are cut into pieces of this many values: one long vector under one factor is threaded too.
constexpr int64_t kPiece = 16384;

template <class Stored>
void scale(const StoredRows<Stored>& rows, const Tensor& gradient, const Tensor& upstream, const Tensor& out) {
  const auto* from = static_cast<const Stored*>(gradient.const_data_ptr());
  const float* factors = upstream.const_data_ptr<float>();
  void* to = out.mutable_data_ptr();
  const bool to_bf16 = out.scalar_type() == ScalarType::BFloat16;
  const int64_t width = upstream.numel() == 0 ? 0 : gradient.numel() / upstream.numel();
  const int64_t pieces = (width + kPiece - 1) / kPiece;
  torch::stable::parallel_for(0, upstream.numel() * pieces, lead_fast::cpu::grain(std::min(width, kPiece)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t column = i % pieces * kPiece, offset = i / pieces * width + column;
                                  const int64_t n = std::min(width - column, kPiece);
                                  const float factor = factors[i / pieces];
                                  if (to_bf16) {
                                    rows.scale_to_bf16(from + offset, factor, static_cast<uint16_t*>(to) + offset, n);
                                  } else {
                                    rows.scale_to_f32(from + offset, factor, static_cast<float*>(to) + offset, n);
                                  }
                                }
                              });
}

// gradient: fp32 or bf16; upstream: fp32 [], or [R] for a gradient [R, C]; out_dtype: fp32 or bf16.
Tensor scaled_gradient(Tensor gradient, Tensor upstream, ScalarType out_dtype) {
  const auto served = [](ScalarType dtype) { return dtype == ScalarType::Float || dtype == ScalarType::BFloat16; };
  STD_TORCH_CHECK(served(gradient.scalar_type()) && served(out_dtype),
                  "scaled_gradient: `gradient` and `out_dtype` must be fp32 or bf16 on the CPU");
  STD_TORCH_CHECK(upstream.scalar_type() == ScalarType::Float, "scaled_gradient: `upstream` must be fp32");
  STD_TORCH_CHECK(
      upstream.dim() == 0 || (upstream.dim() == 1 && gradient.dim() == 2 && upstream.size(0) == gradient.size(0)),
      "scaled_gradient: `upstream` must be one number, or one for each row of a `gradient` [R, C]");
  gradient = torch::stable::contiguous(gradient);
  upstream = torch::stable::contiguous(upstream);
  const Tensor out = torch::stable::new_empty(gradient, gradient.sizes(), out_dtype);
  const auto& kernels = lead_fast::cpu::row_kernels();
  if (gradient.scalar_type() == ScalarType::Float) {
    scale(kernels.f32, gradient, upstream, out);
  } else {
    scale(kernels.bf16, gradient, upstream, out);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CPU, library) { library.impl("scaled_gradient.cpp", TORCH_BOX(&scaled_gradient)); }
