// The choice of rows in an arm for NumPy arrays.
#include "core/rank.h"

#include <tuple>

#include "ops/state.h"
#include "python/arrays.h"

namespace lead_fast::python {

namespace {

using Optional = std::optional<py::array>;
using ChosenArrays = std::tuple<py::array_t<std::int64_t>, py::array_t<float>, py::array_t<std::uint8_t>>;

ChosenArrays rank(const py::array& arm_drawn, const py::array& group_offsets, const py::array& arm_groups,
                  const py::array& rows, const py::array& values, const py::array& seen, const py::array& flags,
                  const py::array& coefficients, bool by_round, const Optional& utility, const Optional& num_tokens,
                  double smoothing, double rate, std::int64_t cap, double token_budget, double exclude_top,
                  std::int64_t choose, double temperature, std::int64_t seed, std::int64_t round, std::int64_t max_uses,
                  std::int64_t max_arm_rows, std::int64_t capacity) {
  const auto args = check_rank(array_of(arm_drawn), array_of(group_offsets), array_of(arm_groups), array_of(rows),
                               array_of(values), array_of(seen), array_of(flags), array_of(coefficients), by_round,
                               array_of(utility), array_of(num_tokens), smoothing, rate, cap, token_budget, exclude_top,
                               choose, temperature, seed, round, max_uses, max_arm_rows, capacity);
  py::array_t<std::int64_t> chosen(capacity);
  py::array_t<float> idu(capacity);
  py::array_t<std::uint8_t> uses(capacity);
  const Chosen out{chosen.mutable_data(), idu.mutable_data(), uses.mutable_data()};
  {
    const py::gil_scoped_release unlocked;
    lead_fast::rank(args, serial, out);
  }
  return {chosen, idu, uses};
}

}  // namespace

void bind_rank(py::module_& module) {
  module.def("rank", &rank, py::arg("arm_drawn"), py::arg("group_offsets"), py::arg("arm_groups"), py::arg("rows"),
             py::arg("values"), py::arg("seen"), py::arg("flags"), py::arg("coefficients"), py::arg("by_round"),
             py::arg("utility").none(true), py::arg("num_tokens").none(true), py::arg("smoothing"), py::arg("rate"),
             py::arg("cap"), py::arg("token_budget"), py::arg("exclude_top"), py::arg("choose"), py::arg("temperature"),
             py::arg("seed"), py::arg("round"), py::arg("max_uses"), py::arg("max_arm_rows"), py::arg("capacity"),
             "The rows chosen in each task of the drawn arm, in ascending position: rows int64, utility float32, uses "
             "uint8 [capacity], filled up with -1, 0, 0. One thread.");
}

}  // namespace lead_fast::python
