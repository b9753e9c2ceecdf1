"""The tables that cut the work: chunks of token rows, and the bounds on numbers of tiles. Plain Python, no GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lead_fast.kernels.card import CHUNKING, card, chunk_rows, padded_row
from lead_fast.kernels.sample_tiles import most_gram_tiles, most_outer_tiles

CARDS = ["sm_80", "sm_90", "sm_100"]


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "tokens, hidden_size, vocab",
    [(8192, 4096, 128256), (8192, 2304, 256000), (8192, 2048, 151936), (16384, 5120, 32000), (100, 8, 50257)],
)
def test_chunks_stay_within_their_bytes_and_fill_tiles(tokens, hidden_size, vocab, trained, name):
    rows = chunk_rows(tokens, hidden_size, vocab, 2, name, trained)
    limit = CHUNKING[name].trained_bytes if trained else CHUNKING[name].frozen_bytes
    assert rows == tokens or rows % CHUNKING[name].tile[0] == 0
    assert rows * padded_row(vocab) * 2 <= limit
    assert rows == tokens or 2 * (rows + 128) * padded_row(vocab) * 2 > limit, "at least about half of what is allowed"


@pytest.mark.parametrize("name", CARDS)
def test_a_trained_head_takes_one_chunk_where_the_logits_fit_in_4_gib(name):
    assert chunk_rows(8192, 4096, 128256, 2, name, True) == 8192
    assert chunk_rows(16384, 5120, 32000, 2, name, True) == 16384
    assert chunk_rows(8192, 2304, 256000, 2, name, True) == 8192
    assert chunk_rows(8192, 2304, 256000, 4, name, True) < 8192


def test_the_chunk_takes_the_fewest_waves():
    # On 132 processors a row of tiles is 4 wide: 33 tile rows fill a wave, 32 and 34 do not.
    tokens, limit_rows = 66 * 128, 40 * 128
    vocab = CHUNKING["sm_90"].frozen_bytes // limit_rows // 2 // 64 * 64
    assert chunk_rows(tokens, 1024, vocab, 2, "sm_90", False) == 33 * 128


@pytest.mark.parametrize("tokens", [0, 1, 127, 129])
def test_short_batches_are_one_chunk(tokens):
    assert chunk_rows(tokens, 64, 1000, 2, "sm_90", False) == tokens


def test_a_row_larger_than_the_limit_is_still_served():
    assert chunk_rows(300, 64, 1 << 31, 2, "sm_90", False) == 128


def test_rows_are_padded_to_whole_lines():
    assert [padded_row(vocab) for vocab in (1, 64, 65, 50257, 128256)] == [64, 64, 128, 50304, 128256]


def test_the_cpu_is_served_by_the_interpreter():
    assert card(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize("side", [1, 4, 64])
@pytest.mark.parametrize("hidden_size", [3, 100])
def test_no_batch_has_more_tiles_than_are_allocated(side, hidden_size):
    generator = torch.Generator().manual_seed(0)
    tiles_of_a_matrix = (-(-hidden_size // side)) ** 2
    for _ in range(200):
        samples = int(torch.randint(1, 9, (), generator=generator))
        most = [1, hidden_size, 3 * hidden_size][int(torch.randint(3, (), generator=generator))]
        lengths = torch.randint(0, most + 1, (samples,), generator=generator).tolist()
        tokens = sum(lengths)
        sides = [-(-n // side) for n in lengths if n <= hidden_size]
        grams = sum(q * (q + 1) // 2 for q in sides)
        outers = sum(tiles_of_a_matrix for n in lengths if n > hidden_size)
        assert grams <= most_gram_tiles(tokens, samples, hidden_size, side)
        assert outers <= most_outer_tiles(tokens, hidden_size, tiles_of_a_matrix)
