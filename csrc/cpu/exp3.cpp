// lead_fast::exp3_probs, exp3_draw, exp3_update, scale_rewards, bandit_draw and bandit_update for CPU tensors; the
// schemas are in lead_fast/state.py, the reference in lead_fast/reference_state.py.
#include "core/exp3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "ops/exp3.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::array_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor exp3_probs(Tensor log_w, Tensor mask, double gamma) {
  const auto args = lead_fast::check_exp3_probs(array_of(log_w), array_of(mask), gamma);
  lead_fast::check_values(args);
  Tensor probs = torch::stable::empty_like(log_w);
  lead_fast::exp3_probs(args.log_w, args.mask, gamma, args.num_arms, probs.mutable_data_ptr<double>());
  return probs;
}

Tensor exp3_draw(Tensor probs, Tensor uniforms) {
  const auto args = lead_fast::check_exp3_draw(array_of(probs), array_of(uniforms));
  lead_fast::check_values(args);
  Tensor arms = torch::stable::new_empty(uniforms, {args.num_draws}, ScalarType::Long);
  lead_fast::exp3_draw(args, arms.mutable_data_ptr<int64_t>());
  return arms;
}

Tensor exp3_update(Tensor log_w, Tensor mask, Tensor arms, Tensor rewards, Tensor probs, double gamma, int64_t variant,
                   double share) {
  const auto args = lead_fast::check_exp3_update(array_of(log_w), array_of(mask), array_of(arms), array_of(rewards),
                                                 array_of(probs), gamma, variant, share);
  Tensor updated = torch::stable::empty_like(log_w);
  lead_fast::exp3_update(args, updated.mutable_data_ptr<double>());
  return updated;
}

Tensor scale_rewards(Tensor scale, Tensor rewards) {
  const auto args = lead_fast::check_scale_rewards(array_of(scale), array_of(rewards));
  Tensor scaled = torch::stable::empty_like(rewards);
  lead_fast::scale_rewards(args, scaled.mutable_data_ptr<double>());
  return scaled;
}

std::tuple<Tensor, Tensor, Tensor> bandit_draw(Tensor log_w, Tensor counts, Tensor sums, Tensor mask, Tensor uniforms,
                                               double gamma, int64_t variant) {
  const auto args = lead_fast::check_bandit_draw(array_of(log_w), array_of(counts), array_of(sums), array_of(mask),
                                                 array_of(uniforms), gamma, variant);
  lead_fast::check_values(args);
  Tensor arms = torch::stable::new_empty(uniforms, {args.num_draws}, ScalarType::Long);
  Tensor arm_probs = torch::stable::empty_like(uniforms), probs = torch::stable::empty_like(log_w);
  std::vector<double> left(args.num_arms);
  lead_fast::bandit_draw(args, left.data(), arms.mutable_data_ptr<int64_t>(), arm_probs.mutable_data_ptr<double>(),
                         probs.mutable_data_ptr<double>());
  return {arms, arm_probs, probs};
}

Tensor bandit_update(Tensor log_w, Tensor scale, Tensor counts, Tensor sums, Tensor mask, Tensor arms, Tensor rewards,
                     Tensor probs, double gamma, int64_t variant, double share) {
  const auto args =
      lead_fast::check_bandit_update(array_of(log_w), array_of(scale), array_of(counts), array_of(sums), array_of(mask),
                                     array_of(arms), array_of(rewards), array_of(probs), gamma, variant, share);
  Tensor scaled = torch::stable::empty_like(rewards);
  lead_fast::bandit_update(args, scaled.mutable_data_ptr<double>());
  return scaled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CPU, library) {
  library.impl("exp3_probs", TORCH_BOX(&exp3_probs));
  library.impl("exp3_draw", TORCH_BOX(&exp3_draw));
  library.impl("exp3_update", TORCH_BOX(&exp3_update));
  library.impl("scale_rewards", TORCH_BOX(&scale_rewards));
  library.impl("bandit_draw", TORCH_BOX(&bandit_draw));
  library.impl("bandit_update", TORCH_BOX(&bandit_update));
}
