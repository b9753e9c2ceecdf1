// The utility table, the clocks and the estimator's fit for NumPy arrays.
#include "ops/state.h"

#include <tuple>

#include "python/arrays.h"

namespace lead_fast::python {

namespace {

using Optional = std::optional<py::array>;

void observe(const py::array& rows, const py::array& loss, const py::array& num_tokens, const py::array& grad_norm_sq,
             const Optional& now, const py::array& position, const py::array& arm, const py::array& values,
             const py::array& seen, const py::array& flags, const py::array& left, const py::array& counters,
             const py::array& clock, const py::array& unit, const Optional& pairs, const Optional& totals,
             const Optional& fit, double adam_beta1, std::int64_t max_uses, std::int64_t num_choosable,
             const Optional& before) {
  const auto args =
      check_observe(array_of(rows), array_of(loss), array_of(num_tokens), array_of(grad_norm_sq), array_of(now),
                    array_of(position), array_of(arm), array_of(values), array_of(seen), array_of(flags),
                    array_of(left), array_of(counters), array_of(clock), array_of(unit), array_of(pairs),
                    array_of(totals), array_of(fit), adam_beta1, max_uses, num_choosable, array_of(before));
  const py::gil_scoped_release unlocked;
  lead_fast::observe(args);
}

void step(const py::array& lr, const py::array& num_items, const py::array& arms, const py::array& clock,
          const py::array& counters, const py::array& unit) {
  lead_fast::step(check_step(array_of(lr), array_of(num_items), array_of(arms), array_of(clock), array_of(counters),
                             array_of(unit)));
}

void step_by_numbers(double lr, double num_items, const py::array& arms, const py::array& clock,
                     const py::array& counters, const py::array& unit) {
  lead_fast::step(
      check_step_by_numbers(lr, num_items, array_of(arms), array_of(clock), array_of(counters), array_of(unit)));
}

py::array_t<double> grad_norm_coefficients(const py::array& clock, const py::array& counters, const py::array& unit,
                                           const py::array& fit, double adam_beta1, std::int64_t num_steps) {
  const auto args = check_grad_norm_coefficients(array_of(clock), array_of(counters), array_of(unit), array_of(fit),
                                                 adam_beta1, num_steps);
  py::array_t<double> coefficients({py::ssize_t{2}, py::ssize_t{args.clock.num_arms}, py::ssize_t{num_steps + 1}});
  double* out = coefficients.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    lead_fast::grad_norm_coefficients(args, serial, out);
  }
  return coefficients;
}

std::tuple<py::array_t<float>, py::array_t<float>> utility(const py::array& rows, const py::array& position,
                                                           const py::array& arm, const py::array& values,
                                                           const py::array& seen, const py::array& coefficients,
                                                           bool by_round, double smoothing) {
  const auto args = check_utility(array_of(rows), array_of(position), array_of(arm), array_of(values), array_of(seen),
                                  array_of(coefficients), by_round, smoothing);
  py::array_t<float> idu(args.size), loss(args.size);
  float *idu_out = idu.mutable_data(), *loss_out = loss.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    lead_fast::utility(args, serial, idu_out, loss_out);
  }
  return {idu, loss};
}

void calibrate(const py::array& pairs, const py::array& totals, const py::array& fit, double prior_pairs,
               double min_pairs) {
  lead_fast::calibrate(check_calibrate(array_of(pairs), array_of(totals), array_of(fit), prior_pairs, min_pairs));
}

void mark_chosen(const py::array& rows, const py::array& position, const py::array& arm, const py::array& flags,
                 const py::array& left, std::int64_t max_uses) {
  lead_fast::mark_chosen(
      check_mark_chosen(array_of(rows), array_of(position), array_of(arm), array_of(flags), array_of(left), max_uses));
}

