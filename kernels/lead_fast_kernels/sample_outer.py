"""G_i of samples with more than H supervised tokens: the matrix itself, tile by tile.

    G_i = || D_i^T H_i ||_F^2      D_i, H_i [n_i, H]: rows d_t and h_t of the sample's supervised tokens

A tile is [BLOCK_C, BLOCK_C] of the [H, H] matrix, summed over all of the sample's tokens in registers; it leaves the
sum of its squares. Tiles of all samples form one list (`sample_tiles`), and the programs take every `num_programs`-th
of them.

    symbol       shape      dtype               meaning
    hidden       [T, H]     fp32, bf16, fp16    h_t
    d_hidden     [T, H]     dtype of hidden     d_t
    supervised   [T]        int32               positions of supervised tokens, from `token_scan`
    first_row    [S + 1]    int32               entries of `supervised` of each sample, from `sample_tiles`
    first_tile   [S + 1]    int32               first tile of each sample
    partial      [tiles]    fp32                written: what each tile adds to G_i

Accumulation: fp32 (products of fp32 inputs by three TF32 products).
Determinism: bitwise; each tile has its own place in `partial`, no atomics.
Bytes moved: 2 * n_i * BLOCK_C * itemsize a tile, mostly from L2.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .card import card
from .sample_tiles import find_sample


@triton.jit(do_not_specialize=["num_samples"])
def _sample_outer_kernel(
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
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    num_tiles = tl.load(first_tile_ptr + num_samples)
    tiles_across = tl.cdiv(hidden_size, BLOCK_C)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        sample = find_sample(first_tile_ptr, tile, num_samples, BLOCK_S)
        first_row = tl.load(first_row_ptr + sample)
        n = tl.load(first_row_ptr + sample + 1) - first_row
        k = tile - tl.load(first_tile_ptr + sample)
        d_cols = k // tiles_across * BLOCK_C + tl.arange(0, BLOCK_C)
        h_cols = k % tiles_across * BLOCK_C + tl.arange(0, BLOCK_C)
        product = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
        for start in range(0, n, BLOCK_T):
            token = start + tl.arange(0, BLOCK_T)
            inside = token < n
            row = tl.load(supervised_ptr + first_row + token, mask=inside, other=0).to(tl.int64)[:, None] * hidden_size
            d_mask = inside[:, None] & (d_cols < hidden_size)[None, :]
            h_mask = inside[:, None] & (h_cols < hidden_size)[None, :]
            d = tl.load(d_hidden_ptr + row + d_cols[None, :], mask=d_mask, other=0.0)
            h = tl.load(hidden_ptr + row + h_cols[None, :], mask=h_mask, other=0.0)
            if UPCAST:
                d = d.to(tl.float32)
                h = h.to(tl.float32)
            product = tl.dot(tl.trans(d), h, product, input_precision=PRECISION)
        tl.store(partial_ptr + tile, tl.sum(product * product))


class OuterLaunch(NamedTuple):
    """Launch configuration for one element size."""

    block_c: int
    """Columns of the hidden states a side of a tile."""
    block_t: int
    """Tokens an iteration."""
    block_s: int
    """Samples an iteration of the search for a tile's sample."""
    num_warps: int
    num_stages: int
    num_programs: int
    """Programs at most: as many as the card holds at once."""


# By card and bytes an element. sm_90 in 16 bits by benchmarks/tune_kernels.py on an H200; the others are guesses.
LAUNCH = {
    ("sm_80", 2): OuterLaunch(128, 64, 256, 8, 3, 108),  # A100
    ("sm_80", 4): OuterLaunch(64, 32, 256, 8, 2, 108),
    ("sm_90", 2): OuterLaunch(128, 64, 256, 8, 3, 264),  # H100, H200
    ("sm_90", 4): OuterLaunch(64, 32, 256, 8, 2, 132),
    ("sm_100", 2): OuterLaunch(128, 64, 256, 8, 3, 148),  # B200
    ("sm_100", 4): OuterLaunch(64, 32, 256, 8, 2, 148),
    ("interpreter", 2): OuterLaunch(4, 8, 4, 1, 1, 3),
    ("interpreter", 4): OuterLaunch(4, 8, 4, 1, 1, 3),
}


def outer_launch(hidden: Tensor) -> OuterLaunch:
    """The launch configuration for `hidden`; `block_c` decides how `sample_tiles` counts."""
    return LAUNCH[card(hidden.device), hidden.element_size()]


def sample_outer(
    hidden: Tensor, d_hidden: Tensor, supervised: Tensor, first_row: Tensor, first_tile: Tensor, partial: Tensor
) -> None:
    """Fills `partial` with what each outer tile adds to the G_i of its sample.

    Args:
        hidden: [T, H] fp32, bf16 or fp16, contiguous.
        d_hidden: [T, H] in the dtype of `hidden`, contiguous: gradient of each token's nll at its hidden state.
        supervised: [T] int32 from `token_scan`.
        first_row: [S + 1] int32 from `sample_tiles`.
        first_tile: [S + 1] int32 from `sample_tiles`.
        partial: [at least the number of tiles] fp32, written.

    Determinism: bitwise.
    """
    launch = outer_launch(hidden)
    _sample_outer_kernel[(min(launch.num_programs, partial.shape[0]),)](
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
        BLOCK_C=launch.block_c,
        BLOCK_T=launch.block_t,
        BLOCK_S=launch.block_s,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
