// The instruction sets of the machine the program runs on, found at run time: one binary serves every CPU.
#pragma once

#include <string>
#include <vector>

namespace lead_fast {

struct CpuFeatures {
  bool avx2_fma = false;
  bool avx512 = false;  // F, BW, DQ and VL: what the AVX-512 kernels use
  bool avx512_bf16 = false;
  bool neon = false;
};

inline const CpuFeatures& cpu_features() {
  static const CpuFeatures found = [] {
    CpuFeatures features;
#if defined(__x86_64__)
    __builtin_cpu_init();
    features.avx2_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    features.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    features.avx512_bf16 = features.avx512 && __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__)
    features.neon = true;
#endif
    return features;
  }();
  return found;
}

inline std::vector<std::string> cpu_feature_names() {
  const CpuFeatures& features = cpu_features();
  std::vector<std::string> names;
  if (features.avx2_fma) names.emplace_back("avx2+fma");
  if (features.avx512) names.emplace_back("avx512");
  if (features.avx512_bf16) names.emplace_back("avx512_bf16");
  if (features.neon) names.emplace_back("neon");
  return names;
}

}  // namespace lead_fast
