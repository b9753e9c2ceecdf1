// lead_fast::mark_chosen and end_round for CUDA tensors; the schemas are in lead_fast/state.py, the references in
// lead_fast/reference_state.py.
//
// A round has tens to thousands of rows, and a loop of torch's own operators would be some fifty launches: what counts
// is the number of kernels, not their bytes. The end of a round is one block, whose sums come in a fixed order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>

#include "core/round.h"
#include "cuda/block_sum.cuh"
#include "cuda/launch.cuh"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::EndRound;
using lead_fast::MarkChosen;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kEndThreads = 512;

__device__ bool in_pool(int64_t row, int64_t num_rows) { return 0 <= row && row < num_rows; }

__global__ void __launch_bounds__(kThreads) mark_chosen_kernel(MarkChosen args) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < args.size; i += stride) {
    lead_fast::trap_unless(in_pool(args.rows[i], args.num_rows), "mark_chosen: `rows` must be rows of the pool");
    const int64_t p = args.position[args.rows[i]];
    if (!lead_fast::use_row(args, p)) continue;
    // Several rows of an arm may leave at once; unsigned numbers wrap, so this takes 1 away.
    atomicAdd(reinterpret_cast<unsigned long long*>(&args.left[args.arm[p]]), ~0ull);
  }
}

// What the kernel keeps of each row between its two passes.
struct Scratch {
  double* gain;  // [size]
  int64_t* arm;  // [size]
};

__global__ void __launch_bounds__(kEndThreads, 1)
    end_round_kernel(EndRound args, Scratch scratch, double* __restrict__ rewards,  // [m]
                     double* __restrict__ summary,                                  // [2]
                     bool* __restrict__ quarantined) {                              // [size]
  const int64_t round = args.counters[lead_fast::kNumRounds] + 1;
  double num_seen = 0.0, losses = 0.0;
  for (int64_t i = threadIdx.x; i < args.size; i += kEndThreads) {
    lead_fast::trap_unless(in_pool(args.rows[i], args.num_rows), "end_round: `rows` must be rows of the pool");
    const lead_fast::RowEnd row = lead_fast::end_row(args, i, round);
    scratch.gain[i] = row.gain;
    scratch.arm[i] = row.arm;
    quarantined[i] = row.quarantined;
    num_seen += row.arm >= 0 ? 1.0 : 0.0;
    losses += row.loss;
  }
  // Their barriers also part the reading of the round's number from its writing.
  num_seen = lead_fast::sum_of_block<kEndThreads>(num_seen);
  losses = lead_fast::sum_of_block<kEndThreads>(losses);
  if (threadIdx.x == 0) {
    summary[0] = num_seen;
    summary[1] = losses / num_seen;
    lead_fast::close_clock(args.counters, args.unit);
  }
  for (int64_t k = 0; k < args.num_drawn; ++k) {
    const int64_t arm = args.arms[k];
    lead_fast::trap_unless(arm < args.num_arms, "end_round: `arms` must be below the number of arms");
    double gains = 0.0, count = 0.0;
    for (int64_t i = threadIdx.x; i < args.size; i += kEndThreads) {  // rows that this thread wrote
      if (arm < 0 || scratch.arm[i] != arm) continue;
      gains += scratch.gain[i];
      count += 1.0;
    }
    gains = lead_fast::sum_of_block<kEndThreads>(gains);
    count = lead_fast::sum_of_block<kEndThreads>(count);
    if (threadIdx.x == 0) rewards[k] = count > 0.0 ? gains / count : std::numeric_limits<double>::quiet_NaN();
  }
}

// All tensors on one CUDA device; no synchronisation.
void mark_chosen(Tensor rows, Tensor position, Tensor arm, Tensor flags, Tensor left, int64_t max_uses) {
  using lead_fast::array_of;
  const MarkChosen args = lead_fast::check_mark_chosen(array_of(rows), array_of(position), array_of(arm),
                                                       array_of(flags), array_of(left), max_uses);
  const lead_fast::Launcher launch(flags);
  launch(mark_chosen_kernel, lead_fast::blocks_for(args.size, kThreads), kThreads, args);
}

// All tensors on one CUDA device; no synchronisation.
std::tuple<Tensor, Tensor, Tensor> end_round(Tensor rows, Tensor begin_idu, std::optional<Tensor> drop, Tensor arms,
                                             Tensor position, Tensor arm, Tensor values, Tensor seen, Tensor flags,
                                             Tensor coefficients, bool by_round, double smoothing, bool fall_of_utility,
                                             Tensor counters, Tensor unit) {
  using lead_fast::array_of;
  const EndRound args = lead_fast::check_end_round(array_of(rows), array_of(begin_idu), array_of(drop), array_of(arms),
                                                   array_of(position), array_of(arm), array_of(values), array_of(seen),
                                                   array_of(flags), array_of(coefficients), by_round, smoothing,
                                                   fall_of_utility, array_of(counters), array_of(unit));
  const lead_fast::Launcher launch(values);
  const auto numbers = [&](int64_t count) { return torch::stable::new_empty(unit, {count}); };
  const Tensor rewards = numbers(args.num_drawn), summary = numbers(2), gain = numbers(args.size);
  const Tensor row_arm = torch::stable::new_empty(rows, {args.size});
  const Tensor quarantined = torch::stable::new_empty(rows, {args.size}, ScalarType::Bool);
  launch(end_round_kernel, 1, kEndThreads, args,
         Scratch{gain.mutable_data_ptr<double>(), row_arm.mutable_data_ptr<int64_t>()},
         rewards.mutable_data_ptr<double>(), summary.mutable_data_ptr<double>(), quarantined.mutable_data_ptr<bool>());
  return {rewards, summary, quarantined};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) {
  library.impl("mark_chosen", TORCH_BOX(&mark_chosen));
  library.impl("end_round", TORCH_BOX(&end_round));
}
