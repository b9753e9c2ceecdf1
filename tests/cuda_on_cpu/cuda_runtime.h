// Stands in for CUDA's header where a test compiles the CUDA sources for the CPU: the words of CUDA that they use, and
// a launch that runs the blocks on simt.h. Their operators go to the CPU key of the namespace lead_fast_on_cpu.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <cstdio>

#include "simt.h"

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, library) _STABLE_TORCH_LIBRARY_IMPL(lead_fast_on_cpu, CPU, library, C10_UID)

static const simt::Index& threadIdx = simt::thread_index;
static const simt::Index& blockIdx = simt::block_index;
static const simt::Index& gridDim = simt::grid_size;

inline void __syncthreads() { simt::Block::wait_for_block(); }

[[noreturn]] inline void __trap() {
  std::fflush(stdout);  // what the kernel printed
  simt::Block::trap();
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return simt::Block::exchange(value, source);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = static_cast<int>(threadIdx.x) % simt::kWarp;
  return simt::Block::exchange(value, lane < delta ? lane : lane - delta);
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned size = 1) : x(size) {}
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  simt::grid_size.x = config->gridDim.x;
  for (unsigned number = 0; number < config->gridDim.x; ++number) {
    simt::block_index.x = simt::order == simt::Order::kAscending ? number : config->gridDim.x - 1 - number;
    simt::Block::run(static_cast<int>(config->blockDim.x), [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
