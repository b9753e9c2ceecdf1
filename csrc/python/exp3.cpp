// The bandit for NumPy arrays.
#include "ops/exp3.h"

#include <tuple>
#include <vector>

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

std::tuple<py::array_t<std::int64_t>, py::array_t<double>, py::array_t<double>> bandit_draw(
    const py::array& log_w, const py::array& counts, const py::array& sums, const py::array& mask,
    const py::array& uniforms, double gamma, std::int64_t variant) {
  const auto args = check_bandit_draw(array_of(log_w), array_of(counts), array_of(sums), array_of(mask),
                                      array_of(uniforms), gamma, variant);
  check_values(args);
  py::array_t<std::int64_t> arms(args.num_draws);
  py::array_t<double> arm_probs(args.num_draws), probs(args.num_arms);
  std::vector<double> left(args.num_arms);
  lead_fast::bandit_draw(args, left.data(), arms.mutable_data(), arm_probs.mutable_data(), probs.mutable_data());
  return {arms, arm_probs, probs};
}

py::array_t<double> bandit_update(const py::array& log_w, const py::array& scale, const py::array& counts,
                                  const py::array& sums, const py::array& mask, const py::array& arms,
                                  const py::array& rewards, const py::array& probs, double gamma, std::int64_t variant,
                                  double share) {
  const auto args =
      check_bandit_update(array_of(log_w), array_of(scale), array_of(counts), array_of(sums), array_of(mask),
                          array_of(arms), array_of(rewards), array_of(probs), gamma, variant, share);
  py::array_t<double> scaled(args.num_draws);
  lead_fast::bandit_update(args, scaled.mutable_data());
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
  module.def("bandit_draw", &bandit_draw, py::arg("log_w"), py::arg("counts"), py::arg("sums"), py::arg("mask"),
             py::arg("uniforms"), py::arg("gamma"), py::arg("variant"),
             "Arms, int64 [m], the probability of each to be drawn, float64 [m], and the probabilities of all, float64 "
             "[K]. Variants as in exp3_update, and 3 uniform, 4 greedy.");
  module.def("bandit_update", &bandit_update, py::arg("log_w"), py::arg("scale"), py::arg("counts"), py::arg("sums"),
             py::arg("mask"), py::arg("arms"), py::arg("rewards"), py::arg("probs"), py::arg("gamma"),
             py::arg("variant"), py::arg("share"),
             "Takes the raw rewards of `arms` and returns them scaled; log_w, scale, counts and sums move in place.");
}

}  // namespace lead_fast::python
