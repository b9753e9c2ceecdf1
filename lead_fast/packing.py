"""From messages to packed batches: chat template, label masks, variable-length packing with sample rows."""

from __future__ import annotations

import dataclasses
import datetime
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lead_fast.device import to_device
from lead_fast.turns import ChatTemplate, Messages, Turn

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100

# For tokenizers that bring no chat template. Saved with the tokenizer, so that inference renders the same text.
PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Assistant:\n' }}{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '### ' + message['role'].capitalize() + ':\n' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sample:
    """One tokenized conversation.

    Attributes:
        input_ids: int64 [n].
        supervised: bool [n], tokens of assistant turns: the targets of the loss.
        keep_alone: bool [n], tokens of the same answer without its prompt: BOS, assistant headers, assistant turns.
        cut_prompt, cut_answer: tokens removed to fit `max_length`.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    keep_alone: np.ndarray
    cut_prompt: int = 0
    cut_answer: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    def alone(self) -> Sample:
        """The answer without its prompt, for the denominator of the difficulty (section 2)."""
        keep = self.keep_alone
        return Sample(self.input_ids[keep], self.supervised[keep], keep[keep])


@dataclass
class CutCounts:
    """How many samples lost tokens to `max_length`."""

    samples: int = 0
    prompts: int = 0
    answers: int = 0
    max_length: int = 0

    def add(self, sample: Sample) -> None:
        self.samples += 1
        self.prompts += sample.cut_prompt > 0
        self.answers += sample.cut_answer > 0

    @classmethod
    def merge(cls, parts: Sequence[CutCounts]) -> CutCounts:
        """Of samples counted in parts."""
        samples, prompts, answers = (sum(getattr(part, name) for part in parts) for name in ("samples", "prompts", "answers"))
        return cls(samples, prompts, answers, parts[0].max_length)

    def __str__(self) -> str:
        return (
            f"{self.prompts:,} of {self.samples:,} samples had their prompt cut from the left to fit {self.max_length} tokens,"
            f" {self.answers:,} also lost the end of their answer"
        )


class ChatEncoder:
    """Tokenizes conversations so that only assistant turns are supervised.

    Args:
        tokenizer: a fast tokenizer; one without a chat template gets `PLAIN_TEMPLATE`.
        max_length: tokens of a sample. A longer one loses prompt tokens from the left (after BOS), those of later turns
            after those of earlier ones, then its end: the last answers, with their headers.
        date: what a template that writes the date takes for today; None is today.

    Raises:
        ValueError: the tokenizer has no offsets (a slow tokenizer), or the template cannot be cut into turns.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, date: datetime.date | None = None) -> None:
        if not tokenizer.is_fast:
            raise ValueError(f"ChatEncoder: `tokenizer` must be a fast tokenizer, got {type(tokenizer).__name__}")
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.tokenizer, self.max_length = tokenizer, max_length
        self.date = datetime.date.today() if date is None else date
        self.template = ChatTemplate(tokenizer, self.date)
        self.cuts = CutCounts(max_length=max_length)
        self._probe()

    def encode(
        self, conversations: Iterable[Messages], batch_size: int = 512, errors: list[ConversationError] | None = None
    ) -> Iterator[Sample]:
        """Tokenizes conversations, in order.

        Args:
            conversations: messages of each.
            batch_size: conversations at once.
            errors: gets what is wrong with those that cannot be encoded, which are left out then.

        Raises:
            ConversationError: one that the template refuses, whose answers cannot be located, or without an answer token.
        """
        first = 0
        for chunk in _chunks(conversations, batch_size):
            rendered = list(self._rendered(chunk, first, errors))
            first += len(chunk)
            if not rendered:
                continue
            encoded = self.tokenizer(
                [text for _, text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True,
                return_attention_mask=False,
            )  # fmt: skip
            for (number, _, turns), ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                try:
                    sample = _mark(np.asarray(ids, np.int64), np.asarray(offsets, np.int64).reshape(-1, 2), turns)
                except ValueError as error:
                    _keep_or_raise(ConversationError(number, str(error)), errors)
                    continue
                if self.tokenizer.bos_token_id is not None and ids[0] == self.tokenizer.bos_token_id:
                    sample.keep_alone[0] = True
                sample = self._cut(sample)
                self.cuts.add(sample)
                yield sample

    def _rendered(
        self, conversations: Sequence[Messages], first: int, errors: list[ConversationError] | None
    ) -> Iterator[tuple[int, str, list[Turn]]]:
        for number, messages in enumerate(conversations, first):
            try:
                text, turns = self.template.turns(messages)
            except ValueError as error:
                _keep_or_raise(ConversationError(number, str(error)), errors)
                continue
            yield number, text, turns

    def _probe(self) -> None:
        """One turn: the answer must be found, and should end with a token that stops generation."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        limit, self.max_length = self.max_length, sys.maxsize
        try:
            (sample,) = self.encode([chat])
        finally:
            self.max_length, self.cuts = limit, CutCounts(max_length=limit)
        if limit < (least := int(sample.keep_alone.sum())):
            raise ValueError(
                f"max_length: expected at least {least}, what the chat template needs for an answer of one token, got {limit}"
            )
        tokens = [str(self.tokenizer.decode([token])) for token in sample.input_ids[sample.supervised]]
        if not any("b" in token for token in tokens):
            raise ValueError("ChatEncoder: the chat template must render the assistant's content after its header")
        special = set(self.tokenizer.all_special_tokens) | {
            token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special
        }
        last = next(token for token in reversed(tokens) if token.strip())
        if last not in special:
            _warn_of_no_stop(last)

    def _cut(self, sample: Sample) -> Sample:
        over = len(sample) - self.max_length
        if over <= 0:
            return sample
        # Prompts go first, from the left, the later turns' too; BOS, headers and answers stay.
        prompt = np.flatnonzero(~sample.keep_alone)
        keep = np.ones(len(sample), bool)
        keep[prompt[:over]] = False
        kept = np.flatnonzero(keep)[: self.max_length]
        lost = int(sample.supervised.sum() - sample.supervised[kept].sum())
        return Sample(sample.input_ids[kept], sample.supervised[kept], sample.keep_alone[kept], min(over, len(prompt)), lost)


@cache
def _warn_of_no_stop(last: str) -> None:
    text = "the chat template ends an answer with %r, which is no special token: a model trained on it may not learn to stop"
    logger.warning(text, last)


class ConversationError(ValueError):
    """A conversation that cannot be encoded.

    Attributes:
        number: which of those that were given.
        reason: what is wrong with it.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"ChatEncoder: conversation {number}: {reason}")
        self.number, self.reason = number, reason


