"""What a model would be trained on, to be read before anything is trained (`lead-fast train --show-batch`)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.loading import load_tokenizer
from lead_fast.offline.prepare import PREPARED_FILE, encoded_rows, load_prepared
from lead_fast.optimization import step_batches
from lead_fast.packing import ChatEncoder, ConversationError, PackedBatch, Sample
from lead_fast.pool import Pool

# Rows of a raw pool that are tokenized to fill one batch.
_RAW_ROWS = 256
_GREEN, _BOLD, _PLAIN = "\x1b[32m", "\x1b[1m", "\x1b[0m"
_ESCAPES = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t", "\x1b": "\\e"})


def show_batch(config: TrainConfig, lead: LeadConfig, *, color: bool) -> tuple[str, dict[str, Any]]:
    """The first packed batch as text: of a prepared pool that of round 1, of a raw pool its first rows.

    Nothing is written, no model is loaded.

    Args:
        config: pool, model (for a raw pool), lengths, accumulation.
        lead: how the first round chooses.
        color: mark supervised tokens by colour, too.

    Returns:
        The text, and a JSON summary.

    Raises:
        ValueError: no pool, or no tokenizer: that of a model built by `model_config` is trained with it.
    """
    if config.pool is None:
        raise ValueError("pool: required")
    if (Path(config.pool) / PREPARED_FILE).exists():
        prepared = load_prepared(Path(config.pool))
        pool, encoder, title = prepared.pool, prepared.encoder(config), "first batch of round 1"
        rows = _first_round(pool, lead)
    elif config.model is not None:
        on_bad_row: Any = config.on_bad_row
        pool = Pool.open(config.pool, on_bad_row=on_bad_row)
        encoder = ChatEncoder(load_tokenizer(config.model, trust_remote_code=config.trust_remote_code), config.max_length)
        rows, title = list(range(min(_RAW_ROWS, len(pool)))), "first rows of the pool, which is not prepared"
        if config.on_bad_row == "skip":
            errors = list[ConversationError]()
            list(encoder.encode(pool.iter_messages(rows), errors=errors))
            left_out = {error.number for error in errors}
            rows = [row for row in rows if row not in left_out]
    else:
        raise ValueError("show_batch: expected a prepared pool or --model, whose tokenizer is there already")
    samples = encoded_rows(encoder, pool, rows)
    batch = step_batches(samples, rows, config)[0][0]
    lines = [f"{title}: {len(batch)} samples, {batch.num_tokens} tokens, {batch.num_items} supervised (marked *)"]
    for number, (start, end) in enumerate(zip(batch.cu_seqlens.tolist(), batch.cu_seqlens.tolist()[1:], strict=False)):
        row = int(batch.rows[number])
        head = f"sample {number + 1}: row {row}, id {pool.id(row)!r}, tokens {start}-{end - 1}{_cuts(samples[number])}"
        lines += ["", f"{_BOLD}{head}{_PLAIN}" if color else head, *_runs(batch, start, end, encoder.tokenizer, color)]
    summary = {"rows": batch.rows.tolist(), "tokens": batch.num_tokens, "supervised_tokens": batch.num_items}
    return "\n".join(lines), summary


def _first_round(pool: Pool, lead: LeadConfig) -> list[int]:
    engine = LeadEngine(pool, lead)
    engine.track([torch.zeros(1)])  # before any training no estimator has a change of weights to follow
    rnd = engine.begin_round()
    assert rnd is not None  # an engine is not made without a row to choose
    return rnd.rows.tolist()


def _cuts(sample: Sample) -> str:
    parts = [(sample.cut_prompt, "the prompt's start"), (sample.cut_answer, "the answer's end")]
    return "".join(f", {count} tokens of {what} cut" for count, what in parts if count)


def _runs(batch: PackedBatch, start: int, end: int, tokenizer: Any, color: bool) -> Iterator[str]:
    """A line for each run of tokens that are, or are not, targets of the loss: position ids, mark, tokens parted by |."""
    ids, positions = batch.input_ids.tolist(), batch.position_ids.tolist()
    # labels[t] is the target of position t: token t + 1.
    target = [t > start and int(batch.labels[t - 1]) == ids[t] for t in range(start, end)]
    width = len(str(batch.max_length))
    for supervised, run in groupby(range(start, end), key=lambda t: target[t - start]):
        tokens = list(run)
        text = "|".join(tokenizer.decode([ids[t]]).translate(_ESCAPES) for t in tokens)
        where = f"{positions[tokens[0]]:>{width}}-{positions[tokens[-1]]:<{width}}"
        line = f"  {where} {'*' if supervised else ' '} {text}"
        yield f"{_GREEN}{line}{_PLAIN}" if color and supervised else line
