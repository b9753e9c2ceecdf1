"""Statistics of each sample from those of its tokens and tiles.

    n_i = supervised tokens of sample i
    loss_i = sum_t nll_t / n_i
    logit_grad_sq_i = sum_t ||delta_t||^2 / n_i
    hidden_grad_sq_i = sum_t ||d_t||^2 / n_i
    G_i = sum of the sample's tiles
    all 0 where n_i = 0

    symbol       shape      dtype
    cu_seqlens   [S + 1]    int32 or int64
    nll          [T]        fp32              0 where ignored, as are the next two
    delta_sq     [T]        fp32              or None: statistics of the loss only, and NaN in columns 2 to 4
    d_sq         [T]        fp32              or None, as `delta_sq`
    first_row    [S + 1]    int32             from `sample_tiles`
    first_gram   [S + 1]    int32             from `sample_tiles`
    first_outer  [S + 1]    int32             from `sample_tiles`
    gram         [tiles]    fp32              from `sample_gram`
    outer        [tiles]    fp32              from `sample_outer`
    stats        [S, 5]     fp32              written: loss, n, logit_grad_sq, hidden_grad_sq, G

A NaN reaches the sample that it belongs to and no other.

Accumulation: fp32, one partial sum a lane, merged once.
Determinism: bitwise; one program a sample, no atomics.
Bytes moved: 12 * T + 4 * tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import RowLaunch, card


@triton.jit
def _sum_range(ptr, begin, end, BLOCK: tl.constexpr):
    """Sum of ptr[begin:end] in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + index, mask=index < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_tokens"])
def _sample_stats_kernel(
    cu_seqlens_ptr,  # [S + 1]
    nll_ptr,  # [T] fp32
    delta_sq_ptr,  # [T] fp32, or None
    d_sq_ptr,  # [T] fp32, or None
    first_row_ptr,  # [S + 1] int32
    first_gram_ptr,  # [S + 1] int32
    first_outer_ptr,  # [S + 1] int32
    gram_ptr,  # [tiles] fp32
    outer_ptr,  # [tiles] fp32
    stats_ptr,  # [S, 5] fp32
    num_tokens,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + sample).to(tl.int32)
    end = tl.load(cu_seqlens_ptr + sample + 1).to(tl.int32)
    begin = tl.minimum(tl.maximum(begin, 0), num_tokens)
    end = tl.minimum(end, num_tokens)
    n = tl.load(first_row_ptr + sample + 1) - tl.load(first_row_ptr + sample)
    per_token = 1.0 / tl.maximum(n, 1).to(tl.float32)

    stats_ptr += sample * 5
    tl.store(stats_ptr, _sum_range(nll_ptr, begin, end, BLOCK) * per_token)
    tl.store(stats_ptr + 1, n.to(tl.float32))
    if delta_sq_ptr is None:
        missing = tl.where(n > 0, float("nan"), 0.0)
        tl.store(stats_ptr + 2, missing)
        tl.store(stats_ptr + 3, missing)
        tl.store(stats_ptr + 4, missing)
    else:
        tl.store(stats_ptr + 2, _sum_range(delta_sq_ptr, begin, end, BLOCK) * per_token)
        tl.store(stats_ptr + 3, _sum_range(d_sq_ptr, begin, end, BLOCK) * per_token)
        grams = _sum_range(gram_ptr, tl.load(first_gram_ptr + sample), tl.load(first_gram_ptr + sample + 1), BLOCK)
        outers = _sum_range(outer_ptr, tl.load(first_outer_ptr + sample), tl.load(first_outer_ptr + sample + 1), BLOCK)
        norm = grams + outers
        tl.store(stats_ptr + 4, tl.where(norm < 0.0, 0.0, norm))  # rounding, where gradients cancel; NaN stays


# Starting guesses, not yet measured on any card.
LAUNCH = {
    "sm_80": RowLaunch(1024, 4),  # A100
    "sm_90": RowLaunch(1024, 4),  # H100, H200
    "sm_100": RowLaunch(1024, 4),  # B200
    "interpreter": RowLaunch(8, 1),
}


def sample_stats(
    cu_seqlens: Tensor,
    nll: Tensor,
    delta_sq: Tensor | None,
    d_sq: Tensor | None,
    first_row: Tensor,
    first_gram: Tensor,
    first_outer: Tensor,
    gram: Tensor | None,
    outer: Tensor | None,
    stats: Tensor,
) -> None:
    """Fills `stats`; see the table above for shapes.

    Determinism: bitwise.
    """
    block, num_warps = LAUNCH[card(nll.device)]
    _sample_stats_kernel[(stats.shape[0],)](
        cu_seqlens,
        nll,
        delta_sq,
        d_sq,
        first_row,
        first_gram,
        first_outer,
        gram,
        outer,
        stats,
        nll.shape[0],
        BLOCK=block,
        num_warps=num_warps,
    )
