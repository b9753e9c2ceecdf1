// A torch tensor as an operator's argument.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "ops/array.h"

namespace lead_fast {

inline Dtype dtype_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Bool:
      return Dtype::kBool;
    case ScalarType::Byte:
      return Dtype::kUint8;
    case ScalarType::Short:
      return Dtype::kInt16;
    case ScalarType::Int:
      return Dtype::kInt32;
    case ScalarType::Long:
      return Dtype::kInt64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      return Dtype::kOther;
  }
}

inline Array array_of(const torch::stable::Tensor& tensor) {
  Array array{tensor.data_ptr(), dtype_of(tensor.scalar_type()), static_cast<int>(tensor.dim()), {}, true, true, 0};
  const auto sizes = tensor.sizes();
  for (int dim = 0; dim < array.dims && dim < Array::kMaxDims; ++dim) array.shape[dim] = sizes[dim];
  array.contiguous = tensor.is_contiguous();
  array.device = tensor.is_cpu() ? -1 : static_cast<int>(tensor.get_device_index());
  return array;
}

inline std::optional<Array> array_of(const std::optional<torch::stable::Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return array_of(*tensor);
}

}  // namespace lead_fast