def _keep_or_raise(error: ConversationError, errors: list[ConversationError] | None) -> None:
    if errors is None:
        raise error
    errors.append(error)


def _mark(ids: np.ndarray, offsets: np.ndarray, turns: Sequence[Turn]) -> Sample:
    """Masks from characters: a token is supervised when it holds some of an answer, or it starts there and ends later.

    A header's last space and an answer's first word may be one token.
    """
    supervised, keep = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    start, end = offsets[:, 0], offsets[:, 1]
    for header, answer_start, answer_end in turns:
        inside = (end > answer_start) & (start < answer_end)
        solid = np.flatnonzero(inside & (end > start))
        if not len(solid):
            raise ValueError("an assistant turn has no token of its own after rendering")
        # Some tokenizers give spaces no width: those between two tokens of the answer are its own.
        supervised[solid[0] : solid[-1] + 1] |= inside[solid[0] : solid[-1] + 1]
        keep |= (start >= header) & (start < answer_end)
    return Sample(ids, supervised, keep | supervised)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@dataclass(frozen=True)
class PackedBatch:
    """Samples back to back: no padding, boundaries in `cu_seqlens`. Tensors share a device.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T], restarting at 0 in each sample.
        labels: int64 [T], aligned: labels[t] is the target of position t; IGNORE_INDEX where none.
        cu_seqlens: int32 [S + 1].
        rows: int64 [S], each sample's row of the pool; -1 for none.
        token_index: int64 [M], positions with a label, ascending.
        max_length: tokens of the longest sample.
        num_items: supervised positions M.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    token_index: Tensor
    max_length: int
    num_items: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def sample_items(self) -> Tensor:
        """Supervised positions of each sample, int64 [S]."""
        return torch.searchsorted(self.token_index, self.cu_seqlens.long()).diff()

    def to(self, device: torch.device | str) -> PackedBatch:
        """On a device; nothing waits for a GPU."""
        target = torch.device(device)
        moved = {k: to_device(v, target) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)


def pack(samples: Sequence[Sample], rows: Sequence[int] | None = None) -> PackedBatch:
    """Packs samples into one batch; `rows` gives each sample's row of the pool.

    Raises:
        ValueError: no sample, or not one row a sample.
    """
    if not samples:
        raise ValueError("pack: `samples` must have at least one sample, got none")
    if rows is not None and len(rows) != len(samples):
        raise ValueError(f"pack: `rows` must have {len(samples)} entries, one a sample, got {len(rows)}")
    lengths = np.array([len(s) for s in samples], np.int64)
    ids = np.concatenate([s.input_ids for s in samples])
    targets = np.where(np.concatenate([s.supervised for s in samples]), ids, IGNORE_INDEX)
    ends = np.cumsum(lengths)
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    labels[:-1] = targets[1:]
    labels[ends - 1] = IGNORE_INDEX  # the next sample's first token is no target of this one
    index = np.flatnonzero(labels != IGNORE_INDEX)
    position = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(position),
        labels=torch.from_numpy(labels),
        cu_seqlens=torch.from_numpy(np.r_[0, ends].astype(np.int32)),
        rows=torch.tensor([-1] * len(samples) if rows is None else list(rows), dtype=torch.int64),
        token_index=torch.from_numpy(index),
        max_length=int(lengths.max()),
        num_items=len(index),
    )


def without_supervision(batch: PackedBatch) -> PackedBatch:
    """The batch's first sample as no row of a pool and with nothing to learn: its loss and its gradients are 0."""
    end = int(batch.cu_seqlens[1])
    return PackedBatch(
        input_ids=batch.input_ids[:end],
        position_ids=batch.position_ids[:end],
        labels=torch.full_like(batch.labels[:end], IGNORE_INDEX),
        cu_seqlens=batch.cu_seqlens[:2],
        rows=torch.full_like(batch.rows[:1], -1),
        token_index=batch.token_index[:0],
        max_length=end,
        num_items=0,
    )


def fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Splits samples, in order, into bins of at most `capacity` tokens; a longer sample has a bin of its own."""
    bins: list[list[int]] = []
    used = capacity + 1
    for index, length in enumerate(lengths):
        if used + length > capacity:
            bins.append([])
            used = 0
        bins[-1].append(index)
        used += length
    return bins


def balanced_fill(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As `fill`, with the same number of bins but the smallest capacity that gives it: no nearly empty last bin."""
    if not lengths:
        return []
    bins = fill(lengths, capacity)
    low, high = min(max(lengths), capacity), capacity
    while low < high:
        middle = (low + high) // 2
        trial = fill(lengths, middle)
        if len(trial) <= len(bins):
            bins, high = trial, middle
        else:
            low = middle + 1
    return bins


def split_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Splits samples, in order, into exactly `parts` runs of about equal tokens; a run may be empty."""
    total, done = sum(lengths), 0
    runs: list[list[int]] = [[] for _ in range(parts)]
    for index, length in enumerate(lengths):
        runs[min(parts - 1, int((done + length / 2) * parts / max(total, 1)))].append(index)
        done += length
    return runs
