"""Gradient of the head's bias: a weighted sum of the rows of a chunk.

    db = sum_t w_t g_t      g_t the stored gradient at the raw logits

    symbol  shape     dtype               meaning
    g       [R, V]    fp32, bf16, fp16    gradients at the raw logits
    labels  [R]       int64               w_t counts as 0 where a label is `ignore_index`
    scale   [R]       fp32                w_t; a row under weight 0 is not read and adds exactly 0
    d_bias  [V]       fp32                added to

Accumulation: fp32, rows in order.
Determinism: bitwise; one program a block of columns, no atomics.
Bytes moved: R * V * itemsize.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .card import card


@triton.jit(do_not_specialize=["rows", "vocab", "ignore_index"])
def _bias_grad_kernel(
    gradient_ptr,  # [R, V], rows of row_stride elements
    labels_ptr,  # [R] int64
    scale_ptr,  # [R] fp32
    d_bias_ptr,  # [V] fp32
    rows,
    vocab,
    row_stride,
    ignore_index,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_R, BLOCK_V], tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
        used = (scale != 0) & (tl.load(labels_ptr + row, mask=row < rows, other=ignore_index) != ignore_index)
        address = gradient_ptr + row.to(tl.int64)[:, None] * row_stride + cols[None, :]
        gradient = tl.load(address, mask=used[:, None] & (cols < row_stride)[None, :], other=0.0).to(tl.float32)
        total += scale[:, None] * gradient
    before = tl.load(d_bias_ptr + cols, mask=cols < vocab, other=0.0)
    tl.store(d_bias_ptr + cols, before + tl.sum(total, axis=0), mask=cols < vocab)


class Launch(NamedTuple):
    """Launch configuration."""

    block_r: int
    """Rows an iteration."""
    block_v: int
    """Columns a program."""
    num_warps: int


# Starting guesses, not yet measured on any card.
LAUNCH = {
    "sm_80": Launch(16, 256, 4),  # A100
    "sm_90": Launch(16, 256, 4),  # H100, H200
    "sm_100": Launch(16, 256, 4),  # B200
    "interpreter": Launch(4, 128, 1),
}


def bias_grad(gradient: Tensor, labels: Tensor, scale: Tensor, d_bias: Tensor, *, ignore_index: int) -> None:
    """Adds sum_t scale[t] * gradient[t] to `d_bias`.

    Args:
        gradient: [R, V] fp32, bf16 or fp16, rows `card.padded_row(V)` elements apart.
        labels: [R] int64.
        scale: [R] fp32.
        d_bias: [V] fp32, added to.
        ignore_index: label of rows without supervision.

    Determinism: bitwise.
    """
    rows, vocab = gradient.shape
    block_r, block_v, num_warps = LAUNCH[card(gradient.device)]
    _bias_grad_kernel[(triton.cdiv(vocab, block_v),)](
        gradient,
        labels,
        scale,
        d_bias,
        rows,
        vocab,
        gradient.stride(0),
        ignore_index,
        BLOCK_R=block_r,
        BLOCK_V=block_v,
        num_warps=num_warps,
    )
