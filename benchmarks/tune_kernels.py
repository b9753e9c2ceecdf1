"""Times launch configurations of the Triton kernels on this card: where the numbers in their launch tables come from.

    python benchmarks/tune_kernels.py [--processes 8]      prints a table a kernel, the configuration in use first

Every candidate is compiled first, by several processes into Triton's cache on disk; then each is timed alone: median of
CUDA events. Of single kernels the inputs are written anew, or L2 is flushed, before each call; chunks and the single pass are
timed on whole calls of the loss, which are far larger than L2. Beside the milliseconds stand the bytes that the kernel must
move, over the time, or the products that it must take.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from lead_fast.kernels import (
    card,
    hidden_rows,
    linear_cross_entropy,
    logit_rows,
    sample_gram,
    sample_outer,
    single_pass_rows,
    weighted_rows,
)
from lead_fast.kernels.token_scan import token_scan

TOKENS, HIDDEN, VOCAB = 8192, 4096, 128256
OPTIONS: dict[str, Any] = {"ignore_index": -100, "softcap": 0.0, "logit_scale": 1.0}
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}
F32 = {"dtype": torch.float32, "device": "cuda"}


@dataclass(frozen=True)
class Trial:
    """One kernel at one shape: what is restored before a call, the call, and what it must move and multiply."""

    restore: Callable[[], object]
    call: Callable[[], object]
    num_bytes: float = 0.0
    flops: float = 0.0


def median_ms(trial: Trial, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        trial.restore()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        trial.call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[1:])[repeats // 2]


def logits_trial(single_pass: bool) -> Trial:
    rows = card.chunk_rows(TOKENS, HIDDEN, VOCAB, 2, card.card(torch.device("cuda", 0)), False)
    source = torch.randn(rows, card.padded_row(VOCAB), **BF16)
    logits = torch.empty_like(source)
    labels = torch.randint(VOCAB, (rows,), device="cuda")
    nll, delta_sq = torch.empty(2, rows, **F32)
    taken = logits[:, :VOCAB]
    rows_by: Any = single_pass_rows.single_pass_rows if single_pass else partial(logit_rows.logit_rows, write_delta=True)
    call = partial(rows_by, taken, labels, nll, delta_sq, **OPTIONS)
    return Trial(partial(logits.copy_, source), call, num_bytes=2 * rows * VOCAB * 2)


def hidden_trial() -> Trial:
    product_, weight = torch.randn(TOKENS, HIDDEN, **F32), torch.randn(1024, HIDDEN, **BF16)
    labels = torch.randint(1024, (TOKENS,), device="cuda")
    d_hidden, d_sq = torch.empty(TOKENS, HIDDEN, **BF16), torch.empty(TOKENS, **F32)
    flush = torch.empty(1 << 28, **F32)
    return Trial(
        flush.zero_,
        lambda: hidden_rows.hidden_rows(product_, labels, d_hidden, d_sq, weight, None, ignore_index=-100),
        num_bytes=6 * TOKENS * HIDDEN,
    )


def weighted_trial() -> Trial:
    hidden, weighted = torch.randn(TOKENS, HIDDEN, **BF16), torch.empty(TOKENS, HIDDEN, **BF16)
    labels = torch.randint(1024, (TOKENS,), device="cuda")
    scale, nll = torch.rand(2, TOKENS, **F32)
    logits = torch.empty(TOKENS, 1024, **BF16)
    flush = torch.empty(1 << 28, **F32)
    return Trial(
        flush.zero_,
        lambda: weighted_rows.weighted_rows(hidden, labels, scale, None, weighted, logits, nll, ignore_index=-100),
        num_bytes=4 * TOKENS * HIDDEN,
    )


def stats_trial(sample: int, hidden_size: int = HIDDEN) -> Trial:
    """All statistics of samples of `sample` tokens: Gram tiles up to `hidden_size` tokens, outer ones beyond."""
    tokens = max(TOKENS, sample)
    hidden, d_hidden = torch.randn(2, tokens, hidden_size, **BF16)
    labels = torch.randint(VOCAB, (tokens,), device="cuda")
    cu_seqlens = torch.tensor([*range(0, tokens, sample), tokens], device="cuda")
    nll, scale, delta_sq, d_sq = torch.rand(4, tokens, **F32)
    before = torch.empty(tokens + 1, dtype=torch.int32, device="cuda")
    supervised = torch.empty(tokens, dtype=torch.int32, device="cuda")
    loss, bad = torch.empty((), **F32), labels.new_empty(())
    token_scan(labels, nll, scale, before, supervised, loss, bad, vocab=VOCAB, ignore_index=-100)
    stats = torch.empty(len(cu_seqlens) - 1, 5, **F32)
    flush = torch.empty(1 << 28, **F32)
    norms = (delta_sq, d_sq, d_hidden)
    fill = linear_cross_entropy._fill_sample_stats
    per_token = 2 * min(sample, hidden_size) * hidden_size if sample <= hidden_size else 2 * hidden_size**2
    return Trial(
        flush.zero_,
        lambda: fill(hidden, cu_seqlens, nll, norms, before, supervised, stats),
        flops=float(tokens * per_token),
    )


def loss_trial(trained: bool, single_pass: bool) -> Trial:
    hidden, weight = torch.randn(TOKENS, HIDDEN, **BF16), torch.randn(VOCAB, HIDDEN, **BF16) / HIDDEN**0.5
    labels = torch.randint(VOCAB, (TOKENS,), device="cuda")
    cu_seqlens = torch.arange(0, TOKENS + 1, 512, device="cuda")
    scale = torch.full((TOKENS,), 1 / TOKENS, **F32)
    return Trial(
        lambda: None,
        lambda: linear_cross_entropy.linear_cross_entropy(
            hidden, weight, None, labels, cu_seqlens, scale, -100, 0.0, 1.0, True, trained, False, 2, single_pass=single_pass
        ),
        flops=(6.0 if trained else 4.0) * TOKENS * HIDDEN * VOCAB,
    )


@dataclass(frozen=True)
class Search:
    """A launch table's entry, what to try in its place, and where."""

    name: str
    table: dict[Any, Any]
    key: Any
    candidates: list[Any]
    trial: Callable[[], Trial]


