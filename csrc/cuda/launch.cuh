// How operators reach the device: the one place that launches kernels.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "ops/torch_macros.h"

namespace lead_fast {

// Makes the device of a tensor current while it lives, and launches on that device's current stream.
class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Arguments are converted to the kernel's parameters. No blocks, no launch.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    if (blocks == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Blocks for `items`, `per_block` each. 4096 fill any card: kernels stride over the grid and take the rest.
inline int64_t blocks_for(int64_t items, int64_t per_block) {
  return std::min<int64_t>((items + per_block - 1) / per_block, 4096);
}

// Ends the kernel, and with it the process's use of the device, where a number that only the device knows is wrong.
// Every thread that gets here prints, as a device-side assertion does: the first of them ends the others.
__device__ inline void trap_unless(bool condition, const char* message) {
  if (condition) return;
  printf("lead_fast: %s\n", message);
  __trap();
}

}  // namespace lead_fast
