// lead_fast._C: the C++ core for callers that hold NumPy arrays. No torch inside; arrays are read in place.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

#include "core/cpu_features.h"
#include "core/exp3.h"
#include "core/philox.h"

namespace py = pybind11;

namespace {

std::string describe(const py::array& array) {
  return py::str("{} {}").format(array.dtype(), py::tuple(array.attr("shape"))).cast<std::string>();
}

// The elements of a C-contiguous array of exactly this dtype: never a converted copy.
template <class T>
const T* elements(const char* op, const char* argument, const char* dtype_name, const py::array& array) {
  if (!py::dtype::of<T>().equal(array.dtype())) {
    throw py::type_error(std::string(op) + ": `" + argument + "` must be " + dtype_name + ", got " + describe(array));
  }
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(op) + ": `" + argument + "` must be C-contiguous, got strides " +
                          py::str(array.attr("strides")).cast<std::string>());
  }
  return static_cast<const T*>(array.data());
}

void check_vector(const char* op, const char* argument, const py::array& array, py::ssize_t length) {
  if (array.ndim() != 1 || array.shape(0) != length) {
    throw py::value_error(std::string(op) + ": `" + argument + "` must have shape [" + std::to_string(length) +
                          "], got " + describe(array));
  }
}

std::uint32_t check_word(const char* op, const char* argument, std::int64_t value) {
  if (value < 0 || value > 0xFFFFFFFFll) {
    throw py::value_error(std::string(op) + ": `" + argument + "` must be an integer in [0, 2**32), got " +
                          std::to_string(value));
  }
  return static_cast<std::uint32_t>(value);
}

void check_unit(const char* op, const char* argument, double value) {
  if (!(value >= 0.0 && value <= 1.0)) {
    std::ostringstream got;
    got << value;
    throw py::value_error(std::string(op) + ": `" + argument + "` must be in [0, 1], got " + got.str());
  }
}

py::array_t<double> philox_uniform(std::int64_t seed, std::int64_t stream, std::int64_t round,
                                   const py::array& counters) {
  const std::uint32_t stream_word = check_word("philox_uniform", "stream", stream);
  const std::uint32_t round_word = check_word("philox_uniform", "round", round);
  const auto* in = elements<std::int64_t>("philox_uniform", "counters", "int64", counters);
  py::array_t<double> uniforms(std::vector<py::ssize_t>(counters.shape(), counters.shape() + counters.ndim()));
  double* out = uniforms.mutable_data();
  const py::ssize_t n = counters.size();

  {
    const py::gil_scoped_release unlocked;
    for (py::ssize_t i = 0; i < n; ++i) {
      out[i] = lead_fast::philox_uniform(static_cast<std::uint64_t>(seed), stream_word, round_word,
                                         static_cast<std::uint64_t>(in[i]));
    }
  }
  return uniforms;
}

py::array_t<double> exp3_probs(const py::array& log_w, const py::array& mask, double gamma) {
  const auto* weights = elements<double>("exp3_probs", "log_w", "float64", log_w);
  const auto* in_a = elements<bool>("exp3_probs", "mask", "bool", mask);
  const py::ssize_t num_arms = log_w.size();
  check_vector("exp3_probs", "log_w", log_w, num_arms);
  check_vector("exp3_probs", "mask", mask, num_arms);
  check_unit("exp3_probs", "gamma", gamma);

  bool possible = false;
  for (py::ssize_t k = 0; k < num_arms; ++k) {
    if (!in_a[k]) continue;
    if (std::isnan(weights[k]) || weights[k] == HUGE_VAL) {
      throw py::value_error("exp3_probs: `log_w` must be below inf at the arms of `mask`, got " +
                            std::to_string(weights[k]) + " at arm " + std::to_string(k));
    }
    possible = possible || weights[k] > -HUGE_VAL;
  }
  if (!possible) {
    throw py::value_error("exp3_probs: `mask` must hold at least one arm with a log weight above -inf, got none");
  }

  py::array_t<double> probs(num_arms);
  lead_fast::exp3_probs(weights, in_a, gamma, num_arms, probs.mutable_data());
  return probs;
}

std::int64_t exp3_draw(const py::array& probs, double uniform) {
  const auto* values = elements<double>("exp3_draw", "probs", "float64", probs);
  const py::ssize_t num_arms = probs.size();
  check_vector("exp3_draw", "probs", probs, num_arms);
  check_unit("exp3_draw", "uniform", uniform);
  for (py::ssize_t k = 0; k < num_arms; ++k) check_unit("exp3_draw", "probs", values[k]);

  const std::int64_t arm = lead_fast::exp3_draw(values, num_arms, uniform);
  if (arm < 0) throw py::value_error("exp3_draw: `probs` must hold a probability above 0, got none");
  return arm;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  const std::string cuda_archs = LEAD_FAST_CUDA_ARCHS;
  py::dict info;
  info["version"] = LEAD_FAST_VERSION;
  info["compiler"] = compiler();
  info["cpp_standard"] = static_cast<long>(__cplusplus);
  info["instruction_sets"] = lead_fast::cpu_feature_names();
  info["torch_target_version"] = LEAD_FAST_TORCH_TARGET;
  info["cuda_archs"] = cuda_archs.empty() ? py::object(py::none()) : py::object(py::str(cuda_archs));
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ core of lead_fast for NumPy arrays, read in place.";
  module.def("build_info", &build_info,
             "What was built: version, compiler, cpp_standard, torch_target_version, cuda_archs (None without CUDA); "
             "and instruction_sets, found on this machine at run time.");
  module.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("stream"), py::arg("round"),
             py::arg("counters"),
             "Uniform numbers in (0, 1), float64 in the shape of `counters` (int64, C-contiguous): "
             "Philox4x32-10, bit-identical to torch.ops.lead_fast.philox_uniform.");
  module.def(
      "exp3_probs", &exp3_probs, py::arg("log_w"), py::arg("mask"), py::arg("gamma"),
      "EXP3 probabilities, float64 [K], from log weights float64 [K] over the arms that `mask`, bool [K], holds; "
      "0 elsewhere.");
  module.def(
      "exp3_draw", &exp3_draw, py::arg("probs"), py::arg("uniform"),
      "The arm whose cumulative probability first exceeds `uniform` in [0, 1]; `probs` is float64 [K], and an arm "
      "of probability 0 is never drawn.");
}