def searches() -> Iterator[Search]:
    row = card.card(torch.device("cuda", 0))
    wide = [logit_rows.LogitLaunch(b, w) for b, w in product((8192, 16384, 32768, 65536), (8, 16, 32)) if b // w >= 512]
    yield Search("logit_rows", logit_rows.LAUNCH, row, wide, partial(logits_trial, False))
    yield Search("single_pass_rows", single_pass_rows.LAUNCH, row, wide, partial(logits_trial, True))
    narrow = [card.RowLaunch(b, w) for b, w in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16))]
    yield Search("hidden_rows", hidden_rows.LAUNCH, row, narrow, hidden_trial)
    yield Search("weighted_rows", weighted_rows.LAUNCH, row, narrow, weighted_trial)
    sms = card.CHUNKING[row].num_sms
    grams = [
        sample_gram.GramLaunch(t, h, 256, w, s, n * sms)
        for (t, h, w, s), n in product(
            ((128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4),
             (64, 128, 4, 3), (64, 128, 8, 3), (64, 64, 8, 3)), (1, 2)
        )
    ]  # fmt: skip
    for sample in (200, 512, 2048):
        name = f"sample_gram, {sample} tokens a sample"
        yield Search(name, sample_gram.LAUNCH, (row, 2), grams, partial(stats_trial, sample))
    outers = [
        sample_outer.OuterLaunch(c, t, 256, w, s, n * sms)
        for (c, t, w, s), n in product(
            ((128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3)), (1, 2)
        )
    ]
    for tokens, hidden in ((8192, 4096), (8192, 2304)):
        name = f"sample_outer, {tokens} tokens, H = {hidden}"
        yield Search(name, sample_outer.LAUNCH, (row, 2), outers, partial(stats_trial, tokens, hidden))
    now = card.CHUNKING[row]
    for trained, single in product((False, True), (False, True)):
        field = "trained_bytes" if trained else "frozen_bytes"
        chunks = [now._replace(**{field: 1 << bits}) for bits in (range(29, 34) if trained else range(26, 32))]
        name = f"chunks, {'trained' if trained else 'frozen'} head, {'single pass' if single else 'two passes'}"
        yield Search(name, card.CHUNKING, row, chunks, partial(loss_trial, trained, single))


def with_entry(search: Search, candidate: Any, run: Callable[[], Any]) -> Any:
    before = search.table[search.key]
    search.table[search.key] = candidate
    card.chunk_rows.cache_clear()
    try:
        return run()
    finally:
        search.table[search.key] = before
        card.chunk_rows.cache_clear()


def compile_share(share: int, shares: int) -> None:
    """Compiles every `shares`-th candidate; one that the card refuses is left to the timing to name."""
    number = 0
    for search in searches():
        trial = None
        for candidate in search.candidates:
            number += 1
            if number % shares == share:
                trial = trial or search.trial()
                try:
                    with_entry(search, candidate, trial.call)
                except Exception as error:
                    print(f"{search.name} {candidate}: {error}", file=sys.stderr)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def time_all(repeats: int) -> None:
    for search in searches():
        trial = search.trial()
        current = search.table[search.key]
        print(f"\n{search.name}")
        found = []
        for candidate in dict.fromkeys([current, *search.candidates]):
            try:
                ms = with_entry(search, candidate, partial(median_ms, trial, repeats))
            except Exception as error:
                print(f"  refused  {candidate}: {str(error).splitlines()[0]}")
                continue
            rate = f"{trial.num_bytes / ms / 1e9:6.2f} TB/s" if trial.num_bytes else f"{trial.flops / ms / 1e9:6.1f} TFLOP/s"
            found.append((candidate != current, ms, f"{ms:8.4f} ms  {rate}  {candidate}"))
        for other, _, line in sorted(found):
            print(f"  {line}{'' if other else '  in use'}")
        sys.stdout.flush()
        trial = None
        torch.cuda.empty_cache()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8, help="that compile")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--timed-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.share is not None:
        compile_share(arguments.share, arguments.processes)
        sys.exit()
    if not arguments.timed_only:
        compiling = [
            subprocess.Popen([sys.executable, __file__, "--processes", str(arguments.processes), "--share", str(share)])
            for share in range(arguments.processes)
        ]
        assert not any([process.wait() for process in compiling])
    time_all(arguments.repeats)
