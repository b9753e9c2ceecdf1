// lead_fast::rank for CUDA tensors; the schema is in lead_fast/state.py, the reference in lead_fast/reference_state.py.
//
// Which arm was drawn is known on the device alone, so every launch has the shape of the largest arm, and threads
// without work leave at once. Four kernels:
//   keys    all blocks      utility of each row, as an unsigned integer that orders as it does; 0: may not be chosen
//   count   a block a task  rows that may be chosen
//   plan    one block       rows that each task gives, thinned to the cap, and where in the output they begin
//   choose  a block a task  radix select: those of highest utility out, then the highest of what the choice goes by
// Tasks are runs of positions, so their rows come out in ascending position without sorting them and without an atomic
// on floating point: the result is exact and the same on every run.
//
// Why not one radix sort of the arm by (task, key): a sort moves 12 bytes a row in and out five times; selection reads
// 4 bytes a row four times, from a scratch that the L2 cache holds. The price: a task has one block, so that the
// largest one bounds the time.
//
// The floor for 1.4 million rows: the table is read once, 18 bytes a row and with noise 22 (25 and 31 MB; 5 and 6 us at
// 4.8 TB/s). The scratch, 4 bytes a row and with noise 12 (6 and 17 MB), is written once; count reads the 4 bytes of
// utility once, choose four times where rows are excluded, then what it goes by four times, or seven with noise.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "core/choice.h"
#include "core/philox.h"
#include "core/table.h"
#include "cuda/launch.cuh"
#include "cuda/radix_select.cuh"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::Chosen;
using lead_fast::find_cut;
using lead_fast::for_each_highest;
using lead_fast::Rank;
using lead_fast::sum_before;
using lead_fast::sum_of_block;
using lead_fast::table_row;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kKeyThreads = 256;  // no cooperation
constexpr int kThreads = 1024;    // a block works on one task

// What a task gives: `chosen` rows after the `excluded` of highest utility, in the output from `offset` on.
struct Task {
  int64_t chosen, excluded, offset;
};

// The arm drawn: its tasks and its positions; none where no arm was drawn.
struct Arm {
  int64_t number, first_group = 0, num_tasks = 0, begin = 0, size = 0;

  __device__ explicit Arm(const Rank& args) : number(args.arm_drawn[0]) {
    lead_fast::trap_unless(-1 <= number && number < args.num_arms, "rank: `arm_drawn` is no arm");
    if (number < 0) return;
    first_group = args.arm_groups[number];
    num_tasks = args.arm_groups[number + 1] - first_group;
    begin = args.group_offsets[first_group];
    size = args.group_offsets[first_group + num_tasks] - begin;
    lead_fast::trap_unless(size <= args.max_arm_rows, "rank: the arm has more than `max_arm_rows` rows");
  }
};

// The rows of one task, as a run of the arm's.
struct Run {
  int64_t begin, size;

  __device__ Run(const Rank& args, const Arm& arm, int64_t task) {
    const int64_t* offset = args.group_offsets + arm.first_group + task;
    begin = offset[0] - arm.begin;
    size = offset[1] - offset[0];
  }
};

__device__ float utility_at(const Rank& args, const Arm& arm, int64_t p) {
  if (args.utility != nullptr) return args.utility[p];
  const int64_t n = args.num_rows;
  const int64_t index = table_row(args.seen, args.by_round ? lead_fast::kRound : lead_fast::kStep, n)[p];
  const float proxy = table_row(args.values, lead_fast::kProxy, n)[p];
  const float drop = lead_fast::predicted_drop(args.coefficients.of_arm(arm.number), index, proxy);
  const float loss = lead_fast::lazy_loss(table_row(args.values, lead_fast::kLoss, n)[p], drop);
  return lead_fast::smoothed(lead_fast::Smoothing(args.smoothing), loss,
                             table_row(args.values, lead_fast::kPrevious, n)[p]);
}

// What softmax and random choose by.
__device__ double noisy(const Rank& args, int64_t p, float utility) {
  const auto row = static_cast<uint64_t>(args.rows[p]);
  const double uniform = lead_fast::philox_uniform(args.seed, lead_fast::kStreamRows, args.round, row);
  if (args.choose == lead_fast::kRandom) return uniform;
  return static_cast<double>(utility) / args.temperature + lead_fast::gumbel(uniform);
}

// The key of a row that may be chosen: 0 is for those that may not, so a NaN, the lowest, takes the free number above.
template <class Number>
__device__ auto candidate_key(Number number) {
  const auto key = lead_fast::order_key(number);
  return key == 0 ? key + 1 : key;
}

