"""Which row of the launch tables serves a device, and how many token rows one chunk of logits holds.

Every launch table has the rows "sm_80", "sm_90", "sm_100" and "interpreter". "sm_80" also serves the cards without a
row of their own (sm_86, sm_89, sm_120), so it stays within their 99 KiB of shared memory a block. "interpreter" has
blocks so small that tests with small shapes cross block borders.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

_ROW = {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


class RowLaunch(NamedTuple):
    """Launch configuration of a kernel that walks over rows."""

    block: int
    """Columns an iteration."""
    num_warps: int


class Chunking(NamedTuple):
    """How the token rows are cut. Read from this table alone, never from free memory, so that results reproduce."""

    num_sms: int
    """Streaming multiprocessors."""
    tile: tuple[int, int]
    """Rows and columns of the output tile that the GEMM library prefers for delta @ W."""
    frozen_bytes: int
    """Logits of a chunk at most, without dW."""
    trained_bytes: int
    """Logits of a chunk at most, with dW: each further accumulation reads and writes all of dW once more."""


# The bytes of sm_90 by benchmarks/tune_kernels.py on an H200; the rest are guesses.
CHUNKING = {
    "sm_80": Chunking(108, (128, 256), 1 << 30, 4 << 30),  # A100
    "sm_90": Chunking(132, (128, 256), 1 << 30, 4 << 30),  # H100, H200
    "sm_100": Chunking(148, (128, 256), 1 << 30, 4 << 30),  # B200
    "interpreter": Chunking(4, (8, 32), 1 << 12, 1 << 13),
}


@cache
def card(device: torch.device) -> str:
    """The row of the launch tables for `device`; CPU tensors are served by Triton's interpreter."""
    if device.type != "cuda":
        return "interpreter"
    return _ROW.get(torch.cuda.get_device_capability(device), "sm_80")


def padded_row(vocab: int) -> int:
    """Row stride of a logits chunk, in elements: whole 128-byte lines, so that rows stay aligned for any V."""
    return -(-vocab // 64) * 64


@cache
def chunk_rows(num_rows: int, hidden_size: int, vocab: int, itemsize: int, card: str, trained: bool) -> int:
    """Token rows a chunk of logits.

    All rows where they fit the byte limit; otherwise, of the multiples of the tile height between half the limit and
    the limit, the one with which delta @ W takes the fewest waves of tiles over all chunks, the largest of equals.

    Args:
        num_rows: T.
        hidden_size: H.
        vocab: V.
        itemsize: bytes of a logit.
        card: row of `CHUNKING`.
        trained: whether dW is computed.
    """
    num_sms, (tile_rows, tile_cols), frozen_bytes, trained_bytes = CHUNKING[card]
    limit = (trained_bytes if trained else frozen_bytes) // (padded_row(vocab) * itemsize)
    if num_rows <= limit:
        return num_rows
    most = max(limit // tile_rows, 1)
    tiles_across = -(-hidden_size // tile_cols)

    def waves_of_one(rows: int) -> int:
        return -(-(-(-rows // tile_rows) * tiles_across) // num_sms)

    def waves_of_all(rows: int) -> int:
        full, rest = divmod(num_rows, rows)
        return full * waves_of_one(rows) + waves_of_one(rest)

    return min((tiles * tile_rows for tiles in range(most, most // 2, -1)), key=waves_of_all)
