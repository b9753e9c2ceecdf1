"""The schedule that every contender trains on: LEAD chooses it once, then it is replayed.

A pool of conversations is tokenized; LEAD trains in rounds and each round's rows are packed into optimizer steps by
`lead_fast.trainer.step_batches`. What is replayed are rows, in order, by optimizer step and micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from test_estimation_price import SHAPES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import is_flash_attn_2_available

import lead_fast as lf
from lead_fast.config import TrainConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.loading import prepare_model
from lead_fast.lora import add_lora
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.optimization import Optimization, make_accelerator, step_batches
from lead_fast.packing import ChatEncoder, Messages, PackedBatch, Sample

NUM_ARMS, TASKS_PER_ARM = 7, 8
# A vocabulary and a width that people train, with few layers: here the head is most of the step.
WIDE_VOCABULARY = dict(vocab_size=49152, hidden_size=576, num_hidden_layers=4, num_attention_heads=9, num_key_value_heads=3,
                       intermediate_size=1536)  # fmt: skip
MODELS: dict[str, dict[str, int]] = {**SHAPES, "vocabulary": WIDE_VOCABULARY}


@dataclass(frozen=True)
class Setting:
    """A model and the schedule that it is trained on.

    Attributes:
        model: of `MODELS`: a Llama with random weights, LoRA on its linear layers.
        step_tokens, accumulation: tokens of an optimizer step, at most, and the micro-batches that it is split into.
        num_rows, round_rows: rows of the pool and of a round.
        num_rounds: timed rounds; one more warms up.
        half: bf16 weights under autocast, as on a GPU; else fp32.
        pool: any pool that `lead-fast` reads; None generates one.
    """

    model: str = "small"
    step_tokens: int = 2048
    accumulation: int = 1
    num_rows: int = 2000
    round_rows: int = 16
    num_rounds: int = 10
    lora_rank: int = 64
    learning_rate: float = 1e-3
    half: bool = False
    device: str = "cpu"
    pool: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    @property
    def attention(self) -> str:
        """What the peers are given: flash-attn where transformers finds it, as padding-free training wants it."""
        return "flash_attention_2" if self.device == "cuda" and is_flash_attn_2_available() else "sdpa"

    @property
    def config(self) -> TrainConfig:
        """The same for this package's own loop."""
        return TrainConfig(
            step_tokens=self.step_tokens, accumulation=self.accumulation, lora_rank=self.lora_rank,
            learning_rate=self.learning_rate, precision="bf16" if self.half else "fp32",
        )  # fmt: skip


@dataclass(frozen=True)
class ScheduledRound:
    """One round: its arm, its rows by optimizer step and micro-batch, its tokens without padding."""

    arm: int
    steps: list[list[list[int]]]
    num_tokens: int

    @property
    def rows(self) -> list[int]:
        return [row for step in self.steps for micro_batch in step for row in micro_batch]


