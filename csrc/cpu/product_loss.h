// The fused loss by torch's products: for bf16, which the CPU's own instructions multiply faster than fp32, and for
// fp32 on CPUs that tile_kernels.h does not serve.
#pragma once

#include "cpu/loss_results.h"
#include "cpu/row_kernels.h"
#include "cpu/supervised_tokens.h"

namespace lead_fast::cpu {

// hidden: [M, H], the supervised tokens' rows; weight: [V, H]; bias: [V] for the product to add, or null. `gradient`:
// results.logit_grad_sq and the gradients that are not null. Stored: float or uint16_t (bf16).
template <class Stored>
void product_loss(Stored* hidden, Stored* weight, Stored* bias, int64_t width, const LogitMap& map,
                  const SupervisedTokens& tokens, const StoredRows<Stored>& rows, bool gradient,
                  LossResults<Stored>& results);

}  // namespace lead_fast::cpu
