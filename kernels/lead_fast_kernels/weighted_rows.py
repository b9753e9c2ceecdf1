"""Hidden states times token weights, the right factor of dW, with every trace of tokens under weight 0 removed.

    dW = sum_t w_t g_t h_t^T = g^T hw      g_t the stored gradient at the raw logits, hw_t = w_t h_t / unit

The weight goes to the hidden state and not to g_t, which the gradient of the hidden state needs under unit upstream.
`unit` is 1 but in fp16, where w_t (of the order of 1 / T) would push hw_t into the subnormal numbers: there it is
max_t |w_t|, and dW is multiplied by it.

    symbol    shape     dtype               meaning
    hidden    [R, H]    fp32, bf16, fp16    h_t
    labels    [R]       int64               w_t counts as 0 where a label is `ignore_index`
    scale     [R]       fp32                w_t
    unit      [1]       fp32                or None for 1
    weighted  [R, H]    dtype of hidden     hw_t, written; exactly 0 where w_t is 0, whatever h_t holds
    logits    [R, V]    dtype of hidden     g_t; set to 0 where w_t is 0 and nll_t not finite: 0 * NaN is NaN
    nll       [R]       fp32                tells which rows these are

Accumulation: none.
Determinism: bitwise; one program a row, no atomics.
Bytes moved: 2 * R * H * itemsize, and V * itemsize for each row that is set to 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import RowLaunch, card


@triton.jit(do_not_specialize=["vocab", "ignore_index"])
def _weighted_rows_kernel(
    hidden_ptr,  # [R, H]
    labels_ptr,  # [R] int64
    scale_ptr,  # [R] fp32
    unit_ptr,  # [1] fp32, or None
    weighted_ptr,  # [R, H]
    logits_ptr,  # [R, V], rows of row_stride elements
    nll_ptr,  # [R] fp32
    hidden_size,
    vocab,
    row_stride,
    ignore_index,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    hidden_ptr += row.to(tl.int64) * hidden_size
    weighted_ptr += row.to(tl.int64) * hidden_size
    scale = tl.load(scale_ptr + row)
    used = (tl.load(labels_ptr + row) != ignore_index) & (scale != 0.0)
    if unit_ptr is not None:
        scale = scale / tl.load(unit_ptr)
    for start in range(0, hidden_size, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + cols, mask=(cols < hidden_size) & used, other=0.0).to(tl.float32)
        hw = tl.where(used, scale * h, 0.0)
        tl.store(weighted_ptr + cols, hw.to(weighted_ptr.dtype.element_ty), mask=cols < hidden_size)

    finite = tl.abs(tl.load(nll_ptr + row)) < float("inf")
    if ~used & ~finite:
        logits_ptr += row.to(tl.int64) * row_stride
        zeros = tl.zeros([BLOCK], logits_ptr.dtype.element_ty)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            tl.store(logits_ptr + cols, zeros, mask=cols < vocab)


# sm_90 by benchmarks/tune_kernels.py on an H200; the others are guesses.
LAUNCH = {
    "sm_80": RowLaunch(2048, 8),  # A100
    "sm_90": RowLaunch(2048, 4),  # H100, H200
    "sm_100": RowLaunch(2048, 8),  # B200
    "interpreter": RowLaunch(16, 1),
}


def weighted_rows(
    hidden: Tensor,
    labels: Tensor,
    scale: Tensor,
    unit: Tensor | None,
    weighted: Tensor,
    logits: Tensor,
    nll: Tensor,
    *,
    ignore_index: int,
) -> None:
    """Fills `weighted` with hidden * scale / unit and clears rows of `logits` that are not finite under scale 0.

    Args:
        hidden: [R, H] fp32, bf16 or fp16, contiguous.
        labels: [R] int64.
        scale: [R] fp32.
        unit: [1] fp32, or None for 1.
        weighted: [R, H] in the dtype of `hidden`, contiguous, written.
        logits: [R, V] in the dtype of `hidden`, gradients at the raw logits with `V` contiguous.
        nll: [R] fp32.
        ignore_index: label of rows without supervision.

    Determinism: bitwise.
    """
    rows, hidden_size = hidden.shape
    block, num_warps = LAUNCH[card(hidden.device)]
    _weighted_rows_kernel[(rows,)](
        hidden,
        labels,
        scale,
        unit,
        weighted,
        logits,
        nll,
        hidden_size,
        logits.shape[1],
        logits.stride(0),
        ignore_index,
        BLOCK=block,
        num_warps=num_warps,
    )
