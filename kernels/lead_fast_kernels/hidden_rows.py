"""Gradient of each token's nll at its hidden state, from the fp32 product of the second GEMM.

    d_t = (delta_t * dz_t/dx_t) W       the product, taken by the GEMM library
    d_hidden_t = d_t rounded to the dtype of the hidden states
    d_sq_t = ||d_t||^2                  before rounding

    symbol    shape     dtype               meaning
    product   [R, H]    fp32                rows d_t of a chunk
    labels    [R]       int64               a row with `ignore_index` becomes exactly 0
    d_hidden  [R, H]    fp32, bf16, fp16    written
    d_sq      [R]       fp32                written

After `single_pass_rows` the product U still lacks the factor of its row and the target's column:

    d_t = inverse_t (U_t - target_t W[y_t])

    inverse   [R]       fp32                or None, with the next two
    target    [R]       fp32
    weight    [V, H]    dtype of d_hidden   W

Rows carry no upstream gradient here: backward multiplies row t by its own, which is exact for any weights of tokens or
samples.

Accumulation: fp32.
Determinism: bitwise; one program a row, no atomics.
Bytes moved: R * H * (4 + itemsize).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import RowLaunch, card


@triton.jit(do_not_specialize=["vocab", "ignore_index"])
def _hidden_rows_kernel(
    product_ptr,  # [R, H] fp32
    labels_ptr,  # [R] int64
    d_hidden_ptr,  # [R, H]
    d_sq_ptr,  # [R] fp32
    inverse_ptr,  # [R] fp32, or None
    target_ptr,  # [R] fp32, or None
    weight_ptr,  # [V, H], or None
    hidden_size,
    vocab,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    product_ptr += row.to(tl.int64) * hidden_size
    d_hidden_ptr += row.to(tl.int64) * hidden_size
    label = tl.load(labels_ptr + row)
    supervised = label != ignore_index
    if inverse_ptr is not None:
        inverse = tl.load(inverse_ptr + row)
        target = tl.load(target_ptr + row)
        in_range = supervised & (label >= 0) & (label < vocab)
        weight_ptr += label * hidden_size
    square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        d = tl.load(product_ptr + cols, mask=(cols < hidden_size) & supervised, other=0.0)
        if inverse_ptr is not None:
            w = tl.load(weight_ptr + cols, mask=(cols < hidden_size) & in_range, other=0.0).to(tl.float32)
            d = tl.where(supervised, inverse * (d - target * w), 0.0)
        square += d * d
        tl.store(d_hidden_ptr + cols, d.to(d_hidden_ptr.dtype.element_ty), mask=cols < hidden_size)
    tl.store(d_sq_ptr + row, tl.sum(square, axis=0))


# sm_90 by benchmarks/tune_kernels.py on an H200; the others are guesses.
LAUNCH = {
    "sm_80": RowLaunch(2048, 8),  # A100
    "sm_90": RowLaunch(2048, 8),  # H100, H200
    "sm_100": RowLaunch(2048, 8),  # B200
    "interpreter": RowLaunch(16, 1),
}


def hidden_rows(
    product: Tensor,
    labels: Tensor,
    d_hidden: Tensor,
    d_sq: Tensor,
    weight: Tensor,
    single_pass: tuple[Tensor, Tensor] | None,
    *,
    ignore_index: int,
) -> None:
    """Rounds `product` into `d_hidden` and fills `d_sq` with its squared row norms; rows without supervision become 0.

    Args:
        product: [R, H] fp32, contiguous.
        labels: [R] int64.
        d_hidden: [R, H] fp32, bf16 or fp16, contiguous, written.
        d_sq: [R] fp32, written.
        weight: [V, H] in the dtype of `d_hidden`, contiguous.
        single_pass: `inverse` and `target` [R] fp32 where the logits come from `single_pass_rows`, else None.
        ignore_index: label of rows without supervision.

    Determinism: bitwise.
    """
    rows, hidden_size = product.shape
    block, num_warps = LAUNCH[card(product.device)]
    inverse, target = (None, None) if single_pass is None else single_pass
    _hidden_rows_kernel[(rows,)](
        product,
        labels,
        d_hidden,
        d_sq,
        inverse,
        target,
        None if single_pass is None else weight,
        hidden_size,
        weight.shape[0],
        ignore_index,
        BLOCK=block,
        num_warps=num_warps,
    )
