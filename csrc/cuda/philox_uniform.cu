// lead_fast::philox_uniform for CUDA tensors; the schema and the reference are in lead_fast/rng.py.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>

#include "core/philox.h"
#include "ops/philox_uniform.h"

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;  // enough to fill any card; the grid-stride loop takes the rest

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
  const int32_t device = counters.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);

  counters = torch::stable::contiguous(counters);
  Tensor uniforms = torch::stable::new_empty(counters, counters.sizes(), torch::headeronly::ScalarType::Double);
  const int64_t n = counters.numel();
  if (n == 0) return uniforms;

  void* cuda_stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &cuda_stream));
  const auto blocks = static_cast<unsigned>(std::min((n + kThreads - 1) / kThreads, kMaxBlocks));
  philox_uniform_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(cuda_stream)>>>(
      static_cast<uint64_t>(seed), static_cast<uint32_t>(stream), static_cast<uint32_t>(round),
      counters.const_data_ptr<int64_t>(), uniforms.mutable_data_ptr<double>(), n);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return uniforms;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) { library.impl("philox_uniform", TORCH_BOX(&philox_uniform)); }
