"""G_i of samples with at most H supervised tokens, by two Gram matrices that are multiplied and summed tile by tile.

    G_i = || sum_t d_t h_t^T ||_F^2 = sum_{t,t'} <d_t, d_t'> <h_t, h_t'>

Both Gram matrices are symmetric: only tiles (a, b) with b <= a are taken, those with b < a twice. They live in
registers and are never stored; a tile leaves one number. Tiles of all samples form one list (`sample_tiles`), and the
programs take every `num_programs`-th of them.

    symbol       shape      dtype               meaning
    hidden       [T, H]     fp32, bf16, fp16    h_t
    d_hidden     [T, H]     dtype of hidden     d_t
    supervised   [T]        int32               positions of supervised tokens, from `token_scan`
    first_row    [S + 1]    int32               entries of `supervised` of each sample, from `sample_tiles`
    first_tile   [S + 1]    int32               first tile of each sample
    partial      [tiles]    fp32                written: what each tile adds to G_i

Accumulation: fp32 (products of fp32 inputs by three TF32 products).
Determinism: bitwise; each tile has its own place in `partial`, no atomics.
Bytes moved: 4 * BLOCK_T * H * itemsize a tile, mostly from L2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .card import card
from .sample_tiles import find_sample


@triton.jit
def _load_tile(ptr, row, row_mask, start, hidden_size, BLOCK_H: tl.constexpr, UPCAST: tl.constexpr):
    """[BLOCK_T, BLOCK_H] columns from `start` of the given rows; rows outside the sample are 0 and not read."""
    cols = start + tl.arange(0, BLOCK_H)
    mask = row_mask[:, None] & (cols < hidden_size)[None, :]
    tile = tl.load(ptr + row[:, None] * hidden_size + cols[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit(do_not_specialize=["num_samples"])
def _sample_gram_kernel(
    hidden_ptr,  # [T, H]
    d_hidden_ptr,  # [T, H]
    supervised_ptr,  # [T] int32
    first_row_ptr,  # [S + 1] int32
    first_tile_ptr,  # [S + 1] int32
    partial_ptr,  # [tiles] fp32
    num_samples,
    hidden_size,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    num_tiles = tl.load(first_tile_ptr + num_samples)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        sample = find_sample(first_tile_ptr, tile, num_samples, BLOCK_S)
        first_row = tl.load(first_row_ptr + sample)
        n = tl.load(first_row_ptr + sample + 1) - first_row
        # Tile k of the triangle is (a, b) with k = a (a + 1) / 2 + b; the square root may be off by one either way.
        k = tile - tl.load(first_tile_ptr + sample)
        a = ((tl.sqrt(8.0 * k.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
        a = tl.where((a + 1) * (a + 2) // 2 <= k, a + 1, a)
        a = tl.where(a * (a + 1) // 2 > k, a - 1, a)
        b = k - a * (a + 1) // 2

        in_a = a * BLOCK_T + tl.arange(0, BLOCK_T)
        in_b = b * BLOCK_T + tl.arange(0, BLOCK_T)
        row_a = tl.load(supervised_ptr + first_row + in_a, mask=in_a < n, other=0).to(tl.int64)
        row_b = tl.load(supervised_ptr + first_row + in_b, mask=in_b < n, other=0).to(tl.int64)
        gram_d = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        gram_h = tl.zeros([BLOCK_T, BLOCK_T], tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            d_a = _load_tile(d_hidden_ptr, row_a, in_a < n, start, hidden_size, BLOCK_H, UPCAST)
            d_b = _load_tile(d_hidden_ptr, row_b, in_b < n, start, hidden_size, BLOCK_H, UPCAST)
            gram_d = tl.dot(d_a, tl.trans(d_b), gram_d, input_precision=PRECISION)
            h_a = _load_tile(hidden_ptr, row_a, in_a < n, start, hidden_size, BLOCK_H, UPCAST)
            h_b = _load_tile(hidden_ptr, row_b, in_b < n, start, hidden_size, BLOCK_H, UPCAST)
            gram_h = tl.dot(h_a, tl.trans(h_b), gram_h, input_precision=PRECISION)
        times = tl.where(a == b, 1.0, 2.0)
        tl.store(partial_ptr + tile, times * tl.sum(gram_d * gram_h))


class GramLaunch(NamedTuple):
    """Launch configuration for one element size."""

    block_t: int
    """Tokens a side of a tile."""
    block_h: int
    """Columns of the hidden states an iteration."""
    block_s: int
    """Samples an iteration of the search for a tile's sample."""
    num_warps: int
    num_stages: int
    num_programs: int
    """Programs at most: as many as the card holds at once."""


# By card and bytes an element. sm_90 in 16 bits by benchmarks/tune_kernels.py on an H200; the others are guesses.
LAUNCH = {
    ("sm_80", 2): GramLaunch(64, 64, 256, 4, 3, 2 * 108),  # A100
    ("sm_80", 4): GramLaunch(64, 16, 256, 8, 2, 108),
    ("sm_90", 2): GramLaunch(128, 64, 256, 8, 3, 132),  # H100, H200
    ("sm_90", 4): GramLaunch(64, 32, 256, 8, 2, 132),
    ("sm_100", 2): GramLaunch(128, 64, 256, 8, 3, 148),  # B200
    ("sm_100", 4): GramLaunch(64, 32, 256, 8, 2, 148),
    ("interpreter", 2): GramLaunch(4, 16, 4, 1, 1, 3),
    ("interpreter", 4): GramLaunch(4, 16, 4, 1, 1, 3),
}


def gram_launch(hidden: Tensor) -> GramLaunch:
    """The launch configuration for `hidden`; `block_t` decides how `sample_tiles` counts."""
    return LAUNCH[card(hidden.device), hidden.element_size()]


def sample_gram(
    hidden: Tensor, d_hidden: Tensor, supervised: Tensor, first_row: Tensor, first_tile: Tensor, partial: Tensor
) -> None:
    """Fills `partial` with what each Gram tile adds to the G_i of its sample.

    Args:
        hidden: [T, H] fp32, bf16 or fp16, contiguous.
        d_hidden: [T, H] in the dtype of `hidden`, contiguous: gradient of each token's nll at its hidden state.
        supervised: [T] int32 from `token_scan`.
        first_row: [S + 1] int32 from `sample_tiles`.
        first_tile: [S + 1] int32 from `sample_tiles`.
        partial: [at least the number of tiles] fp32, written.

    Determinism: bitwise.
    """
    launch = gram_launch(hidden)
    _sample_gram_kernel[(min(launch.num_programs, partial.shape[0]),)](
        hidden,
        d_hidden,
        supervised,
        first_row,
        first_tile,
        partial,
        first_tile.shape[0] - 1,
        hidden.shape[1],
        PRECISION="tf32x3",
        UPCAST=card(hidden.device) == "interpreter",  # which multiplies the bit patterns of bf16 as integers
        BLOCK_T=launch.block_t,
        BLOCK_H=launch.block_h,
        BLOCK_S=launch.block_s,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