__global__ void __launch_bounds__(kKeyThreads) rank_keys_kernel(Rank args,
                                                                uint32_t* __restrict__ utility_keys,  // [max_arm_rows]
                                                                uint64_t* __restrict__ noisy_keys) {  // or null: topk
  const Arm arm(args);
  const uint8_t* uses = table_row(args.flags, lead_fast::kUses, args.num_rows);
  const uint8_t* quarantined = table_row(args.flags, lead_fast::kQuarantined, args.num_rows);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kKeyThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kKeyThreads + threadIdx.x; i < arm.size; i += stride) {
    const int64_t p = arm.begin + i;
    const bool available = uses[p] < args.max_uses && quarantined[p] == 0;
    const float utility = utility_at(args, arm, p);
    utility_keys[i] = available ? candidate_key(utility) : 0;
    if (noisy_keys != nullptr) noisy_keys[i] = available ? candidate_key(noisy(args, p, utility)) : 0;
  }
}

__global__ void __launch_bounds__(kThreads, 1) rank_count_kernel(Rank args, const uint32_t* __restrict__ utility_keys,
                                                                 int64_t* __restrict__ available,     // [G]
                                                                 int64_t* __restrict__ num_tokens) {  // [G]
  const Arm arm(args);
  for (int64_t task = blockIdx.x; task < arm.num_tasks; task += gridDim.x) {
    const Run run(args, arm, task);
    int64_t rows = 0, tokens = 0;
    for (int64_t i = run.begin + threadIdx.x; i < run.begin + run.size; i += kThreads) {
      if (utility_keys[i] == 0) continue;
      ++rows;
      if (args.num_tokens != nullptr) tokens += args.num_tokens[arm.begin + i];
    }
    rows = sum_of_block<kThreads>(rows);
    if (args.num_tokens != nullptr) tokens = sum_of_block<kThreads>(tokens);
    if (threadIdx.x == 0) {
      available[task] = rows;
      num_tokens[task] = tokens;
    }
  }
}

// Also fills what the choice leaves of the output.
__global__ void __launch_bounds__(kThreads, 1)
    rank_plan_kernel(Rank args, const int64_t* __restrict__ available,  // [G]
                     const int64_t* __restrict__ num_tokens,            // [G]
                     Task* __restrict__ tasks, Chosen out) {            // [G]
  const Arm arm(args);
  double rate = args.rate;
  int64_t cap = args.cap;
  if (args.num_tokens != nullptr && args.token_budget > 0.0) {
    int64_t rows = 0, tokens = 0;
    for (int64_t task = threadIdx.x; task < arm.num_tasks; task += kThreads) {
      rows += available[task];
      tokens += num_tokens[task];
    }
    rows = sum_of_block<kThreads>(rows);
    tokens = sum_of_block<kThreads>(tokens);
    rate = 1.0;
    cap = lead_fast::cap_for_tokens(cap, args.token_budget, tokens, rows);
  }

  int64_t total = 0;
  for (int64_t task = threadIdx.x; task < arm.num_tasks; task += kThreads) {
    total += lead_fast::wanted_rows(rate, available[task]);
  }
  total = sum_of_block<kThreads>(total);
  const bool thinned = cap >= 0 && total > cap;
  const double uniform =
      lead_fast::philox_uniform(args.seed, lead_fast::kStreamTasks, args.round, static_cast<uint64_t>(arm.number));

  int64_t wanted_before = 0, chosen_before = 0;  // of the tasks before this turn's
  for (int64_t turn = 0; turn < arm.num_tasks; turn += kThreads) {
    const int64_t task = turn + threadIdx.x;
    const int64_t rows = task < arm.num_tasks ? available[task] : 0;
    const int64_t wanted = lead_fast::wanted_rows(rate, rows);
    int64_t wanted_in_turn, chosen_in_turn;
    const int64_t before = wanted_before + sum_before<kThreads>(wanted, wanted_in_turn);
    int64_t quota = wanted;
    if (thinned) {
      const bool last = task >= arm.num_tasks - 1;
      quota = (last ? cap : lead_fast::thinned_edge(before + wanted, cap, total, uniform)) -
              lead_fast::thinned_edge(before, cap, total, uniform);
    }
    const int64_t excluded = lead_fast::excluded_rows(args.exclude_top, rows);
    const int64_t allowed = excluded < rows ? rows - excluded : 0;
    const int64_t chosen = quota < allowed ? quota : allowed;
    const int64_t offset = chosen_before + sum_before<kThreads>(chosen, chosen_in_turn);
    if (task < arm.num_tasks) tasks[task] = {chosen, excluded, offset};
    wanted_before += wanted_in_turn;
    chosen_before += chosen_in_turn;
  }
  lead_fast::trap_unless(chosen_before <= args.capacity, "rank: more rows are chosen than `capacity`");

  for (int64_t i = chosen_before + threadIdx.x; i < args.capacity; i += kThreads) {
    out.rows[i] = -1;
    out.utility[i] = 0.0f;
    out.uses[i] = 0;
  }
}

