// The bandit's operators for CUDA tensors, lead_fast::exp3_probs, exp3_draw, exp3_update, scale_rewards, bandit_draw
// and bandit_update; the schemas are in lead_fast/state.py, the references in lead_fast/reference_state.py.
//
// A handful of arms once a round: one thread does all, in order, by the functions that the CPU uses. What counts is
// that nothing crosses to the host.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "core/bandit.h"
#include "core/exp3.h"
#include "cuda/launch.cuh"
#include "ops/exp3.h"
#include "ops/tensor_array.h"

namespace {

using lead_fast::array_of;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

__global__ void exp3_probs_kernel(lead_fast::Exp3Probs args, double* __restrict__ probs) {  // [K]
  lead_fast::exp3_probs(args.log_w, args.mask, args.gamma, args.num_arms, probs);
}

__global__ void exp3_draw_kernel(lead_fast::Exp3Draw args, double* __restrict__ left,  // [K]
                                 int64_t* __restrict__ arms) {                         // [m]
  for (int64_t k = 0; k < args.num_arms; ++k) left[k] = args.probs[k];
  lead_fast::exp3_draw_without_replacement(left, args.uniforms, args.num_arms, args.num_draws, arms);
}

__global__ void exp3_update_kernel(lead_fast::Exp3Update args, double* __restrict__ log_w) {  // [K]
  for (int64_t k = 0; k < args.num_arms; ++k) log_w[k] = args.log_w[k];
  for (int64_t i = 0; i < args.num_draws; ++i) {
    lead_fast::trap_unless(args.arms[i] < args.num_arms, "exp3_update: `arms` must be below the number of arms");
    lead_fast::exp3_update(args.mask, args.arms[i], args.rewards[i], args.probs[i], args.gamma, args.variant,
                           args.share, args.num_arms, log_w);
  }
}

__global__ void scale_rewards_kernel(lead_fast::ScaleRewards args, double* __restrict__ scaled) {  // [m]
  for (int64_t i = 0; i < args.size; ++i) scaled[i] = lead_fast::scale_reward(args.rewards[i], args.scale);
}

__global__ void bandit_draw_kernel(lead_fast::BanditDraw args, double* __restrict__ left,       // [K]
                                   int64_t* __restrict__ arms, double* __restrict__ arm_probs,  // [m]
                                   double* __restrict__ probs) {                                // [K]
  lead_fast::bandit_draw(args, left, arms, arm_probs, probs);
}

__global__ void bandit_update_kernel(lead_fast::BanditUpdate args, double* __restrict__ scaled) {  // [m]
  for (int64_t i = 0; i < args.num_draws; ++i) {
    lead_fast::trap_unless(args.arms[i] < args.num_arms, "bandit_update: `arms` must be below the number of arms");
  }
  lead_fast::take_rewards(args, scaled);
}

Tensor exp3_probs(Tensor log_w, Tensor mask, double gamma) {
  const lead_fast::Exp3Probs args = lead_fast::check_exp3_probs(array_of(log_w), array_of(mask), gamma);
  const lead_fast::Launcher launch(log_w);
  const Tensor probs = torch::stable::new_empty(log_w, {args.num_arms});
  launch(exp3_probs_kernel, 1, 1, args, probs.mutable_data_ptr<double>());
  return probs;
}

Tensor exp3_draw(Tensor probs, Tensor uniforms) {
  const lead_fast::Exp3Draw args = lead_fast::check_exp3_draw(array_of(probs), array_of(uniforms));
  const lead_fast::Launcher launch(probs);
  const Tensor left = torch::stable::new_empty(probs, {args.num_arms});
  const Tensor arms = torch::stable::new_empty(probs, {args.num_draws}, ScalarType::Long);
  launch(exp3_draw_kernel, 1, 1, args, left.mutable_data_ptr<double>(), arms.mutable_data_ptr<int64_t>());
  return arms;
}

Tensor exp3_update(Tensor log_w, Tensor mask, Tensor arms, Tensor rewards, Tensor probs, double gamma, int64_t variant,
                   double share) {
  const lead_fast::Exp3Update args = lead_fast::check_exp3_update(
      array_of(log_w), array_of(mask), array_of(arms), array_of(rewards), array_of(probs), gamma, variant, share);
  const lead_fast::Launcher launch(log_w);
  const Tensor out = torch::stable::new_empty(log_w, {args.num_arms});
  launch(exp3_update_kernel, 1, 1, args, out.mutable_data_ptr<double>());
  return out;
}

Tensor scale_rewards(Tensor scale, Tensor rewards) {
  const lead_fast::ScaleRewards args = lead_fast::check_scale_rewards(array_of(scale), array_of(rewards));
  const lead_fast::Launcher launch(scale);
  const Tensor scaled = torch::stable::new_empty(rewards, {args.size});
  launch(scale_rewards_kernel, 1, 1, args, scaled.mutable_data_ptr<double>());
  return scaled;
}

std::tuple<Tensor, Tensor, Tensor> bandit_draw(Tensor log_w, Tensor counts, Tensor sums, Tensor mask, Tensor uniforms,
                                               double gamma, int64_t variant) {
  const lead_fast::BanditDraw args = lead_fast::check_bandit_draw(array_of(log_w), array_of(counts), array_of(sums),
                                                                  array_of(mask), array_of(uniforms), gamma, variant);
  const lead_fast::Launcher launch(log_w);
  const Tensor left = torch::stable::new_empty(log_w, {args.num_arms});
  const Tensor arms = torch::stable::new_empty(log_w, {args.num_draws}, ScalarType::Long);
  const Tensor arm_probs = torch::stable::new_empty(log_w, {args.num_draws});
  const Tensor probs = torch::stable::new_empty(log_w, {args.num_arms});
  launch(bandit_draw_kernel, 1, 1, args, left.mutable_data_ptr<double>(), arms.mutable_data_ptr<int64_t>(),
         arm_probs.mutable_data_ptr<double>(), probs.mutable_data_ptr<double>());
  return {arms, arm_probs, probs};
}

Tensor bandit_update(Tensor log_w, Tensor scale, Tensor counts, Tensor sums, Tensor mask, Tensor arms, Tensor rewards,
                     Tensor probs, double gamma, int64_t variant, double share) {
  const lead_fast::BanditUpdate args =
      lead_fast::check_bandit_update(array_of(log_w), array_of(scale), array_of(counts), array_of(sums), array_of(mask),
                                     array_of(arms), array_of(rewards), array_of(probs), gamma, variant, share);
  const lead_fast::Launcher launch(log_w);
  const Tensor scaled = torch::stable::new_empty(rewards, {args.num_draws});
  launch(bandit_update_kernel, 1, 1, args, scaled.mutable_data_ptr<double>());
  return scaled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CUDA, library) {
  library.impl("exp3_probs", TORCH_BOX(&exp3_probs));
  library.impl("exp3_draw", TORCH_BOX(&exp3_draw));
  library.impl("exp3_update", TORCH_BOX(&exp3_update));
  library.impl("scale_rewards", TORCH_BOX(&scale_rewards));
  library.impl("bandit_draw", TORCH_BOX(&bandit_draw));
  library.impl("bandit_update", TORCH_BOX(&bandit_update));
}
