"""Cross-entropy of each row of a chunk of logits, and its gradient in place of the logits.

    z = softcap(scale * x)             softcap(u) = c tanh(u / c), or u without a cap
    m = max_v z_v
    s = sum_{v != y} exp(z_v - m)      the target is left out, so that nothing cancels when p_y is near 1
    S = s + exp(z_y - m)
    nll = log S + m - z_y              log1p(s) where the target is the maximum
    delta_v = exp(z_v - m) / S         v != y;  delta_y = -s / S
    ||delta||^2 = (s / S)^2 + sum_{v != y} delta_v^2
    x_v <- delta_v * scale * (1 - (z_v / c)^2)

    symbol    shape       dtype               meaning
    x         [R, V]      fp32, bf16, fp16    raw logits W h + bias of the R rows of the chunk; overwritten
    y         [R]         int64               labels
    nll       [R]         fp32                nats
    delta_sq  [R]         fp32                ||delta||^2

Rows with `ignore_index` become 0 and are not read, so that whatever they hold stays out. A label outside [0, V) is
never used as an address: its row becomes NaN, like a row that holds a NaN or +inf. No row touches another one.

Accumulation: fp32; maxima and sums are kept per group of `VECTOR` columns and merged once, at the row's end.
Determinism: bitwise; one program a row, no atomics.
Bytes moved: 2 reads and 1 write of the chunk, 3 * R * V * itemsize; the second read hits L2 where the rows in flight
fit.
Source: online softmax, Milakov and Gimelshein (arXiv 1805.02867), algorithm 3.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .card import card


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap(x) and its derivative; 1 - tanh^2 is taken as 4 e / (1 + e)^2, which keeps its digits near the cap.

    Far below the cap 1 - e has none: there tanh is its series.
    """
    if HAS_SOFTCAP:
        t = tl.abs(x / softcap)
        e = tl.exp(-2.0 * t)
        u = t * t
        series = t * (1.0 + u * (-1 / 3 + u * (2 / 15 + u * (-17 / 315 + u * (62 / 2835)))))
        tanh = tl.where(t < 0.25, series, (1.0 - e) / (1.0 + e))
        return tl.where(x < 0, -softcap, softcap) * tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))
    else:
        return x, 1.0


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to fp32 accuracy, by 2 atanh(x / (2 + x)) where 1 + x would lose digits."""
    t = x / (2.0 + x)
    u = t * t
    series = 2.0 * t * (1.0 + u * (1 / 3 + u * (1 / 5 + u * (1 / 7 + u * (1 / 9)))))
    return tl.where(x < 0.25, series, tl.log(1.0 + x))


@triton.jit(do_not_specialize=["vocab", "ignore_index"])
def _logit_rows_kernel(
    logits_ptr,  # [R, V], rows of row_stride elements
    labels_ptr,  # [R] int64
    nll_ptr,  # [R] fp32
    delta_sq_ptr,  # [R] fp32
    vocab,
    row_stride,
    ignore_index,
    logit_scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    WRITE_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    # Columns [BLOCK / VECTOR, VECTOR]: a thread owns whole groups, so that the loop needs no exchange between threads.
    group = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    label = tl.load(labels_ptr + row)

    if label == ignore_index:
        tl.store(nll_ptr + row, 0.0)
        if WRITE_DELTA:
            tl.store(delta_sq_ptr + row, 0.0)
            zeros = tl.zeros([BLOCK // VECTOR, VECTOR], logits_ptr.dtype.element_ty)
            for start in range(0, vocab, BLOCK):
                tl.store(logits_ptr + start + group, zeros, mask=start + group < row_stride)
        return

    in_range = (label >= 0) & (label < vocab)
    target = tl.where(in_range, label, -1).to(tl.int32)
    raw_y = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
    z_y = capped(raw_y * logit_scale, softcap, HAS_SOFTCAP)[0]

    peak = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in range(0, vocab, BLOCK):
        cols = start + group
        # The mask ends at the padded row, not at V: it stays a multiple of the vector width and loads stay wide.
        raw = tl.load(logits_ptr + cols, mask=cols < row_stride, other=0.0).to(tl.float32)
        z = capped(raw * logit_scale, softcap, HAS_SOFTCAP)[0]
        z = tl.where((cols < vocab) & (cols != target), z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        anchor = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - anchor) + tl.sum(tl.exp(z - anchor[:, None]), axis=1)
        peak = new_peak

    top = tl.maximum(tl.max(peak, axis=0), z_y)
    others = tl.sum(total * tl.exp(peak - top), axis=0)
    sum_exp = others + tl.exp(z_y - top)
    # top - z_y stays in both cases: it is 0 at the maximum, and NaN where that is infinite.
    nll = tl.where(z_y == top, log1p(others), tl.log(sum_exp)) + (top - z_y)
    tl.store(nll_ptr + row, nll)

    if WRITE_DELTA:
        # A NaN in `sum_exp` makes `inverse` NaN, and with it the whole row: exp(...) * NaN.
        inverse = 1.0 / sum_exp
        delta_y = -others * inverse
        square = tl.zeros([BLOCK // VECTOR], tl.float32)
        for start in range(0, vocab, BLOCK):
            cols = start + group
            raw = tl.load(logits_ptr + cols, mask=cols < row_stride, other=0.0).to(tl.float32)
            z, slope = capped(raw * logit_scale, softcap, HAS_SOFTCAP)
            z = tl.where(cols < vocab, z, float("-inf"))
            delta = tl.where(cols == target, delta_y, tl.exp(z - top) * inverse)
            square += tl.sum(delta * delta, axis=1)
            stored = delta * (slope * logit_scale)
            tl.store(logits_ptr + cols, stored.to(logits_ptr.dtype.element_ty), mask=cols < row_stride)
        tl.store(delta_sq_ptr + row, tl.sum(square, axis=0))


class LogitLaunch(NamedTuple):
    """Launch configuration of a kernel with one program a row of logits."""

    block_bytes: int
    """Bytes of a row an iteration."""
    num_warps: int

    def constants(self, logits: Tensor) -> dict[str, int]:
        """Keyword arguments of the launch: a group of `VECTOR` columns is 16 bytes, one load of a thread."""
        size = logits.element_size()
        return {"BLOCK": self.block_bytes // size, "VECTOR": 16 // size, "num_warps": self.num_warps}


# sm_90 by benchmarks/tune_kernels.py on an H200; the others are guesses: few rows in flight, so that the second read finds
# them in L2.
LAUNCH = {
    "sm_80": LogitLaunch(32768, 32),  # A100
    "sm_90": LogitLaunch(8192, 16),  # H100, H200
    "sm_100": LogitLaunch(16384, 32),  # B200
    "interpreter": LogitLaunch(256, 1),
}


def logit_rows(
    logits: Tensor,
    labels: Tensor,
    nll: Tensor,
    delta_sq: Tensor,
    *,
    ignore_index: int,
    softcap: float,
    logit_scale: float,
    write_delta: bool,
) -> None:
    """Fills `nll`, and with `write_delta` also `delta_sq`, and turns `logits` into the gradient at the raw logits.

    Args:
        logits: [R, V] fp32, bf16 or fp16, rows `card.padded_row(V)` elements apart; the padding is overwritten.
        labels: [R] int64.
        nll: [R] fp32, written.
        delta_sq: [R] fp32, written only with `write_delta`.
        ignore_index: label of rows without supervision.
        softcap: cap, 0 for none.
        logit_scale: factor on the raw logits, before the cap.
        write_delta: without it the logits stay as they are.

    Determinism: bitwise.
    """
    rows, vocab = logits.shape
    _logit_rows_kernel[(rows,)](
        logits,
        labels,
        nll,
        delta_sq,
        vocab,
        logits.stride(0),
        ignore_index,
        logit_scale,
        softcap,
        HAS_SOFTCAP=softcap > 0,
        WRITE_DELTA=write_delta,
        **LAUNCH[card(logits.device)].constants(logits),
    )
