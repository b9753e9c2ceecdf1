// lead_fast::rank for CPU tensors; the schema is in lead_fast/state.py, the reference in lead_fast/reference_state.py.
#include "core/rank.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "cpu/parallel.h"
#include "ops/state.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::array_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> rank(Tensor arm_drawn, Tensor group_offsets, Tensor arm_groups, Tensor rows,
                                        Tensor values, Tensor seen, Tensor flags, Tensor coefficients, bool by_round,
                                        std::optional<Tensor> utility, std::optional<Tensor> num_tokens,
                                        double smoothing, double rate, int64_t cap, double token_budget,
                                        double exclude_top, int64_t choose, double temperature, int64_t seed,
                                        int64_t round, int64_t max_uses, int64_t max_arm_rows, int64_t capacity) {
  const auto args =
      lead_fast::check_rank(array_of(arm_drawn), array_of(group_offsets), array_of(arm_groups), array_of(rows),
                            array_of(values), array_of(seen), array_of(flags), array_of(coefficients), by_round,
                            array_of(utility), array_of(num_tokens), smoothing, rate, cap, token_budget, exclude_top,
                            choose, temperature, seed, round, max_uses, max_arm_rows, capacity);
  Tensor chosen = torch::stable::new_empty(rows, {capacity}, ScalarType::Long);
  Tensor idu = torch::stable::new_empty(rows, {capacity}, ScalarType::Float);
  Tensor uses = torch::stable::new_empty(rows, {capacity}, ScalarType::Byte);
  lead_fast::rank(
      args, lead_fast::cpu::parallel,
      {chosen.mutable_data_ptr<int64_t>(), idu.mutable_data_ptr<float>(), uses.mutable_data_ptr<uint8_t>()});
  return {chosen, idu, uses};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CPU, library) { library.impl("rank", TORCH_BOX(&rank)); }
