// lead_fast::philox_uniform for CPU tensors; the schema and the reference are in lead_fast/rng.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/philox.h"
#include "ops/philox_uniform.h"

namespace {

using torch::stable::Tensor;

// counters: int64, any shape. Returns fp64 of the same shape, contiguous. Identical for any number of threads.
Tensor philox_uniform(int64_t seed, int64_t stream, int64_t round, Tensor counters) {
  lead_fast::check_philox_uniform(stream, round, counters);
  counters = torch::stable::contiguous(counters);
  Tensor uniforms = torch::stable::new_empty(counters, counters.sizes(), torch::headeronly::ScalarType::Double);

  const int64_t* in = counters.const_data_ptr<int64_t>();
  double* out = uniforms.mutable_data_ptr<double>();
  constexpr int64_t numbers_per_thread = 4096;
  torch::stable::parallel_for(0, counters.numel(), numbers_per_thread, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = lead_fast::philox_uniform(static_cast<uint64_t>(seed), static_cast<uint32_t>(stream),
                                         static_cast<uint32_t>(round), static_cast<uint64_t>(in[i]));
    }
  });
  return uniforms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CPU, library) { library.impl("philox_uniform", TORCH_BOX(&philox_uniform)); }
