// lead_fast::observe, step, step_by_numbers, utility, grad_norm_coefficients, calibrate, mark_chosen and end_round for
// CPU tensors; the schemas are in lead_fast/state.py, the reference in lead_fast/reference_state.py.
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

void observe(Tensor rows, Tensor loss, Tensor num_tokens, Tensor grad_norm_sq, std::optional<Tensor> now,
             Tensor position, Tensor arm, Tensor values, Tensor seen, Tensor flags, Tensor left, Tensor counters,
             Tensor clock, Tensor unit, std::optional<Tensor> pairs, std::optional<Tensor> totals,
             std::optional<Tensor> fit, double adam_beta1, int64_t max_uses, int64_t num_choosable,
             std::optional<Tensor> before) {
  lead_fast::observe(lead_fast::check_observe(
      array_of(rows), array_of(loss), array_of(num_tokens), array_of(grad_norm_sq), array_of(now), array_of(position),
      array_of(arm), array_of(values), array_of(seen), array_of(flags), array_of(left), array_of(counters),
      array_of(clock), array_of(unit), array_of(pairs), array_of(totals), array_of(fit), adam_beta1, max_uses,
      num_choosable, array_of(before)));
}

void step(Tensor lr, Tensor num_items, Tensor arms, Tensor clock, Tensor counters, Tensor unit) {
  lead_fast::step(lead_fast::check_step(array_of(lr), array_of(num_items), array_of(arms), array_of(clock),
                                        array_of(counters), array_of(unit)));
}

void step_by_numbers(double lr, double num_items, Tensor arms, Tensor clock, Tensor counters, Tensor unit) {
  lead_fast::step(lead_fast::check_step_by_numbers(lr, num_items, array_of(arms), array_of(clock), array_of(counters),
                                                   array_of(unit)));
}

Tensor grad_norm_coefficients(Tensor clock, Tensor counters, Tensor unit, Tensor fit, double adam_beta1,
                              int64_t num_steps) {
  const auto args = lead_fast::check_grad_norm_coefficients(array_of(clock), array_of(counters), array_of(unit),
                                                            array_of(fit), adam_beta1, num_steps);
  Tensor coefficients = torch::stable::new_empty(clock, {2, args.clock.num_arms, num_steps + 1});
  lead_fast::grad_norm_coefficients(args, lead_fast::cpu::parallel, coefficients.mutable_data_ptr<double>());
  return coefficients;
}

std::tuple<Tensor, Tensor> utility(Tensor rows, Tensor position, Tensor arm, Tensor values, Tensor seen,
                                   Tensor coefficients, bool by_round, double smoothing) {
  const auto args = lead_fast::check_utility(array_of(rows), array_of(position), array_of(arm), array_of(values),
                                             array_of(seen), array_of(coefficients), by_round, smoothing);
  Tensor idu = torch::stable::new_empty(rows, {args.size}, ScalarType::Float);
  Tensor loss = torch::stable::new_empty(rows, {args.size}, ScalarType::Float);
  lead_fast::utility(args, lead_fast::cpu::parallel, idu.mutable_data_ptr<float>(), loss.mutable_data_ptr<float>());
  return {idu, loss};
}

void calibrate(Tensor pairs, Tensor totals, Tensor fit, double prior_pairs, double min_pairs) {
  lead_fast::calibrate(
      lead_fast::check_calibrate(array_of(pairs), array_of(totals), array_of(fit), prior_pairs, min_pairs));
}

void mark_chosen(Tensor rows, Tensor position, Tensor arm, Tensor flags, Tensor left, int64_t max_uses) {
  lead_fast::mark_chosen(lead_fast::check_mark_chosen(array_of(rows), array_of(position), array_of(arm),
                                                      array_of(flags), array_of(left), max_uses));
}

std::tuple<Tensor, Tensor, Tensor> end_round(Tensor rows, Tensor begin_idu, std::optional<Tensor> drop, Tensor arms,
                                             Tensor position, Tensor arm, Tensor values, Tensor seen, Tensor flags,
                                             Tensor coefficients, bool by_round, double smoothing, bool fall_of_utility,
                                             Tensor counters, Tensor unit) {
  const auto args = lead_fast::check_end_round(array_of(rows), array_of(begin_idu), array_of(drop), array_of(arms),
                                               array_of(position), array_of(arm), array_of(values), array_of(seen),
                                               array_of(flags), array_of(coefficients), by_round, smoothing,
                                               fall_of_utility, array_of(counters), array_of(unit));
  Tensor rewards = torch::stable::new_empty(unit, {args.num_drawn}), summary = torch::stable::new_empty(unit, {2});
  Tensor quarantined = torch::stable::new_empty(rows, {args.size}, ScalarType::Bool);
  lead_fast::end_round(args, rewards.mutable_data_ptr<double>(), summary.mutable_data_ptr<double>(),
                       quarantined.mutable_data_ptr<bool>());
  return {rewards, summary, quarantined};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lead_fast, CPU, library) {
  library.impl("observe", TORCH_BOX(&observe));
  library.impl("step", TORCH_BOX(&step));
  library.impl("step_by_numbers", TORCH_BOX(&step_by_numbers));
  library.impl("grad_norm_coefficients", TORCH_BOX(&grad_norm_coefficients));
  library.impl("utility", TORCH_BOX(&utility));
  library.impl("calibrate", TORCH_BOX(&calibrate));
  library.impl("mark_chosen", TORCH_BOX(&mark_chosen));
  library.impl("end_round", TORCH_BOX(&end_round));
}