@dataclass(frozen=True)
class Schedule:
    """Samples of the whole pool, its arrays [N], and the rounds; `losses` are those of the run that chose them.

    `rounds[0]` warms up.
    """

    setting: Setting
    tokenizer: PreTrainedTokenizerBase
    samples: list[Sample]
    arm: np.ndarray
    task: np.ndarray
    utility: np.ndarray
    rounds: list[ScheduledRound]
    losses: list[float]

    def engine(self, device: torch.device) -> lf.LeadEngine:
        """A fresh engine over the pool, as the one that chose the rounds began."""
        setting = self.setting
        pool = lf.Pool.from_arrays(arm=self.arm, task=self.task, utility=self.utility)
        rounds = max(1, setting.num_rows // setting.round_rows)
        engine = lf.LeadEngine(pool, lf.LeadConfig(budget=1.0, min_rounds=rounds, rate=1.0, max_uses=255), device)
        engine.record_visits = True  # as `lead-fast train` does, for its warnings
        return engine

    def steps_of(self, rows: Sequence[int]) -> list[list[PackedBatch]]:
        """Rows packed into optimizer steps, as `lead-fast train` packs a round."""
        return step_batches([self.samples[row] for row in rows], rows, self.setting.config)


def conversations(setting: Setting) -> list[Messages]:
    """The pool's own, or exchanges of the demo's pool joined to log-normal lengths, about 60% of them in the answer."""
    if setting.pool is not None:
        pool = lf.Pool.open(setting.pool)
        return list(pool.iter_messages(np.arange(min(len(pool), setting.num_rows))))
    counts = np.random.default_rng(0).lognormal(1.7, 0.6, setting.num_rows).round().clip(1, 24).astype(int)
    exchanges = iter(demo_rows(int(counts.sum()), seed=0))
    return [_joined([next(exchanges)["messages"] for _ in range(count)]) for count in counts]


def _joined(exchanges: list[Messages]) -> Messages:
    """One exchange of many: the first ones are examples in the prompt, the others belong to the answer."""
    texts = [message["content"] for exchange in exchanges for message in exchange]
    split = 2 * int(0.4 * len(exchanges)) + 1
    return [
        {"role": "user", "content": "\n".join(texts[:split])},
        {"role": "assistant", "content": "\n".join(texts[split:])},
    ]


def build(setting: Setting) -> Any:
    """The model that every contender starts from: random weights made on the device, LoRA, transformers' own attention."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **MODELS[setting.model], max_position_embeddings=2048, tie_word_embeddings=not setting.model.startswith("8b"),
        bos_token_id=0, eos_token_id=1, pad_token_id=2, use_cache=False,
    )  # fmt: skip
    with torch.device(setting.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=setting.dtype, attn_implementation=setting.attention)
    return add_lora(model, rank=setting.lora_rank, alpha=16.0, seed=0)


def twin(model: Any) -> Any:
    """A copy with adapters and options of its own; the frozen weights are shared, so that many 8B models fit a card."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


def packed_optimization(setting: Setting, model: Any, *, liger: bool = False) -> Optimization:
    """This package's optimizer step over packed batches of a model of `build`."""
    prepare_model(model.get_base_model())
    config = replace(setting.config, liger=liger)
    return Optimization(model, make_accelerator(config), config)


def train_steps(optimization: Optimization, steps: list[list[PackedBatch]], lr: float, engine: lf.LeadEngine | None) -> float:
    """Optimizer steps of a round, observed by the engine where there is one; mean of their losses."""
    losses = []
    for batches in steps:
        result = optimization.step(batches, lr, None if engine is None else engine.observe)
        if engine is not None:
            engine.step(lr=lr, num_items=result.num_items)
        losses.append(result.loss)
    return float(torch.stack(losses).mean())


def make_schedule(setting: Setting, model: Any) -> Schedule:
    """Lets LEAD choose `num_rounds + 1` rounds while it trains a twin of `model`.

    Raises:
        ValueError: a pool too small for the rounds, or a step that cannot be split into `accumulation` micro-batches.
    """
    messages = conversations(setting)
    vocabulary = min(4096, MODELS[setting.model]["vocab_size"])
    tokenizer = train_tokenizer([m["content"] for messages_ in messages for m in messages_], vocabulary)
    longest = min(setting.config.max_length, setting.step_tokens // (2 * setting.accumulation))
    samples = list(ChatEncoder(tokenizer, longest).encode(messages))
    g, n = np.random.default_rng(0), len(samples)
    schedule = Schedule(
        setting, tokenizer, samples, arm=g.integers(0, NUM_ARMS, n), task=g.integers(0, TASKS_PER_ARM, n),
        utility=g.gamma(4.0, 0.5, n), rounds=[], losses=[],
    )  # fmt: skip
    optimization = packed_optimization(setting, twin(model))
    engine = schedule.engine(optimization.device)
    while len(schedule.rounds) <= setting.num_rounds:
        if (chosen := engine.begin_round()) is None:
            raise ValueError(f"make_schedule: {n} rows must give {setting.num_rounds + 1} rounds, got {len(schedule.rounds)}")
        steps = schedule.steps_of(chosen.rows.tolist())
        if any(len(batches) != setting.accumulation for batches in steps):
            raise ValueError(
                f"make_schedule: a step does not split into {setting.accumulation} micro-batches; raise step_tokens"
            )
        schedule.losses.append(train_steps(optimization, steps, setting.learning_rate, engine))
        engine.end_round()
        rows = [[batch.rows.tolist() for batch in batches] for batches in steps]
        schedule.rounds.append(ScheduledRound(chosen.arm, rows, sum(b.num_tokens for batches in steps for b in batches)))
    return schedule
