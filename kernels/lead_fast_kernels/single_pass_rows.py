"""Cross-entropy of each row of a chunk of logits in one read and one write: `logit_rows` anchored on the target.

    a = z_y,  E_v = exp(z_v - a - c)      c = 15; the maximum of the row is not needed
    s = sum_{v != y} E_v,  q = sum_{v != y} E_v^2,  S = s + e^-c
    nll = log1p(s e^c)
    ||delta||^2 = (s / S)^2 + (q / S) / S
    x_v <- E_v * f_v  for v != y,  x_y <- 0      f_v = scale * (1 - (z_v / cap)^2)
    inverse = 1 / S,  target = s f_y      the gradient at x_v is inverse * (E_v f_v), that at x_y is -inverse * target

What is stored is the gradient but for the factor `inverse` of its row and its entry at the target. Rounded to bf16,
that entry would lose more than all others together, so `target` stays in fp32: d_t = inverse_t (U_t - target_t W[y_t]),
U the product of the GEMM (`hidden_rows`); `put_targets` stores -target only before dW is taken.

A group of `VECTOR` columns whose sum of E passes LIMIT (a loss above about 50), or is NaN, leaves its logits in place
from there on: E would overwrite what is needed to do better. `stop` says at which block each group of such a row
stopped, and `_repair_rows_kernel` finishes the row: with m the maximum of what was left and S' = sum_v exp(z_v - m),
what is done is multiplied by e^(a + c - m) / S', what was left becomes exp(z_v - m) / S', and inverse becomes 1.

    symbol    shape            dtype         meaning
    x         [R, V]           fp32, bf16    raw logits, overwritten; fp16 has no range for E
    y         [R]              int64         labels
    nll       [R]              fp32
    delta_sq  [R]              fp32          ||delta||^2
    inverse   [R]              fp32
    target    [R]              fp32
    stop      [R, BLOCK / VECTOR]    int16    written for rows that need repair
    flag      [R]              int32         1 for rows that need repair

Accumulation: fp32. Determinism: bitwise; one program a row, no atomics.
Bytes moved: 2 * R * V * itemsize, and twice the bytes of each repaired row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .card import card
from .logit_rows import LogitLaunch, capped, log1p

# e^36: the square of a larger E, summed over a vocabulary, could leave fp32.
LIMIT = tl.constexpr(4.3e15)
OFFSET = tl.constexpr(15.0)
EXP_OFFSET = tl.constexpr(3269017.3724721107)
EXP_MINUS_OFFSET = tl.constexpr(3.059023205018258e-07)


@triton.jit(do_not_specialize=["vocab", "ignore_index"])
def _single_pass_rows_kernel(
    logits_ptr,  # [R, V], rows of row_stride elements
    labels_ptr,  # [R] int64
    nll_ptr,  # [R] fp32
    delta_sq_ptr,  # [R] fp32
    inverse_ptr,  # [R] fp32
    target_ptr,  # [R] fp32
    stop_ptr,  # [R, BLOCK / VECTOR] int16
    flag_ptr,  # [R] int32
    vocab,
    row_stride,
    ignore_index,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    groups = tl.arange(0, BLOCK // VECTOR)
    group = groups[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    label = tl.load(labels_ptr + row)

    if label == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        tl.store(delta_sq_ptr + row, 0.0)
        tl.store(inverse_ptr + row, 0.0)
        tl.store(target_ptr + row, 0.0)
        tl.store(flag_ptr + row, 0)
        zeros = tl.zeros([BLOCK // VECTOR, VECTOR], logits_ptr.dtype.element_ty)
        for start in range(0, vocab, BLOCK):
            tl.store(logits_ptr + start + group, zeros, mask=start + group < row_stride)
        return

    in_range = (label >= 0) & (label < vocab)
    y = tl.where(in_range, label, -1).to(tl.int32)
    raw_y = tl.load(logits_ptr + y, mask=in_range, other=float("nan")).to(tl.float32)
    z_y, slope_y = capped(raw_y * logit_scale, softcap, HAS_SOFTCAP)
    z_y = tl.where(z_y == float("inf"), float("nan"), z_y)  # all E would be 0, and the row look certain
    # Every thread has read x_y before any of them overwrites it.
    tl.debug_barrier()

    stop = tl.full([BLOCK // VECTOR], 32767, tl.int32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    square = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + group
        raw = tl.load(logits_ptr + cols, mask=cols < row_stride, other=0.0).to(tl.float32)
        z, slope = capped(raw * logit_scale, softcap, HAS_SOFTCAP)
        e = tl.exp(z - z_y - OFFSET)
        e = tl.where((cols < vocab) & (cols != y), e, 0.0)
        sum_e = tl.sum(e, axis=1)
        block = start // BLOCK
        stop = tl.where((sum_e <= LIMIT) | (stop < block), stop, block)
        alive = block < stop
        total += tl.where(alive, sum_e, 0.0)
        square += tl.where(alive, tl.sum(e * e, axis=1), 0.0)
        stored = (e * (slope * logit_scale)).to(logits_ptr.dtype.element_ty)
        tl.store(logits_ptr + cols, stored, mask=(cols < row_stride) & alive[:, None])

    s = tl.sum(total, axis=0)
    q = tl.sum(square, axis=0)
    factor_y = slope_y * logit_scale
    repair = tl.min(stop, axis=0) < 32767
    tl.store(flag_ptr + row, repair.to(tl.int32))
    if repair:
        # `repair` needs what was summed so far and the target, and puts the results in their place.
        tl.store(stop_ptr + row.to(tl.int64) * (BLOCK // VECTOR) + groups, stop.to(tl.int16))
        tl.store(nll_ptr + row, z_y)
        tl.store(delta_sq_ptr + row, q)
        tl.store(inverse_ptr + row, factor_y)
        tl.store(target_ptr + row, s)
    else:
        inverse = 1.0 / (s + EXP_MINUS_OFFSET)
        tl.store(nll_ptr + row, log1p(s * EXP_OFFSET))
        tl.store(delta_sq_ptr + row, (s * inverse) * (s * inverse) + (q * inverse) * inverse)
        tl.store(inverse_ptr + row, inverse)
        tl.store(target_ptr + row, s * factor_y)


@triton.jit(do_not_specialize=["vocab"])
def _repair_rows_kernel(
    logits_ptr,  # [R, V], rows of row_stride elements
    labels_ptr,  # [R] int64
    nll_ptr,  # [R] fp32
    delta_sq_ptr,  # [R] fp32
    inverse_ptr,  # [R] fp32
    target_ptr,  # [R] fp32
    stop_ptr,  # [R, BLOCK / VECTOR] int16
    flag_ptr,  # [R] int32
    vocab,
    row_stride,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    if tl.load(flag_ptr + row) == 0:
        return
    logits_ptr += row.to(tl.int64) * row_stride
    groups = tl.arange(0, BLOCK // VECTOR)
    group = groups[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    stop = tl.load(stop_ptr + row.to(tl.int64) * (BLOCK // VECTOR) + groups).to(tl.int32)[:, None]
    label = tl.load(labels_ptr + row)
    y = tl.where((label >= 0) & (label < vocab), label, -1).to(tl.int32)
    z_y = tl.load(nll_ptr + row)
    factor_y = tl.load(inverse_ptr + row)

    # What was left: its maximum, then its sums, as in `logit_rows`.
    peak = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    left = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + group
        raw = tl.load(logits_ptr + cols, mask=cols < row_stride, other=0.0).to(tl.float32)
        z = capped(raw * logit_scale, softcap, HAS_SOFTCAP)[0]
        z = tl.where((cols < vocab) & (cols != y) & (start // BLOCK >= stop), z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        left = left * tl.exp(peak - anchor) + tl.sum(tl.exp(z - anchor[:, None]), axis=1)
        peak = new_peak
    top = tl.maximum(tl.max(peak, axis=0), z_y)
    done = tl.exp(z_y + OFFSET - top)
    others = tl.sum(left * tl.exp(peak - top), axis=0) + tl.load(target_ptr + row) * done
    sum_exp = others + tl.exp(z_y - top)
    inverse = 1.0 / sum_exp

    square = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + group
        is_left = start // BLOCK >= stop
        raw = tl.load(logits_ptr + cols, mask=cols < row_stride, other=0.0).to(tl.float32)
        z, slope = capped(raw * logit_scale, softcap, HAS_SOFTCAP)
        p = tl.exp(z - top) * inverse
        square += tl.sum(tl.where((cols < vocab) & (cols != y) & is_left, p * p, 0.0), axis=1)
        stored = tl.where(is_left, p * (slope * logit_scale), raw * (done * inverse))
        stored = tl.where(cols == y, 0.0, stored)
        tl.store(logits_ptr + cols, stored.to(logits_ptr.dtype.element_ty), mask=cols < row_stride)

    share = others * inverse
    done_sq = tl.load(delta_sq_ptr + row) * (done * inverse) * (done * inverse)
    tl.store(delta_sq_ptr + row, share * share + done_sq + tl.sum(square, axis=0))
    tl.store(nll_ptr + row, tl.log(sum_exp) + (top - z_y))
    tl.store(inverse_ptr + row, 1.0)
    tl.store(target_ptr + row, share * factor_y)


@triton.jit(do_not_specialize=["rows", "vocab"])
def _put_targets_kernel(
    logits_ptr,  # [R, V], rows of row_stride elements
    labels_ptr,  # [R] int64
    target_ptr,  # [R] fp32
    rows,
    vocab,
    row_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + row, mask=row < rows, other=-1)
    target = tl.load(target_ptr + row, mask=row < rows, other=0.0)
    address = logits_ptr + row.to(tl.int64) * row_stride + label
    tl.store(address, (-target).to(logits_ptr.dtype.element_ty), mask=(label >= 0) & (label < vocab))


# sm_90 by benchmarks/tune_kernels.py on an H200; the others are guesses. Without a second read, rows in flight need not stay
# in L2.
LAUNCH = {
    "sm_80": LogitLaunch(8192, 16),  # A100
    "sm_90": LogitLaunch(8192, 16),  # H100, H200
    "sm_100": LogitLaunch(8192, 16),  # B200
    "interpreter": LogitLaunch(256, 1),
}
# Registers a thread in `_repair_rows_kernel`: told so, ptxas spills nothing; left to itself it saves some and spills.
REPAIR_REGISTERS = 64
# Whether the launcher takes this path. On an H200 it makes the whole loss 3% to 7% faster; off until it was measured against
# `logit_rows` on the card.
ENABLED = {"sm_80": False, "sm_90": True, "sm_100": False, "interpreter": False}


def single_pass_rows(
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    delta_sq: Tensor,
    *,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
) -> tuple[Tensor, Tensor]:
    """Fills `nll` and `delta_sq` and turns `logits` into their gradient, but for the factors of rows and the targets.

    Args:
        logits: [R, V] fp32 or bf16, rows `card.padded_row(V)` elements apart; the padding is overwritten.
        labels: [R] int64.
        nll: [R] fp32, written.
        delta_sq: [R] fp32, written.
        ignore_index: label of rows without supervision.
        softcap: cap, 0 for none.
        logit_scale: factor on the raw logits, before the cap.

    Returns:
        inverse: [R] fp32, the factor of each row.
        target: [R] fp32, the entry at the label, negated, where `logits` has 0.

    Determinism: bitwise.
    """
    rows, vocab = logits.shape
    constants = {"HAS_SOFTCAP": softcap > 0, **LAUNCH[card(logits.device)].constants(logits)}
    inverse, target = torch.empty_like(nll), torch.empty_like(nll)
    stop = torch.empty(rows, constants["BLOCK"] // constants["VECTOR"], dtype=torch.int16, device=logits.device)
    flag = torch.empty(rows, dtype=torch.int32, device=logits.device)
    arrays = (logits, labels, nll, delta_sq, inverse, target, stop, flag)
    _single_pass_rows_kernel[(rows,)](*arrays, vocab, logits.stride(0), ignore_index, logit_scale, softcap, **constants)
    constants["maxnreg"] = REPAIR_REGISTERS
    _repair_rows_kernel[(rows,)](*arrays, vocab, logits.stride(0), logit_scale, softcap, **constants)
    return inverse, target


def put_targets(logits: Tensor, labels: Tensor, target: Tensor) -> None:
    """Writes -target at the label of each row of `logits`; rows with a label outside [0, V) are left alone.

    Args:
        logits: [R, V] fp32 or bf16, from `single_pass_rows`.
        labels: [R] int64.
        target: [R] fp32, from `single_pass_rows`.

    Determinism: bitwise.
    """
    rows, vocab = logits.shape
    _put_targets_kernel[(triton.cdiv(rows, 256),)](
        logits, labels, target, rows, vocab, logits.stride(0), BLOCK=256, num_warps=4
    )
