// Sums over the threads of a block, in a fixed order. Every thread of the block calls; integers wrap as unsigned do.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lead_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over this lane and those before it.
template <class T>
__device__ T sum_up_to_lane(T value) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T before = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value += before;
  }
  return value;
}

// Sum over the threads before this one; `total` is the sum over all.
template <int kThreads, class T>
__device__ T sum_before(T value, T& total) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp, "a block is whole warps, and one warp adds up the warps");
  __shared__ T warp_sums[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;

  const T in_warp = sum_up_to_lane(value);
  if (lane == kWarp - 1) warp_sums[warp] = in_warp;
  __syncthreads();
  const T over_warps = sum_up_to_lane(lane < kWarps ? warp_sums[lane] : T{0});
  __syncthreads();  // the next call writes warp_sums
  total = __shfl_sync(kAllLanes, over_warps, kWarp - 1);
  const T warps_before = __shfl_sync(kAllLanes, over_warps, warp == 0 ? 0 : warp - 1);
  return (warp == 0 ? T{0} : warps_before) + in_warp - value;
}

template <int kThreads, class T>
__device__ T sum_of_block(T value) {
  T total;
  sum_before<kThreads>(value, total);
  return total;
}

}  // namespace lead_fast