std::tuple<py::array_t<double>, py::array_t<double>, py::array_t<bool>> end_round(
    const py::array& rows, const py::array& begin_idu, const Optional& drop, const py::array& arms,
    const py::array& position, const py::array& arm, const py::array& values, const py::array& seen,
    const py::array& flags, const py::array& coefficients, bool by_round, double smoothing, bool fall_of_utility,
    const py::array& counters, const py::array& unit) {
  const auto args =
      check_end_round(array_of(rows), array_of(begin_idu), array_of(drop), array_of(arms), array_of(position),
                      array_of(arm), array_of(values), array_of(seen), array_of(flags), array_of(coefficients),
                      by_round, smoothing, fall_of_utility, array_of(counters), array_of(unit));
  py::array_t<double> rewards(args.num_drawn), summary(2);
  py::array_t<bool> quarantined(args.size);
  lead_fast::end_round(args, rewards.mutable_data(), summary.mutable_data(), quarantined.mutable_data());
  return {rewards, summary, quarantined};
}

}  // namespace

void bind_state(py::module_& module) {
  module.def("observe", &observe, py::arg("rows"), py::arg("loss"), py::arg("num_tokens"), py::arg("grad_norm_sq"),
             py::arg("now").none(true), py::arg("position"), py::arg("arm"), py::arg("values"), py::arg("seen"),
             py::arg("flags"), py::arg("left"), py::arg("counters"), py::arg("clock"), py::arg("unit"),
             py::arg("pairs").none(true), py::arg("totals").none(true), py::arg("fit").none(true),
             py::arg("adam_beta1"), py::arg("max_uses"), py::arg("num_choosable"), py::arg("before") = py::none(),
             "Scatters one micro-batch's statistics into the table; values, seen, flags, left, counters, pairs and "
             "totals move in place, and before is written.");
  module.def("step", &step, py::arg("lr"), py::arg("num_items"), py::arg("arms"), py::arg("clock"), py::arg("counters"),
             py::arg("unit"), "Advances the clocks by one optimizer step; clock, counters and unit move in place.");
  module.def("step_by_numbers", &step_by_numbers, py::arg("lr"), py::arg("num_items"), py::arg("arms"),
             py::arg("clock"), py::arg("counters"), py::arg("unit"), "The same for numbers in place of arrays.");
  module.def("grad_norm_coefficients", &grad_norm_coefficients, py::arg("clock"), py::arg("counters"), py::arg("unit"),
             py::arg("fit"), py::arg("adam_beta1"), py::arg("num_steps"),
             "Slope and level of a row's predicted fall, float64 [2, K, num_steps + 1].");
  module.def("utility", &utility, py::arg("rows"), py::arg("position"), py::arg("arm"), py::arg("values"),
             py::arg("seen"), py::arg("coefficients"), py::arg("by_round"), py::arg("smoothing"),
             "IDU and the loss now of `rows`, float32 [R] each.");
  module.def("calibrate", &calibrate, py::arg("pairs"), py::arg("totals"), py::arg("fit"), py::arg("prior_pairs"),
             py::arg("min_pairs"), "Fits every kappa from the pairs so far; fit moves in place.");
  module.def("mark_chosen", &mark_chosen, py::arg("rows"), py::arg("position"), py::arg("arm"), py::arg("flags"),
             py::arg("left"), py::arg("max_uses"),
             "Counts one use of each of `rows`, distinct; flags and left move in place.");
  module.def("end_round", &end_round, py::arg("rows"), py::arg("begin_idu"), py::arg("drop").none(true),
             py::arg("arms"), py::arg("position"), py::arg("arm"), py::arg("values"), py::arg("seen"), py::arg("flags"),
             py::arg("coefficients"), py::arg("by_round"), py::arg("smoothing"), py::arg("fall_of_utility"),
             py::arg("counters"), py::arg("unit"),
             "Closes a round: its rows' utilities, counters and unit move in place. Returns the reward of each of "
             "`arms`, float64 [m]; rows observed and the mean of their losses, float64 [2]; which rows are set aside, "
             "bool [R].");
}

}  // namespace lead_fast::python
