// Choice of the row and tile kernels' instruction set.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "core/cpu_features.h"
#include "cpu/row_kernels.h"
#include "cpu/tile_kernels.h"

namespace lead_fast::cpu {

namespace {

struct Kernels {
  const RowKernels& rows;
  const TileKernels* tiles;
};

Kernels choose() {
  const CpuFeatures& has = cpu_features();
  const char* asked = std::getenv("LEAD_FAST_CPU");
  const std::string name = asked != nullptr ? asked : has.avx512 ? "avx512" : has.avx2_fma ? "avx2" : "portable";
  if (name == "portable") return {row_kernels_portable, nullptr};
#if defined(__x86_64__)
  if (name == "avx512" && has.avx512) return {row_kernels_avx512, &tile_kernels_avx512};
  if (name == "avx2" && has.avx2_fma) return {row_kernels_avx2, &tile_kernels_avx2};
#endif
  STD_TORCH_CHECK(false, "LEAD_FAST_CPU must be one of avx512, avx2, portable that this CPU runs, got ", name);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

const RowKernels& row_kernels() { return kernels().rows; }

const TileKernels* tile_kernels() { return kernels().tiles; }

}  // namespace lead_fast::cpu
