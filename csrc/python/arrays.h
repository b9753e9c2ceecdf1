// NumPy arrays as arguments of the core's operators: read and moved in place, never converted.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>

#include "ops/array.h"

namespace lead_fast::python {

namespace py = pybind11;

inline Dtype dtype_of(const py::array& array) {
  const py::dtype type = array.dtype();
  if (type.byteorder() != '=' && type.byteorder() != '|') return Dtype::kOther;
  const auto size = type.itemsize();
  switch (type.kind()) {
    case 'b':
      return Dtype::kBool;
    case 'u':
      return size == 1 ? Dtype::kUint8 : Dtype::kOther;
    case 'i':
      return size == 2 ? Dtype::kInt16 : size == 4 ? Dtype::kInt32 : size == 8 ? Dtype::kInt64 : Dtype::kOther;
    case 'f':
      return size == 4 ? Dtype::kFloat32 : size == 8 ? Dtype::kFloat64 : Dtype::kOther;
    default:
      return Dtype::kOther;
  }
}

inline Array array_of(const py::array& source) {
  Array array{const_cast<void*>(source.data()), dtype_of(source), static_cast<int>(source.ndim()), {}, true, true, 0};
  for (int dim = 0; dim < array.dims && dim < Array::kMaxDims; ++dim) array.shape[dim] = source.shape(dim);
  array.contiguous = (source.flags() & py::array::c_style) != 0;
  array.writeable = source.writeable();
  return array;
}

inline std::optional<Array> array_of(const std::optional<py::array>& source) {
  if (!source.has_value()) return std::nullopt;
  return array_of(*source);
}

// Runs the loops of the core on the calling thread.
constexpr auto serial = [](std::int64_t begin, std::int64_t end, std::int64_t, const auto& body) {
  if (begin < end) body(begin, end);
};

// Each file's part of the module.
void bind_random(py::module_& module);
void bind_exp3(py::module_& module);
void bind_state(py::module_& module);
void bind_rank(py::module_& module);

}  // namespace lead_fast::python
