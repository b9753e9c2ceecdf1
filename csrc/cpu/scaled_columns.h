// The right-hand side of d_weight += (d nll / d a)^T (token_scale * hidden), as the tile kernels read it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/row_kernels.h"

namespace lead_fast::cpu {

// [H rounded up to lanes / lanes, tokens, lanes] at `out` = scale * rows [count, width]; tokens from `count` on and
// columns beyond `width` are 0, and so is a row of scale 0, whatever it holds.
template <class Stored>
void scaled_columns(const Stored* rows, const float* scale, int64_t count, int64_t width, int64_t tokens, int64_t lanes,
                    const StoredRows<Stored>& kernels, float* out) {
  torch::stable::parallel_for(0, (width + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    std::memset(out + begin * tokens * lanes, 0, (end - begin) * tokens * lanes * sizeof(float));
    for (int64_t column = begin; column < end; ++column) {
      const int64_t h = column * lanes, n = std::min(lanes, width - h);
      for (int64_t t = 0; t < count; ++t) {
        kernels.scale_to_f32(rows + t * width + h, scale[t], out + (column * tokens + t) * lanes, n);
      }
    }
  });
}

}  // namespace lead_fast::cpu
