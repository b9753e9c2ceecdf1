// lead_fast::grad_norm_coefficients and lead_fast::calibrate for CUDA tensors; the schemas are in lead_fast/state.py,
// the references in lead_fast/reference_state.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/grad_norm.h"
#include "core/utility.h"
#include "cuda/launch.cuh"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using torch::stable::Tensor;

constexpr int kThreads = 128;
constexpr int kCalibrateThreads = 32;

// One thread for each step; the threads of a warp write neighbouring steps.
__global__ void __launch_bounds__(kThreads) grad_norm_coefficients_kernel(lead_fast::GradNormCoefficients args,
                                                                          double* __restrict__ slope,    // [K, size]
                                                                          double* __restrict__ level) {  // [K, size]
  const int64_t size = args.num_steps + 1, num_arms = args.clock.num_arms;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; s < size; s += stride) {
    for (int64_t k = 0; k < num_arms; ++k) {
      const lead_fast::Since since =
          lead_fast::since_step(args.clock.entries, args.clock.unit, num_arms, s, args.num_steps, k, args.adam_beta1);
      const lead_fast::SlopeLevel coefficient = lead_fast::grad_norm_coefficient(since, args.fit_row, k);
      slope[k * size + s] = coefficient.slope;
      level[k * size + s] = coefficient.level;
    }
  }
}

// One thread for each kappa, then one that chooses.
__global__ void __launch_bounds__(kCalibrateThreads) calibrate_kernel(lead_fast::Calibrate args) {
  const int64_t width = lead_fast::kArmOffsets + args.num_arms;
  for (int64_t q = threadIdx.x; q < args.num_kappas; q += kCalibrateThreads) {
    lead_fast::calibrate_kappa(args.pairs + q * args.num_arms * lead_fast::kPairWidth, args.totals, args.num_arms,
                               args.prior_pairs, args.min_pairs, args.fit + (1 + q) * width);
  }
  __syncthreads();
  if (threadIdx.x == 0) lead_fast::choose_kappa(args.totals, args.num_kappas, args.num_arms, args.fit);
}

// All tensors on one CUDA device; no synchronisation. Returns slope and level, fp64 [2, K, num_steps + 1].
Tensor grad_norm_coefficients(Tensor clock, Tensor counters, Tensor unit, Tensor fit, double adam_beta1,
                              int64_t num_steps) {
  using lead_fast::array_of;
  const lead_fast::GradNormCoefficients args = lead_fast::check_grad_norm_coefficients(
      array_of(clock), array_of(counters), array_of(unit), array_of(fit), adam_beta1, num_steps);
  const lead_fast::Launcher launch(clock);
  const int64_t size = num_steps + 1;
  const Tensor out = torch::stable::new_empty(clock, {2, args.clock.num_arms, size});
  double* slope = out.mutable_data_ptr<double>();
  launch(grad_norm_coefficients_kernel, lead_fast::blocks_for(size, kThreads), kThreads, args, slope,
         slope + args.clock.num_arms * size);
  return out;
}

// All tensors on one CUDA device; no synchronisation.
void calibrate(Tensor pairs, Tensor totals, Tensor fit, double prior_pairs, double min_pairs) {
  using lead_fast::array_of;
  const lead_fast::Calibrate args =
      lead_fast::check_calibrate(array_of(pairs), array_of(totals), array_of(fit), prior_pairs, min_pairs);
  const lead_fast::Launcher launch(pairs);
  launch(calibrate_kernel, 1, kCalibrateThreads, args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) {
  library.impl("grad_norm_coefficients", TORCH_BOX(&grad_norm_coefficients));
  library.impl("calibrate", TORCH_BOX(&calibrate));
}
