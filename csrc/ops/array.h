// An operator's argument, whoever holds it (a torch tensor on any device, a NumPy array), and its checks: the bindings
// share one truth of shapes and dtypes.
#pragma once

#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace lead_fast {

enum class Dtype { kBool, kUint8, kInt16, kInt32, kInt64, kFloat32, kFloat64, kOther };

inline const char* dtype_name(Dtype dtype) {
  constexpr const char* names[] = {"bool", "uint8", "int16", "int32", "int64", "float32", "float64", "another dtype"};
  return names[static_cast<int>(dtype)];
}

template <class T>
constexpr Dtype dtype_of() {
  if (std::is_same<T, bool>::value) return Dtype::kBool;
  if (std::is_same<T, std::uint8_t>::value) return Dtype::kUint8;
  if (std::is_same<T, std::int16_t>::value) return Dtype::kInt16;
  if (std::is_same<T, std::int32_t>::value) return Dtype::kInt32;
  if (std::is_same<T, std::int64_t>::value) return Dtype::kInt64;
  if (std::is_same<T, float>::value) return Dtype::kFloat32;
  if (std::is_same<T, double>::value) return Dtype::kFloat64;
  return Dtype::kOther;
}

struct Array {
  static constexpr int kMaxDims = 4;

  void* data;
  Dtype dtype;
  int dims;
  std::int64_t shape[kMaxDims];  // the first kMaxDims
  bool contiguous;
  bool writeable;
  int device;  // two arrays of one device have the same number
};

// A dimension that must have a size, or one that is free and has a name.
struct Extent {
  std::int64_t size = -1;
  const char* name = nullptr;

  Extent(std::int64_t fixed) : size(fixed) {}
  Extent(const char* free) : name(free) {}
};

// An argument of the wrong dtype; NumPy's binding raises TypeError for it.
struct DtypeError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Checks the arguments of one operator and hands out their elements.
class Arguments {
 public:
  // All arguments must be on the device of `first`.
  Arguments(const char* op, const Array& first) : op_(op), device_(first.device) {}

  template <class T>
  const T* input(const char* name, const Array& array, std::initializer_list<Extent> shape) const {
    check(name, array, dtype_of<T>(), shape);
    return static_cast<const T*>(array.data);
  }

  // Of any shape.
  template <class T>
  const T* input(const char* name, const Array& array) const {
    if (array.dtype != dtype_of<T>()) throw DtypeError(text(name, dtype_name(dtype_of<T>()), describe(array)));
    check_layout(name, array);
    return static_cast<const T*>(array.data);
  }

  template <class T>
  T* inout(const char* name, const Array& array, std::initializer_list<Extent> shape) const {
    check(name, array, dtype_of<T>(), shape);
    if (!array.writeable) fail(name, "writeable", "a read-only array");
    return static_cast<T*>(array.data);
  }

  // Requires `holds` of a number.
  template <class Number>
  void require(bool holds, const char* name, const std::string& expected, Number got) const {
    if (!holds) fail(name, expected, number(got));
  }

  [[noreturn]] void fail(const char* name, const std::string& expected, const std::string& got) const {
    throw std::invalid_argument(text(name, expected, got));
  }

 private:
  void check(const char* name, const Array& array, Dtype dtype, std::initializer_list<Extent> shape) const {
    bool fits = array.dims == static_cast<int>(shape.size());
    int dim = 0;
    for (const Extent& extent : shape) {
      fits = fits && (extent.size < 0 || array.shape[dim] == extent.size);
      ++dim;
    }
    if (array.dtype != dtype || !fits) {
      const std::string message = text(name, dtype_name(dtype) + (" " + brackets(shape)), describe(array));
      if (array.dtype != dtype) throw DtypeError(message);
      throw std::invalid_argument(message);
    }
    check_layout(name, array);
  }

  void check_layout(const char* name, const Array& array) const {
    if (!array.contiguous) fail(name, "C-contiguous", describe(array) + " with other strides");
    if (array.device != device_) fail(name, "on the device of the other arguments", "another device");
  }

  std::string text(const char* name, const std::string& expected, const std::string& got) const {
    return std::string(op_) + ": `" + name + "` must be " + expected + ", got " + got;
  }

  static std::string brackets(std::initializer_list<Extent> shape) {
    std::string text;
    for (const Extent& extent : shape) {
      text += (text.empty() ? "" : ", ") + (extent.size < 0 ? std::string(extent.name) : std::to_string(extent.size));
    }
    return "[" + text + "]";
  }

  static std::string describe(const Array& array) {
    std::string text;
    for (int dim = 0; dim < array.dims; ++dim) {
      text += dim == 0 ? "" : ", ";
      text += dim < Array::kMaxDims ? std::to_string(array.shape[dim]) : "...";
    }
    return std::string(dtype_name(array.dtype)) + " [" + text + "]";
  }

  static std::string number(std::int64_t value) { return std::to_string(value); }

  static std::string number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
  }

  const char* op_;
  int device_;
};

}  // namespace lead_fast
