// lead_fast._C: the C++ core for callers that hold NumPy arrays. No torch inside; arrays are read in place.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <string>

#include "core/cpu_features.h"
#include "python/arrays.h"

namespace py = pybind11;

namespace {

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
  module.doc() =
      "The C++ core of lead_fast for NumPy arrays, read and moved in place. The operators of the state are those of "
      "torch.ops.lead_fast, argument for argument; lead_fast.reference_state says what each computes.";
  module.def("build_info", &build_info,
             "What was built: version, compiler, cpp_standard, torch_target_version, cuda_archs (None without CUDA); "
             "and instruction_sets, found on this machine at run time.");
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const lead_fast::DtypeError& error) {
      py::set_error(PyExc_TypeError, error.what());
    }
  });
  lead_fast::python::bind_random(module);
  lead_fast::python::bind_exp3(module);
  lead_fast::python::bind_state(module);
  lead_fast::python::bind_rank(module);
}
