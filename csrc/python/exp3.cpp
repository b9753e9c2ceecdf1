// The bandit for NumPy arrays.
#include "ops/exp3.h"

#include "python/arrays.h"

namespace lead_fast::python {

namespace {

py::array_t<double> exp3_probs(const py::array& log_w, const py::array& mask, double gamma) {
  const auto args = check_exp3_probs(array_of(log_w), array_of(mask), gamma);
  check_values(args);
  py::array_t<double> probs(args.num_arms);
  lead_fast::exp3_probs(args.log_w, args.mask, gamma, args.num_arms, probs.mutable_data());
  return probs;
}

py::array_t<std::int64_t> exp3_draw(const py::array& probs, const py::array& uniforms) {
  const auto args = check_exp3_draw(array_of(probs), array_of(uniforms));
  check_values(args);
  py::array_t<std::int64_t> arms(args.num_draws);
  lead_fast::exp3_draw(args, arms.mutable_data());
  return arms;
}

py::array_t<double> exp3_update(const py::array& log_w, const py::array& mask, const py::array& arms,
                                const py::array& rewards, const py::array& probs, double gamma, std::int64_t variant,
                                double share) {
  const auto args = check_exp3_update(array_of(log_w), array_of(mask), array_of(arms), array_of(rewards),
                                      array_of(probs), gamma, variant, share);
  py::array_t<double> updated(args.num_arms);
  double* out = updated.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    lead_fast::exp3_update(args, out);
  }
  return updated;
}

py::array_t<double> scale_rewards(const py::array& scale, const py::array& rewards) {
  const auto args = check_scale_rewards(array_of(scale), array_of(rewards));
  py::array_t<double> scaled(args.size);
  double* out = scaled.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    lead_fast::scale_rewards(args, out);
  }
  return scaled;
}

}  // namespace

void bind_exp3(py::module_& module) {
  module.def("exp3_probs", &exp3_probs, py::arg("log_w"), py::arg("mask"), py::arg("gamma"),
             "EXP3 probabilities, float64 [K], from log weights float64 [K] over the arms that `mask`, bool [K], "
             "holds; 0 elsewhere, and everywhere where it holds none.");
  module.def("exp3_draw", &exp3_draw, py::arg("probs"), py::arg("uniforms"),
             "Arms, int64 [m], one for each number of `uniforms`, float64 [m] in [0, 1], without replacement: the "
             "first whose cumulative probability exceeds that share of what is left; -1 where nothing is left.");
  module.def("exp3_update", &exp3_update, py::arg("log_w"), py::arg("mask"), py::arg("arms"), py::arg("rewards"),
             py::arg("probs"), py::arg("gamma"), py::arg("variant"), py::arg("share"),
             "Log weights, float64 [K], after the rewards, float64 [m] in [-1, 1], of `arms`, int64 [m], drawn with "
             "`probs`, float64 [m]. Variant 0 exp3, 1 exp3_ix, 2 exp3s; others move nothing.");
  module.def("scale_rewards", &scale_rewards, py::arg("scale"), py::arg("rewards"),
             "Raw rewards, float64 [m], scaled to [-1, 1]; `scale`, float64 [3], their count, mean and squared "
             "deviations, moves in place. NaN gives 0 and does not count.");
}

}  // namespace lead_fast::python
