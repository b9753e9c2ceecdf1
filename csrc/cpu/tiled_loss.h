// The fused loss in fp32: products, softmax and gradients of a chunk of tokens by tiles (tile_kernels.h), without the
// products of torch.
#pragma once

#include "cpu/loss_results.h"
#include "cpu/row_kernels.h"
#include "cpu/supervised_tokens.h"
#include "cpu/tile_kernels.h"

namespace lead_fast::cpu {

// hidden: [M, H] with M > 0, the supervised tokens' rows; weight: [V, H]. `gradient`: results.logit_grad_sq and the
// gradients that are not null.
void tiled_loss(const float* hidden, const float* weight, int64_t width, const LogitMap& map,
                const SupervisedTokens& tokens, const TileKernels& kernels, bool gradient, LossResults<float>& results);

}  // namespace lead_fast::cpu
