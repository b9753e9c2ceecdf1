// Counter-based random numbers for NumPy arrays.
#include <string>
#include <vector>

#include "core/philox.h"
#include "python/arrays.h"

namespace lead_fast::python {

namespace {

std::uint32_t check_word(const char* argument, std::int64_t value) {
  if (value < 0 || value > 0xFFFFFFFFll) {
    throw py::value_error(std::string("philox_uniform: `") + argument + "` must be an integer in [0, 2**32), got " +
                          std::to_string(value));
  }
  return static_cast<std::uint32_t>(value);
}

py::array_t<double> philox_uniform(std::int64_t seed, std::int64_t stream, std::int64_t round,
                                   const py::array& counters) {
  const std::uint32_t stream_word = check_word("stream", stream), round_word = check_word("round", round);
  const Array array = array_of(counters);
  const auto* in = Arguments("philox_uniform", array).input<std::int64_t>("counters", array);
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

}  // namespace

void bind_random(py::module_& module) {
  module.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("stream"), py::arg("round"),
             py::arg("counters"),
             "Uniform numbers in (0, 1), float64 in the shape of `counters` (int64, C-contiguous): "
             "Philox4x32-10, bit-identical to torch.ops.lead_fast.philox_uniform.");
}

}  // namespace lead_fast::python
