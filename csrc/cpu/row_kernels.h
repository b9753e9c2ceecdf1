// What the fused loss does with single rows: a row of logits becomes its gradient in place, and a few inner products.
// One source (row_kernels_impl.h) is compiled for each instruction set; the CPU picks one when the library is first
// used.
#pragma once

#include <cstdint>

namespace lead_fast::cpu {

// How the head turns a = W h into logits: z = softcap(logit_scale * (a + bias)).
struct LogitMap {
  int64_t vocab;
  const float* bias;  // [vocab] or null
  float logit_scale;
  float softcap;  // 0: no cap
};

struct RowLoss {
  float nll;
  float logit_grad_sq;  // ||softmax(z) - onehot(label)||^2; only with the gradient
};

// Kernels over rows stored as fp32 (float) or bf16 (uint16_t).
template <class Stored>
struct StoredRows {
  // a [vocab] -> d nll / d a in place where `gradient`, otherwise `a` keeps its values. `label` is in [0, vocab).
  RowLoss (*loss)(Stored* a, int64_t label, const LogitMap& map, bool gradient);
  // out[i] = factor * in[i]; a factor of 0 gives 0 whatever in[i] is.
  void (*scale_to_f32)(const Stored* in, float factor, float* out, int64_t n);
  void (*scale_to_bf16)(const Stored* in, float factor, uint16_t* out, int64_t n);
  // sum[i] += factor * in[i]
  void (*add)(const Stored* in, float factor, float* sum, int64_t n);
};

struct RowKernels {
  StoredRows<float> f32;
  StoredRows<uint16_t> bf16;
  double (*dot)(const float* x, const float* y, int64_t n);
  // The sum over t in [begin, end) and u <= t of <d_t, d_u> <h_t, h_u>, twice where u < t; rows of `width` values.
  double (*gram)(const float* d, const float* h, int64_t begin, int64_t end, int64_t width);
};

// The fewest rows of this length that are worth another thread.
constexpr int64_t grain(int64_t row_length) { return row_length < 32768 ? 32768 / (row_length + 1) + 1 : 1; }

extern const RowKernels row_kernels_avx512;
extern const RowKernels row_kernels_avx2;
extern const RowKernels row_kernels_portable;

// The widest the CPU runs; LEAD_FAST_CPU=avx512|avx2|portable in the environment asks for one (an error if it cannot
// run).
const RowKernels& row_kernels();

}  // namespace lead_fast::cpu
