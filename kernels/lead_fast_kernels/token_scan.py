"""One pass over the tokens of a batch: where the supervised ones are, how many labels are out of range, and the loss.

    before_t = number of supervised tokens before t            t = 0 .. T, so before_T counts all of them
    supervised_{before_t} = t                                  for each supervised t
    bad_labels = number of supervised labels outside [0, V)
    loss = sum_t w_t nll_t                                     0, whatever nll_t is, where w_t = 0

    symbol      shape      dtype
    labels      [T]        int64
    nll         [T]        fp32
    scale       [T]        fp32     w_t
    before      [T + 1]    int32    written
    supervised  [T]        int32    written in its first before_T entries
    loss        []         fp32     written
    bad_labels  []         int64    written

The supervised tokens of sample i are then entries before[cu_seqlens[i]] to before[cu_seqlens[i + 1]] - 1 of
`supervised`: kernels that follow visit supervised tokens only, though the host never knows how many there are.

Accumulation: loss fp32, one partial sum a lane, merged once; counts are integers.
Determinism: bitwise; a single program, no atomics.
Bytes moved: 24 * T.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import RowLaunch, card


@triton.jit(do_not_specialize=["num_tokens", "vocab", "ignore_index"])
def _token_scan_kernel(
    labels_ptr,  # [T] int64
    nll_ptr,  # [T] fp32
    scale_ptr,  # [T] fp32
    before_ptr,  # [T + 1] int32
    supervised_ptr,  # [T] int32
    loss_ptr,  # [] fp32
    bad_labels_ptr,  # [] int64
    num_tokens,
    vocab,
    ignore_index,
    BLOCK: tl.constexpr,
):
    seen = 0
    bad = tl.zeros([BLOCK], tl.int32)
    loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = token < num_tokens
        label = tl.load(labels_ptr + token, mask=inside, other=ignore_index)
        is_supervised = label != ignore_index
        flag = is_supervised.to(tl.int32)
        before = seen + tl.cumsum(flag, 0) - flag
        tl.store(before_ptr + token, before, mask=inside)
        tl.store(supervised_ptr + before, token, mask=is_supervised)
        seen += tl.sum(flag, axis=0)
        bad += (is_supervised & ((label < 0) | (label >= vocab))).to(tl.int32)

        scale = tl.load(scale_ptr + token, mask=inside, other=0.0)
        nll = tl.load(nll_ptr + token, mask=inside, other=0.0)
        loss += tl.where(scale == 0.0, 0.0, scale * nll)
    tl.store(before_ptr + num_tokens, seen)
    tl.store(bad_labels_ptr, tl.sum(bad, axis=0).to(tl.int64))
    tl.store(loss_ptr, tl.sum(loss, axis=0))


# Starting guesses, not yet measured on any card.
LAUNCH = {
    "sm_80": RowLaunch(2048, 16),  # A100
    "sm_90": RowLaunch(2048, 16),  # H100, H200
    "sm_100": RowLaunch(2048, 16),  # B200
    "interpreter": RowLaunch(16, 1),
}


def token_scan(
    labels: Tensor,
    nll: Tensor,
    scale: Tensor,
    before: Tensor,
    supervised: Tensor,
    loss: Tensor,
    bad_labels: Tensor,
    *,
    vocab: int,
    ignore_index: int,
) -> None:
    """Fills `before`, `supervised`, `loss` and `bad_labels` in one pass over the tokens.

    Args:
        labels: [T] int64.
        nll: [T] fp32, 0 where ignored.
        scale: [T] fp32, the derivative of the loss by each nll.
        before: [T + 1] int32, written.
        supervised: [T] int32, written.
        loss: [] fp32, written.
        bad_labels: [] int64, written.
        vocab: V.
        ignore_index: label of tokens without supervision.

    Determinism: bitwise.
    """
    block, num_warps = LAUNCH[card(labels.device)]
    _token_scan_kernel[(1,)](
        labels,
        nll,
        scale,
        before,
        supervised,
        loss,
        bad_labels,
        labels.shape[0],
        vocab,
        ignore_index,
        BLOCK=block,
        num_warps=num_warps,
    )
