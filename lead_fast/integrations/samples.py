"""Where a host trainer's samples come from: the pool's own text, or rows of the host's dataset through its collator."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lead_fast.packing import IGNORE_INDEX, ChatEncoder, ConversationError, CutCounts, Sample
from lead_fast.pool import Pool

logger = logging.getLogger(__name__)

# What collators may add to the tokens that packing writes anew for the whole batch.
_BOUNDARIES = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "shift_labels"})
_TOKENS = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})


class ChatSamples:
    """Samples of a pool with text, by the tokenizer's chat template; only assistant turns are supervised.

    Args:
        pool: with text.
        tokenizer: a fast tokenizer; one without a chat template gets the plain one.
        max_length: tokens of a sample; see `ChatEncoder`.

    Raises:
        ValueError: the pool has no text, or no row that the template renders, or the tokenizer is not fast.

    Attributes:
        pool: the same rows; those that the template does not render are set aside.
    """

    def __init__(self, pool: Pool, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        if not pool.has_text:
            raise ValueError("ChatSamples: `pool` must have text where there is no `train_dataset`, got arrays alone")
        self.encoder = ChatEncoder(tokenizer, max_length)
        rows, bad = np.flatnonzero(~pool.aside), dict[int, str]()
        errors = list[ConversationError]()
        # As a round will, which must not end with an error.
        longest = max(map(len, self.encoder.encode(pool.iter_messages(rows), errors=errors)), default=0)
        if pool.num_tokens is not None and len(rows) and longest > (said := int(np.asarray(pool.num_tokens)[rows].max())):
            logger.warning(
                "samples have up to %d tokens, and `pool.num_tokens` at most %d: `max_length` must be what the pool was "
                "prepared with, or its utilities are of shorter samples, got %d", longest, said, max_length,
            )  # fmt: skip
        self.encoder.cuts = CutCounts(max_length=max_length)
        for error in errors:
            bad[int(rows[error.number])] = error.reason
        if bad:
            row, reason = next(iter(bad.items()))
            text = (
                f"the chat template does not render {len(bad):,} of {len(pool):,} rows; the first is {pool.id(row)!r}: {reason}"
            )
            if len(bad) == len(rows):
                raise ValueError(f"ChatSamples: {text}")
            logger.warning("%s; they are set aside", text)
            aside = pool.aside.copy()
            aside[list(bad)] = True
            pool = pool.with_arrays(aside=aside)
        self.pool = pool

    @property
    def date(self) -> str:
        """What a template that writes the date takes for today, ISO 8601; a run that is resumed has that of its beginning."""
        return self.encoder.date.isoformat()

    @date.setter
    def date(self, date: str) -> None:
        encoder = self.encoder
        self.encoder = ChatEncoder(encoder.tokenizer, encoder.max_length, datetime.date.fromisoformat(date))

    def __call__(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of `rows`, in their order."""
        return list(self.encoder.encode(self.pool.iter_messages(rows)))


class DatasetSamples:
    """Samples of a host's dataset, each through the host's collator by itself: what it masks stays masked, its padding goes.

    Args:
        dataset: indexed by row; a row is what the collator takes.
        collator: makes a batch of one row: `input_ids`, `labels` (input ids, or -100 where unsupervised), and where it pads
            `attention_mask`.
        index: int64 [N], the dataset's index of each row of the pool; None where they are the same.
        limit: tokens of a sample at most, and why, see `lead_fast.loading.length_limit`; None for any.
    """

    def __init__(
        self, dataset: Any, collator: Callable[[list[Any]], Any], index: np.ndarray | None = None,
        limit: tuple[int, str] | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.collator, self.index, self.limit = dataset, collator, index, limit

    def check(self, rows: np.ndarray) -> int | None:
        """Before training, makes the samples of those `rows` that by their length cannot be served, where a column tells it.

        Returns:
            Tokens of the longest of `rows`, padding counted; None where no column tells it.

        Raises:
            ValueError: a sample without tokens, or one that is too long.
        """
        named = getattr(self.dataset, "column_names", None) or ()
        if "input_ids" not in named or not hasattr(self.dataset, "select_columns"):
            return None
        import pyarrow.compute as pc  # which a datasets.Dataset brings along

        index = rows if self.index is None else self.index[rows]
        column = self.dataset.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
        lengths = pc.list_value_length(column).to_numpy()  # pyright: ignore[reportAttributeAccessIssue]  made at import
        lengths = np.nan_to_num(lengths)[index]
        bad = (lengths == 0) if self.limit is None else (lengths == 0) | (lengths > self.limit[0])
        for row in rows[bad].tolist():  # some of which may be padding
            self([row])
        return int(lengths.max(initial=0))

    def __call__(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of `rows`, in their order.

        Raises:
            ValueError: the collator made something that is no causal language modelling sample.
        """
        return [self._sample(row if self.index is None else int(self.index[row])) for row in rows]

    def _sample(self, index: int) -> Sample:
        batch = dict(self.collator([self.dataset[index]]))
        if not {"input_ids", "labels"} <= batch.keys():
            raise ValueError(
                f"train_dataset: row {index} must have `input_ids` and `labels` after the collator, got {sorted(batch)}; "
                "DataCollatorForLanguageModeling(tokenizer, mlm=False) makes labels"
            )
        if unknown := batch.keys() - _TOKENS - _BOUNDARIES:
            raise ValueError(f"train_dataset: row {index} has {sorted(unknown)}, which packed text batches do not carry")
        ids, labels = _flat(batch["input_ids"]), _flat(batch["labels"])
        if ids.shape != labels.shape:
            raise ValueError(f"train_dataset: row {index} must have a label a token, got {len(labels)} for {len(ids)}")
        real = np.ones(len(ids), bool) if "attention_mask" not in batch else _flat(batch["attention_mask"]).astype(bool)
        supervised = labels != IGNORE_INDEX
        if (labels != ids)[supervised & real].any():
            raise ValueError(f"train_dataset: row {index} must have labels that are its input_ids or -100, got others")
        ids, supervised = ids[real], supervised[real]
        if not len(ids):
            raise ValueError(f"train_dataset: row {index} must have a token, got none")
        if self.limit is not None and len(ids) > self.limit[0]:
            raise ValueError(
                f"train_dataset: row {index} must have at most {self.limit[0]} tokens: {self.limit[1]}, got {len(ids)}; "
                "cut the samples"
            )
        if "position_ids" in batch and not np.array_equal(_flat(batch["position_ids"])[real], np.arange(len(ids))):
            raise ValueError(f"train_dataset: row {index} must be one sample with positions from 0, got other `position_ids`")
        return Sample(ids, supervised, supervised)


def _flat(values: Any) -> np.ndarray:
    """int64 [n] of a batch of one row."""
    return torch.as_tensor(values).reshape(-1).numpy().astype(np.int64)
