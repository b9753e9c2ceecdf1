// lead_fast::observe for CUDA tensors; the schema is in lead_fast/state.py, the reference in
// lead_fast/reference_state.py.
//
// One block: a micro-batch has tens of samples, and what bounds it is the latency of a few dependent reads. Which
// entries count is settled first, by comparing every entry with those after it (S^2 / 2 comparisons). After that at
// most one entry writes a row, and each sum of the regression belongs to one thread, which adds the entries in order:
// additions come in the order of the CPU's loop, however the threads run.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "core/observe.h"
#include "cuda/block_sum.cuh"
#include "cuda/launch.cuh"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::Batch;
using lead_fast::Observe;
using lead_fast::Table;
using lead_fast::table_row;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 512;

enum Kind : uint8_t { kIgnored, kUsable, kBad };  // bad: the loss is not finite

// What an entry tells the regression: a prediction's features against the truth.
struct Pair {
  double truth;
  double own, other;  // the features that every kappa shares
  int32_t arm;        // -1: the entry is no pair
  int32_t revisit;
};

struct Scratch {
  Kind* kinds;    // [S]
  Pair* pairs;    // [S]
  double* first;  // [S, Q], each kappa's first feature
};

__device__ Kind kind_of(const Batch& batch, const Table& table, int64_t i) {
  const int64_t row = batch.rows[i];
  const bool present = 0 <= row && row < table.num_rows && batch.num_tokens[i] > 0.0f;
  if (!present) return kIgnored;
  if (!std::isfinite(batch.loss[i])) return kBad;
  const uint8_t* quarantined = table_row(table.flags, lead_fast::kQuarantined, table.num_rows);
  return quarantined[table.position[row]] == 0 ? kUsable : kIgnored;
}

__device__ bool occurs_later(const Batch& batch, const Kind* kinds, int64_t i) {
  for (int64_t j = i + 1; j < batch.size; ++j) {
    if (batch.rows[j] == batch.rows[i] && kinds[j] == kinds[i]) return true;
  }
  return false;
}

// The pair of entry i, whose row stands at position p, before the table moves.
__device__ Pair pair_of(const Observe& args, int64_t i, int64_t p, int64_t now, double* first) {
  const Table& table = args.table;
  const int64_t step = table_row(table.seen, lead_fast::kStep, table.num_rows)[p];
  if (step >= now) return {0.0, 0.0, 0.0, -1, 0};  // seen again before any optimizer step, a row teaches nothing
  const int64_t num_arms = args.clock.num_arms;
  const int32_t arm = table.arm[p];
  const lead_fast::Since since =
      lead_fast::since_step(args.clock.entries, args.clock.unit, num_arms, step, now, arm, args.sums.adam_beta1);
  const float proxy = table_row(table.values, lead_fast::kProxy, table.num_rows)[p];
  for (int64_t q = 0; q < args.sums.num_kappas; ++q) {
    const double* fit_row = args.sums.fit + (1 + q) * (lead_fast::kArmOffsets + num_arms);
    first[q] = lead_fast::pair_features(since, proxy, fit_row[lead_fast::kKappa]).x[0];
  }
  const float fall = table_row(table.values, lead_fast::kLoss, table.num_rows)[p] - args.batch.loss[i];
  const int32_t round = table_row(table.seen, lead_fast::kRound, table.num_rows)[p];
  return {static_cast<double>(fall), since.own, since.other, arm, round > 0};
}

__device__ void write_row(const Observe& args, int64_t i, int64_t p, int64_t now) {
  const Batch& batch = args.batch;
  const Table& table = args.table;
  const int64_t n = table.num_rows;
  table_row(table.values, lead_fast::kPrevious, n)[p] = table_row(table.values, lead_fast::kIdu, n)[p];
  table_row(table.values, lead_fast::kLoss, n)[p] = batch.loss[i];
  table_row(table.values, lead_fast::kProxy, n)[p] =
      lead_fast::gradient_proxy(batch.grad_norm_sq[i], batch.num_tokens[i]);
  table_row(table.seen, lead_fast::kStep, n)[p] = static_cast<int32_t>(now);
  table_row(table.seen, lead_fast::kRound, n)[p] = static_cast<int32_t>(args.counters[lead_fast::kNumRounds] + 1);
}

__device__ void quarantine_row(const Observe& args, int64_t p) {
  const Table& table = args.table;
  uint8_t& quarantined = table_row(table.flags, lead_fast::kQuarantined, table.num_rows)[p];
  if (quarantined != 0) return;
  quarantined = 1;
  if (p < args.num_choosable && table_row(table.flags, lead_fast::kUses, table.num_rows)[p] < args.max_uses) {
    // Several rows of an arm may leave at once; unsigned numbers wrap, so this takes 1 away.
    atomicAdd(reinterpret_cast<unsigned long long*>(&args.left[table.arm[p]]), ~0ull);
  }
}

// Adds every pair to the regression's moments: one moment a thread, pairs in order of entries.
__device__ void add_moments(const Observe& args, const Scratch& scratch) {
  const int64_t kappas = args.sums.num_kappas, num_arms = args.clock.num_arms;
  for (int64_t m = threadIdx.x; m < kappas * num_arms * lead_fast::kPairWidth; m += kThreads) {
    const int64_t q = m / lead_fast::kPairWidth / num_arms, arm = m / lead_fast::kPairWidth % num_arms;
    const int column = static_cast<int>(m % lead_fast::kPairWidth);
    const bool is_xy = column >= lead_fast::kPairY;
    const int left = is_xy ? column - lead_fast::kPairY : column / 3, right = is_xy ? 3 : column % 3;
    double sum = args.sums.pairs[m];
    for (int64_t i = 0; i < args.batch.size; ++i) {
      const Pair& pair = scratch.pairs[i];
      if (pair.arm != arm) continue;
      const auto factor = [&](int number) {
        return number == 0   ? scratch.first[i * kappas + q]
               : number == 1 ? pair.own
               : number == 2 ? pair.other
                             : pair.truth;
      };
      sum += factor(left) * factor(right);
    }
    args.sums.pairs[m] = sum;
  }
}