// `keys` are what the choice goes by: utility_keys itself for topk. Some are read after this block wrote them, so
// neither may be __restrict__.
template <class Key>
__global__ void __launch_bounds__(kThreads, 1) rank_choose_kernel(Rank args, uint32_t* utility_keys,  // [max_arm_rows]
                                                                  Key* keys,                          // [max_arm_rows]
                                                                  const Task* __restrict__ tasks,     // [G]
                                                                  Chosen out) {
  const Arm arm(args);
  for (int64_t number = blockIdx.x; number < arm.num_tasks; number += gridDim.x) {
    const Task task = tasks[number];
    if (task.chosen == 0) continue;
    const Run run(args, arm, number);
    Key* by_choice = keys + run.begin;
    if (task.excluded > 0) {
      const uint32_t* by_utility = utility_keys + run.begin;
      const auto cut = find_cut<kThreads>(by_utility, run.size, static_cast<uint32_t>(task.excluded));
      for_each_highest<kThreads>(by_utility, run.size, cut, [&](int64_t i, uint32_t) { by_choice[i] = 0; });
    }
    const auto cut = find_cut<kThreads>(by_choice, run.size, static_cast<uint32_t>(task.chosen));
    for_each_highest<kThreads>(by_choice, run.size, cut, [&](int64_t i, uint32_t place) {
      const int64_t p = arm.begin + run.begin + i, at = task.offset + place;
      out.rows[at] = args.rows[p];
      out.utility[at] = utility_at(args, arm, p);
      out.uses[at] = table_row(args.flags, lead_fast::kUses, args.num_rows)[p];
    });
  }
}

// All tensors on one CUDA device; no synchronisation, and the same launches whichever arm was drawn. Returns row
// numbers int64, utility fp32 and earlier uses uint8, [capacity] each, in ascending position, then -1, 0, 0. Traps
// where more rows are chosen than `capacity`.
std::tuple<Tensor, Tensor, Tensor> rank(Tensor arm_drawn, Tensor group_offsets, Tensor arm_groups, Tensor rows,
                                        Tensor values, Tensor seen, Tensor flags, Tensor coefficients, bool by_round,
                                        std::optional<Tensor> utility, std::optional<Tensor> num_tokens,
                                        double smoothing, double rate, int64_t cap, double token_budget,
                                        double exclude_top, int64_t choose, double temperature, int64_t seed,
                                        int64_t round, int64_t max_uses, int64_t max_arm_rows, int64_t capacity) {
  using lead_fast::array_of;
  const Rank args =
      lead_fast::check_rank(array_of(arm_drawn), array_of(group_offsets), array_of(arm_groups), array_of(rows),
                            array_of(values), array_of(seen), array_of(flags), array_of(coefficients), by_round,
                            array_of(utility), array_of(num_tokens), smoothing, rate, cap, token_budget, exclude_top,
                            choose, temperature, seed, round, max_uses, max_arm_rows, capacity);
  const lead_fast::Launcher launch(values);
  const auto empty = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(values, {size}, type); };
  const Tensor out_rows = empty(capacity, ScalarType::Long), out_utility = empty(capacity, ScalarType::Float),
               out_uses = empty(capacity, ScalarType::Byte);
  const Chosen out{out_rows.mutable_data_ptr<int64_t>(), out_utility.mutable_data_ptr<float>(),
                   out_uses.mutable_data_ptr<uint8_t>()};

  const bool topk = args.choose == lead_fast::kTopk;
  const Tensor utility_keys = empty(max_arm_rows, ScalarType::UInt32);
  const Tensor noisy_keys = empty(topk ? 0 : max_arm_rows, ScalarType::UInt64);
  const Tensor available = empty(args.num_groups, ScalarType::Long), tokens = empty(args.num_groups, ScalarType::Long);
  const Tensor plan = empty(args.num_groups * static_cast<int64_t>(sizeof(Task)), ScalarType::Byte);
  auto* by_utility = utility_keys.mutable_data_ptr<uint32_t>();
  auto* by_noise = topk ? nullptr : noisy_keys.mutable_data_ptr<uint64_t>();
  auto* tasks = static_cast<Task*>(plan.mutable_data_ptr());

  const int64_t task_blocks = lead_fast::blocks_for(args.num_groups, 1);
  launch(rank_keys_kernel, lead_fast::blocks_for(max_arm_rows, kKeyThreads), kKeyThreads, args, by_utility, by_noise);
  launch(rank_count_kernel, task_blocks, kThreads, args, by_utility, available.mutable_data_ptr<int64_t>(),
         tokens.mutable_data_ptr<int64_t>());
  launch(rank_plan_kernel, 1, kThreads, args, available.const_data_ptr<int64_t>(), tokens.const_data_ptr<int64_t>(),
         tasks, out);
  if (topk) {
    launch(rank_choose_kernel<uint32_t>, task_blocks, kThreads, args, by_utility, by_utility, tasks, out);
  } else {
    launch(rank_choose_kernel<uint64_t>, task_blocks, kThreads, args, by_utility, by_noise, tasks, out);
  }
  return {out_rows, out_utility, out_uses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) { library.impl("rank", TORCH_BOX(&rank)); }
