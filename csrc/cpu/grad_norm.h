// G = || D^T H ||_F^2 of each sample, D and H [n, width] its tokens' hidden gradients and hidden states.
#pragma once

#include <cstdint>
#include <vector>

namespace lead_fast::cpu {

// d, h: [M, width] fp32, contiguous. Sample i owns rows starts[i] to starts[i + 1] - 1. Bitwise the same in every run.
std::vector<double> grad_norms(float* d, float* h, int64_t width, const std::vector<int64_t>& starts);

}  // namespace lead_fast::cpu
