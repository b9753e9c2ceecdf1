// lead_fast::philox_uniform for CUDA tensors; the schema and the reference are in lead_fast/rng.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/philox.h"
#include "cuda/launch.cuh"
#include "ops/philox_uniform.h"

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) philox_uniform_kernel(uint64_t seed, uint32_t stream, uint32_t round,
                                                                  const int64_t* __restrict__ counters,  // [n]
                                                                  double* __restrict__ uniforms,         // [n]
                                                                  int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    uniforms[i] = lead_fast::philox_uniform(seed, stream, round, static_cast<uint64_t>(counters[i]));
  }
}

// counters: int64, any shape, on a CUDA device. Returns fp64 of the same shape, contiguous. No synchronisation.
Tensor philox_uniform(int64_t seed, int64_t stream, int64_t round, Tensor counters) {
  lead_fast::check_philox_uniform(stream, round, counters);
  const lead_fast::Launcher launch(counters);
  counters = torch::stable::contiguous(counters);
  Tensor uniforms = torch::stable::new_empty(counters, counters.sizes(), torch::headeronly::ScalarType::Double);
  const int64_t n = counters.numel();
  launch(philox_uniform_kernel, lead_fast::blocks_for(n, kThreads), kThreads, static_cast<uint64_t>(seed),
         static_cast<uint32_t>(stream), static_cast<uint32_t>(round), counters.const_data_ptr<int64_t>(),
         uniforms.mutable_data_ptr<double>(), n);
  return uniforms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) { library.impl("philox_uniform", TORCH_BOX(&philox_uniform)); }
