"""One packed forward pass over the pool: difficulty, first utility, lengths and prompt embeddings (section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lead_fast.models import PackedModel, forward_replaced
from lead_fast.packing import PackedBatch, Sample, pack
from lead_fast.ranks import Ranks

EMBEDDING_SIZE = 128
# Below this mean nll (nats) the answer alone is known by heart and its ratio says nothing: D = 1.
_ALONE_FLOOR = 1e-3
_IDLE = [Sample(np.zeros(2, np.int64), np.array([False, True]), np.ones(2, bool))]


@dataclass(frozen=True)
class Scores:
    """Per row of the pool.

    Attributes:
        utility: L(answer | prompt), the first utility, fp32 [N]; NaN where no answer token is left within `max_length`.
        difficulty: L(answer | prompt) / L(answer alone) (IFD), fp32 [N]; above 1 the prompt does not help.
        num_tokens: tokens of the packed sample, int32 [N].
        embedding: mean of the prompt's last hidden states, randomly projected, fp16 [N, 128].
        tokens: all tokens of the pass, answers alone included.
    """

    utility: np.ndarray
    difficulty: np.ndarray
    num_tokens: np.ndarray
    embedding: np.ndarray
    tokens: int

    @classmethod
    def merge(cls, parts: Sequence[Scores]) -> Scores:
        """Of rows dealt round robin, the scores of each share."""
        merged: dict[str, Any] = {}
        for name in ("utility", "difficulty", "num_tokens", "embedding"):
            columns = [getattr(part, name) for part in parts]
            merged[name] = np.empty((sum(map(len, columns)), *columns[0].shape[1:]), columns[0].dtype)
            for number, column in enumerate(columns):
                merged[name][number :: len(parts)] = column
        return cls(**merged, tokens=sum(part.tokens for part in parts))


@torch.no_grad()
def score_pool(
    model: PackedModel, samples: Iterable[Sample], num_rows: int, *, pack_tokens: int, device: torch.device, seed: int,
    quiet: bool = False, autocast: Callable[[], AbstractContextManager[Any]] = nullcontext, together: Ranks | None = None,
) -> Scores:  # fmt: skip
    """Scores every sample; each brings two sequences into the same batch, [prompt answer] and [answer].

    Args:
        model: the warm-up model; put into evaluation mode.
        samples: the pool, in row order.
        num_rows: N.
        pack_tokens: tokens of a forward pass.
        seed: of the embedding's projection.
        quiet: no bar.
        autocast: the precision that training has.
        together: the processes that hold shards of the model, each of which must take part in every forward pass.
    """
    model.eval()
    size = model.causal_lm.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(size, EMBEDDING_SIZE, generator=generator).to(device) / EMBEDDING_SIZE**0.5
    utility, alone, num_tokens, embedding, tokens = [], [], [], [], 0
    with tqdm(total=num_rows, desc="scoring the pool", unit="row", delay=2, disable=quiet) as bar:
        for pairs in _taking_part(_paired_batches(samples, pack_tokens), together):
            batch = pack(pairs or _IDLE).to(device)
            # As a call of the whole model: what shards weights gathers them for that.
            with autocast(), forward_replaced(model, model.scored):
                hidden, samples_out = model(batch)
            if pairs is None:
                continue
            # A sample cut so far that no answer token is left has no loss: NaN, and the row is set aside.
            loss = torch.where(samples_out.num_tokens > 0, samples_out.loss, torch.nan).float().cpu()
            utility.append(loss[0::2])
            alone.append(loss[1::2])
            num_tokens += [len(s) for s in pairs[0::2]]
            embedding.append((_prompt_means(hidden, pairs, batch) @ projection).half().cpu())
            tokens += batch.num_tokens
            bar.update(len(pairs) // 2)
    first, second = torch.cat([torch.zeros(0), *utility]), torch.cat([torch.zeros(0), *alone])
    embedding.append(torch.zeros(0, EMBEDDING_SIZE, dtype=torch.half))
    difficulty = torch.where(second <= _ALONE_FLOOR, 1.0, first / second.clamp_min(_ALONE_FLOOR))
    return Scores(first.numpy(), difficulty.numpy(), np.array(num_tokens, np.int32), torch.cat(embedding).numpy(), tokens)


def _taking_part(batches: Iterator[list[Sample]], together: Ranks | None) -> Iterator[list[Sample] | None]:
    """The batches, and then None as long as another process has one."""
    if together is None:
        yield from batches
        return
    while True:
        batch = next(batches, None)
        if not together.any(batch is not None):
            return
        yield batch


def _paired_batches(samples: Iterable[Sample], capacity: int) -> Iterator[list[Sample]]:
    """[s0, s0 alone, s1, s1 alone, ...] in batches of at most `capacity` tokens, or one pair."""
    batch: list[Sample] = []
    used = 0
    for sample in samples:
        pair = [sample, sample.alone()]
        tokens = len(pair[0]) + len(pair[1])
        if batch and used + tokens > capacity:
            yield batch
            batch, used = [], 0
        batch += pair
        used += tokens
    if batch:
        yield batch


def _prompt_means(hidden: Tensor, pairs: list[Sample], batch: PackedBatch) -> Tensor:
    """Mean last hidden state of each full sample's prompt tokens, fp32 [R, H]."""
    supervised = torch.from_numpy(np.concatenate([s.supervised for s in pairs])).to(hidden.device)
    lengths = batch.cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(pairs), device=hidden.device), lengths)
    weight = (~supervised).float()
    sums = hidden.new_zeros(len(pairs), hidden.shape[1], dtype=torch.float32)
    sums.index_add_(0, sequence, hidden.float() * weight[:, None])
    counts = torch.zeros(len(pairs), device=hidden.device).index_add_(0, sequence, weight)
    return (sums / counts.clamp_min(1.0)[:, None])[0::2]
