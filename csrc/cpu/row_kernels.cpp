// Choice of the row kernels' instruction set.
#include "cpu/row_kernels.h"

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "core/cpu_features.h"

namespace lead_fast::cpu {

namespace {

const RowKernels& choose() {
  const CpuFeatures& has = cpu_features();
  const char* asked = std::getenv("LEAD_FAST_CPU");
  const std::string name = asked != nullptr ? asked : has.avx512 ? "avx512" : has.avx2_fma ? "avx2" : "portable";
  if (name == "portable") return row_kernels_portable;
#if defined(__x86_64__)
  if (name == "avx512" && has.avx512) return row_kernels_avx512;
  if (name == "avx2" && has.avx2_fma) return row_kernels_avx2;
#endif
  STD_TORCH_CHECK(false, "LEAD_FAST_CPU must be one of avx512, avx2, portable that this CPU runs, got ", name);
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& kernels = choose();
  return kernels;
}

}  // namespace lead_fast::cpu
