"""Losses of rows that are not trained on now: the held-out set, and rows of the pool that an audit looks at again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lead_fast.auditor import Scorer
from lead_fast.config import TrainConfig
from lead_fast.loading import load_tokenizer
from lead_fast.offline.prepare import Prepared, encoded_rows
from lead_fast.optimization import Optimization, TrainingError, evaluate
from lead_fast.packing import ChatEncoder, Sample
from lead_fast.pool import Pool

logger = logging.getLogger(__name__)


def scored_rows(heldout: Pool, config: TrainConfig, seed: int) -> np.ndarray:
    """The rows of the held-out set that are scored: all, or `heldout_rows` random ones."""
    if not config.heldout_rows or len(heldout) <= config.heldout_rows:
        return np.arange(len(heldout))
    return np.sort(np.random.default_rng([seed, 3]).permutation(len(heldout))[: config.heldout_rows])


def check_heldout(heldout: Pool | None, inputs: Prepared | Pool, config: TrainConfig, seed: int) -> None:
    """Renders the held-out rows once, before hours of preparation.

    Raises:
        ValueError: one that the chat template refuses. A tokenizer that is yet to be trained has a template that refuses none.
    """
    if heldout is None or (isinstance(inputs, Pool) and config.model is None):
        return
    if isinstance(inputs, Prepared):
        encoder = inputs.encoder(config)
    else:
        tokenizer = load_tokenizer(str(config.model), trust_remote_code=config.trust_remote_code)
        encoder = ChatEncoder(tokenizer, config.max_length)
    encoded_rows(encoder, heldout, scored_rows(heldout, config, seed), name="heldout")


def heldout_scorer(
    optimization: Optimization, encoder: ChatEncoder, heldout: Pool | None, config: TrainConfig, seed: int
) -> Callable[[], dict[str, Any]] | None:
    """A function that scores the held-out rows now: mean over samples and over tokens, and by source."""
    if heldout is None:
        return None
    rows = scored_rows(heldout, config, seed)
    samples: list[Sample] = encoded_rows(encoder, heldout, rows, name="heldout")
    tokens = torch.tensor([float(s.supervised[1:].sum()) for s in samples])

    def score() -> dict[str, Any]:
        loss = evaluate(
            optimization.packed, samples, pack_tokens=config.pack_tokens, device=optimization.device, desc="held-out",
            ranks=optimization.ranks,
        )  # fmt: skip
        finite = torch.isfinite(loss)
        if not finite.all():
            first = heldout.id(int(rows[int((~finite).nonzero()[0])]))
            logger.warning("%d of %d held-out rows have no finite loss, and count in no mean; the first is %r",
                           int((~finite).sum()), len(loss), first)  # fmt: skip
        if not finite.any():
            raise TrainingError("no held-out row has a finite loss; look at the model, or use --precision fp32")
        scores: dict[str, Any] = {
            "heldout_loss": float(loss[finite].mean()),
            "heldout_token_loss": float((loss * tokens)[finite].sum() / tokens[finite].sum()),
        }
        if heldout.sources is not None:
            source = torch.from_numpy(heldout.sources[rows].astype(np.int64)).masked_fill(~finite, -1)
            scores["by_source"] = {
                name: float(loss[source == k].mean()) for k, name in enumerate(heldout.source_names) if (source == k).any()
            }
        return scores

    return score


def row_scorer(optimization: Optimization, encoder: ChatEncoder, pool: Pool, config: TrainConfig) -> Scorer:
    """A function that scores rows of the pool now: each row's mean nll per supervised token, and the tokens that it took."""

    def score(rows: Sequence[int]) -> tuple[torch.Tensor, int]:
        samples: list[Sample] = encoded_rows(encoder, pool, rows)
        loss = evaluate(
            optimization.packed, samples, pack_tokens=config.pack_tokens, device=optimization.device, desc="audit",
            ranks=optimization.ranks,
        )  # fmt: skip
        return loss, sum(map(len, samples))

    return score
