// lead_fast::utility for CUDA tensors; the schema is in lead_fast/state.py, the reference in
// lead_fast/reference_state.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

#include "core/table.h"
#include "core/utility.h"
#include "cuda/launch.cuh"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::table_row;
using torch::stable::Tensor;

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) utility_kernel(lead_fast::Utility args, lead_fast::Smoothing smoothing,
                                                           float* __restrict__ idu,     // [size]
                                                           float* __restrict__ loss) {  // [size]
  const int32_t* seen = table_row(args.seen, args.by_round ? lead_fast::kRound : lead_fast::kStep, args.num_rows);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.size; i += stride) {
    const int64_t row = args.rows[i];
    if (row < 0 || row >= args.num_rows) {  // never followed; the host cannot be told without waiting for it
      idu[i] = loss[i] = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    const int64_t p = args.position[row];
    const float proxy = table_row(args.values, lead_fast::kProxy, args.num_rows)[p];
    const float drop = lead_fast::predicted_drop(args.coefficients.of_arm(args.arm[p]), seen[p], proxy);
    loss[i] = lead_fast::lazy_loss(table_row(args.values, lead_fast::kLoss, args.num_rows)[p], drop);
    idu[i] = lead_fast::smoothed(smoothing, loss[i], table_row(args.values, lead_fast::kPrevious, args.num_rows)[p]);
  }
}

// All tensors on one CUDA device; no synchronisation. Returns IDU and the loss now, fp32 [R]; NaN for a row outside [0,
// N).
std::tuple<Tensor, Tensor> utility(Tensor rows, Tensor position, Tensor arm, Tensor values, Tensor seen,
                                   Tensor coefficients, bool by_round, double smoothing) {
  using lead_fast::array_of;
  const lead_fast::Utility args =
      lead_fast::check_utility(array_of(rows), array_of(position), array_of(arm), array_of(values), array_of(seen),
                               array_of(coefficients), by_round, smoothing);
  const lead_fast::Launcher launch(values);
  const Tensor idu = torch::stable::new_empty(values, {args.size}),
               loss = torch::stable::new_empty(values, {args.size});
  launch(utility_kernel, lead_fast::blocks_for(args.size, kThreads), kThreads, args, lead_fast::Smoothing(smoothing),
         idu.mutable_data_ptr<float>(), loss.mutable_data_ptr<float>());
  return {idu, loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) { library.impl("utility", TORCH_BOX(&utility)); }