// Counts the pairs and adds up every kappa's squared error, likewise.
__device__ void add_totals(const Observe& args, const Scratch& scratch) {
  const int64_t kappas = args.sums.num_kappas, width = lead_fast::kArmOffsets + args.clock.num_arms;
  for (int64_t t = threadIdx.x; t < lead_fast::kErrors + kappas; t += kThreads) {
    double sum = args.sums.totals[t];
    for (int64_t i = 0; i < args.batch.size; ++i) {
      const Pair& pair = scratch.pairs[i];
      if (pair.arm < 0) continue;
      if (t < lead_fast::kErrors) {
        sum += t == lead_fast::kAllPairs ? 1.0 : static_cast<double>(pair.revisit);
        continue;
      }
      const int64_t q = t - lead_fast::kErrors;
      const lead_fast::Features features{{scratch.first[i * kappas + q], pair.own, pair.other}};
      const double error = lead_fast::predict(features, args.sums.fit + (1 + q) * width, pair.arm) - pair.truth;
      sum += error * error;
    }
    args.sums.totals[t] = sum;
  }
}

__global__ void __launch_bounds__(kThreads, 1) observe_kernel(Observe args, Scratch scratch) {
  const Batch& batch = args.batch;
  const int64_t now = batch.now == nullptr ? args.counters[lead_fast::kNumSteps] : batch.now[0];
  lead_fast::trap_unless(0 <= now && now <= args.counters[lead_fast::kNumSteps] && now < args.clock.size,
                         "observe: `now` is beyond the steps so far");

  uint32_t bad = 0, out_of_range = 0;
  for (int64_t i = threadIdx.x; i < batch.size; i += kThreads) {
    scratch.kinds[i] = kind_of(batch, args.table, i);
    bad += scratch.kinds[i] == kBad;
    out_of_range += batch.rows[i] < -1 || batch.rows[i] >= args.table.num_rows;
  }
  // The barriers inside also part the reading of flags from their writing, and show every kind to every thread.
  bad = lead_fast::sum_of_block<kThreads>(bad);
  out_of_range = lead_fast::sum_of_block<kThreads>(out_of_range);
  if (threadIdx.x == 0) {
    args.counters[lead_fast::kNumQuarantined] += bad;
    args.counters[lead_fast::kOutOfRange] += out_of_range;
  }

  const bool regression = args.sums.pairs != nullptr;
  for (int64_t i = threadIdx.x; i < batch.size; i += kThreads) {
    if (regression) scratch.pairs[i].arm = -1;
    if (args.before != nullptr) lead_fast::record_nothing(args, i);
    if (scratch.kinds[i] == kIgnored || occurs_later(batch, scratch.kinds, i)) continue;
    const int64_t p = args.table.position[batch.rows[i]];
    if (scratch.kinds[i] == kBad) {
      quarantine_row(args, p);
      continue;
    }
    if (args.before != nullptr) lead_fast::record_before(args, i, p, now);
    if (regression) scratch.pairs[i] = pair_of(args, i, p, now, scratch.first + i * args.sums.num_kappas);
    write_row(args, i, p, now);
  }
  if (!regression) return;
  __syncthreads();
  add_moments(args, scratch);
  add_totals(args, scratch);
}

// All tensors on one CUDA device; no synchronisation. Entries whose row is outside [-1, N) are ignored and counted.
void observe(Tensor rows, Tensor loss, Tensor num_tokens, Tensor grad_norm_sq, std::optional<Tensor> now,
             Tensor position, Tensor arm, Tensor values, Tensor seen, Tensor flags, Tensor left, Tensor counters,
             Tensor clock, Tensor unit, std::optional<Tensor> pairs, std::optional<Tensor> totals,
             std::optional<Tensor> fit, double adam_beta1, int64_t max_uses, int64_t num_choosable,
             std::optional<Tensor> before) {
  using lead_fast::array_of;
  const Observe args = lead_fast::check_observe(
      array_of(rows), array_of(loss), array_of(num_tokens), array_of(grad_norm_sq), array_of(now), array_of(position),
      array_of(arm), array_of(values), array_of(seen), array_of(flags), array_of(left), array_of(counters),
      array_of(clock), array_of(unit), array_of(pairs), array_of(totals), array_of(fit), adam_beta1, max_uses,
      num_choosable, array_of(before));
  const int64_t size = args.batch.size;
  if (size == 0) return;

  const lead_fast::Launcher launch(values);
  const int64_t num_pairs = args.sums.pairs == nullptr ? 0 : size;
  const auto bytes = [&](int64_t count) { return torch::stable::new_empty(values, {count}, ScalarType::Byte); };
  const Tensor kinds = bytes(size), pair_scratch = bytes(num_pairs * static_cast<int64_t>(sizeof(Pair)));
  const Tensor first = torch::stable::new_empty(values, {num_pairs * args.sums.num_kappas}, ScalarType::Double);
  launch(observe_kernel, 1, kThreads, args,
         Scratch{static_cast<Kind*>(kinds.mutable_data_ptr()), static_cast<Pair*>(pair_scratch.mutable_data_ptr()),
                 first.mutable_data_ptr<double>()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) { library.impl("observe", TORCH_BOX(&observe)); }
