"""How the work of G_i is cut: one list of tiles for all samples, so that a long sample is shared by the whole card.

Sample i with n_i supervised tokens, tiles of B tokens or C columns a side, q_i = ceil(n_i / B):

    n_i <= H:  q_i (q_i + 1) / 2 Gram tiles       `sample_gram`, n_i^2 H multiply-adds: half of two Gram matrices
    n_i >  H:  ceil(H / C)^2 outer tiles          `sample_outer`, n_i H^2 multiply-adds

Tiles are numbered through all samples; `first_gram[i]` and `first_outer[i]` are the numbers of the first tiles of
sample i, and entry S is the number of tiles in all. `find_sample` inverts that.

    symbol       shape      dtype
    cu_seqlens   [S + 1]    int32 or int64    tokens of sample i: cu[i] .. cu[i + 1] - 1
    before       [T + 1]    int32             from `token_scan`
    first_row    [S + 1]    int32             written: entries of `supervised` that belong to sample i
    first_gram   [S + 1]    int32             written
    first_outer  [S + 1]    int32             written

Determinism: bitwise; a single program.
Bytes moved: at most 36 * S.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .card import RowLaunch, card


@triton.jit
def find_sample(first_tile_ptr, tile, num_samples, BLOCK_S: tl.constexpr):
    """The sample that `tile` belongs to: the number of samples whose tiles all come before it."""
    count = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, num_samples, BLOCK_S):
        sample = start + tl.arange(0, BLOCK_S)
        inside = sample < num_samples
        end = tl.load(first_tile_ptr + 1 + sample, mask=inside, other=0)
        count += (inside & (end <= tile)).to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["num_samples", "num_tokens", "hidden_size", "tokens_per_tile", "tiles_per_outer"])
def _sample_tiles_kernel(
    cu_seqlens_ptr,  # [S + 1]
    before_ptr,  # [T + 1] int32
    first_row_ptr,  # [S + 1] int32
    first_gram_ptr,  # [S + 1] int32
    first_outer_ptr,  # [S + 1] int32
    num_samples,
    num_tokens,
    hidden_size,
    tokens_per_tile,
    tiles_per_outer,
    BLOCK: tl.constexpr,
):
    grams = 0
    outers = 0
    for start in range(0, num_samples, BLOCK):
        sample = start + tl.arange(0, BLOCK)
        inside = sample < num_samples
        # Bounds that do not fit the batch are reported elsewhere; clamped here, they cannot lead outside the arrays.
        begin = tl.load(cu_seqlens_ptr + sample, mask=inside, other=0).to(tl.int32)
        end = tl.load(cu_seqlens_ptr + sample + 1, mask=inside, other=0).to(tl.int32)
        begin = tl.minimum(tl.maximum(begin, 0), num_tokens)
        end = tl.minimum(tl.maximum(end, begin), num_tokens)
        row = tl.load(before_ptr + begin, mask=inside, other=0)
        row_end = tl.load(before_ptr + end, mask=inside, other=0)
        n = row_end - row
        side = tl.cdiv(n, tokens_per_tile)
        gram = tl.where(n <= hidden_size, side * (side + 1) // 2, 0)
        outer = tl.where(n > hidden_size, tiles_per_outer, 0)
        tl.store(first_row_ptr + sample, row, mask=inside)
        tl.store(first_row_ptr + sample + 1, row_end, mask=sample == num_samples - 1)
        tl.store(first_gram_ptr + sample, grams + tl.cumsum(gram, 0) - gram, mask=inside)
        tl.store(first_outer_ptr + sample, outers + tl.cumsum(outer, 0) - outer, mask=inside)
        grams += tl.sum(gram, axis=0)
        outers += tl.sum(outer, axis=0)
    tl.store(first_gram_ptr + num_samples, grams)
    tl.store(first_outer_ptr + num_samples, outers)


# Starting guesses, not yet measured on any card.
LAUNCH = {
    "sm_80": RowLaunch(1024, 4),  # A100
    "sm_90": RowLaunch(1024, 4),  # H100, H200
    "sm_100": RowLaunch(1024, 4),  # B200
    "interpreter": RowLaunch(4, 1),
}


def sample_tiles(
    cu_seqlens: Tensor,
    before: Tensor,
    first_row: Tensor,
    first_gram: Tensor,
    first_outer: Tensor,
    *,
    hidden_size: int,
    tokens_per_tile: int,
    tiles_per_outer: int,
) -> None:
    """Fills `first_row`, `first_gram` and `first_outer`.

    Args:
        cu_seqlens: [S + 1] int32 or int64.
        before: [T + 1] int32 from `token_scan`.
        first_row: [S + 1] int32, written.
        first_gram: [S + 1] int32, written.
        first_outer: [S + 1] int32, written.
        hidden_size: H.
        tokens_per_tile: rows and columns of a Gram tile.
        tiles_per_outer: tiles of [H, H].

    Determinism: bitwise.
    """
    block, num_warps = LAUNCH[card(cu_seqlens.device)]
    _sample_tiles_kernel[(1,)](
        cu_seqlens,
        before,
        first_row,
        first_gram,
        first_outer,
        cu_seqlens.shape[0] - 1,
        before.shape[0] - 1,
        hidden_size,
        tokens_per_tile,
        tiles_per_outer,
        BLOCK=block,
        num_warps=num_warps,
    )


def most_gram_tiles(num_tokens: int, num_samples: int, hidden_size: int, tokens_per_tile: int) -> int:
    """Gram tiles of any batch of this shape at most: sum_i q_i (q_i + 1) / 2 with q_i <= n_i / B + 1 and n_i <= H."""
    sides = num_tokens // tokens_per_tile + min(num_samples, num_tokens)
    longest = -(-min(num_tokens, hidden_size) // tokens_per_tile)
    return sides * (longest + 1) // 2 + 1


def most_outer_tiles(num_tokens: int, hidden_size: int, tiles_per_outer: int) -> int:
    """Outer tiles of any batch of this shape at most: only samples of more than H tokens have any."""
    return num_tokens // (hidden_size + 1) * tiles_per_outer
