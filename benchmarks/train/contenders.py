"""The contenders: each trains one scheduled round a call, and says how long that took and its mean loss.

All train LoRA adapters of one rank from the same weights, with AdamW at one constant learning rate, gradients clipped at 1,
no gradient checkpointing, in one precision, on the same samples in the same optimizer steps and micro-batches. All start
from tokenized samples and make their batches inside the time measured.

| contender | what it is |
|---|---|
| lead-fast, LEAD on | `lead_fast.trainer.Optimization` on packed batches; an engine of its own chooses (its choice is not used), observes, steps, ends rounds |
| lead-fast, LEAD off | the same without an engine and without statistics |
| ... Liger's layers | LEAD on with `--liger`: norms, rotary embeddings and MLPs by liger-kernel |
| transformers Trainer | `Trainer` with `DataCollatorForSeq2Seq`: a micro-batch padded to its longest sample, the model's own loss over logits |
| ... with Liger | the same with `use_liger_kernel=True` |
| TRL, padding-free | `SFTTrainer` with `padding_free=True`: a micro-batch as one sequence, TRL's own fused head; without flash-attn a mask made of the position ids keeps samples apart, at the price of attention over the whole micro-batch |
| TRL, padded | the same with `padding_free=False` |
| published style | batch 1, no packing, logits, a second cross-entropy over them, `.item()` twice a sample; each round a deep copy of the model and one Python filter over the pool a task of the arm |

Trainers run one `train()` a round. Their time is from `on_train_begin` to `on_epoch_end`: loading and collating batches,
forward, backward, clipping, optimizer, their own bookkeeping; not the set-up before (loader, optimizer, scheduler) nor the
summary after. The order and extent of batches comes from `get_train_dataloader`, the method they offer for that. The
published style's objective is the mean over the step's tokens, as everyone's here, so that losses can be compared; its code
averages means of samples.
"""  # noqa: E501  a table

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from interleaved import CannotRunError
from schedule import TASKS_PER_ARM, Schedule, ScheduledRound, packed_optimization, train_steps
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.models.llama import modeling_llama

from lead_fast.packing import IGNORE_INDEX, Sample

LEAD_ON, LEAD_OFF = "lead-fast, LEAD on", "lead-fast, LEAD off"
LEAD_LIGER = "lead-fast, LEAD on, Liger's layers"
OURS = (LEAD_ON, LEAD_OFF, LEAD_LIGER)
TRAINER, LIGER = "transformers Trainer", "transformers Trainer with Liger"
TRL_FREE, TRL_PADDED = "TRL SFTTrainer, padding-free", "TRL SFTTrainer, padded"
PUBLISHED = "published style"


class Trained(NamedTuple):
    """What a round took and gave; `steps_seconds` leaves out what is done once a round, where a contender tells."""

    seconds: float
    loss: float  # mean over the round's optimizer steps
    steps_seconds: float | None = None


class Contender(Protocol):
    def train(self, rnd: ScheduledRound) -> Trained: ...


def now(device: str) -> float:
    """Seconds on the clock once the device's work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class LeadFast:
    """This package's loop. `agreed` counts the rounds in which its engine chose the scheduled rows by itself."""

    def __init__(self, schedule: Schedule, model: Any, *, lead: bool, liger: bool = False) -> None:
        self.schedule = schedule
        self.optimization = packed_optimization(schedule.setting, model, liger=liger)
        self.engine = schedule.engine(self.optimization.device) if lead else None
        self.agreed = 0

    def train(self, rnd: ScheduledRound) -> Trained:
        setting, engine, rows = self.schedule.setting, self.engine, rnd.rows
        start = now(setting.device)
        if engine is not None:
            chosen = engine.begin_round()
            assert chosen is not None
            self.agreed += chosen.rows.tolist() == rows
        steps = self.schedule.steps_of(rows)
        loss = train_steps(self.optimization, steps, setting.learning_rate, engine)
        if engine is not None:
            report = engine.end_round()
            _ = report.reward, report.calibration, report.visits  # lazy until read
        return Trained(now(setting.device) - start, loss)


def example(sample: Sample) -> dict[str, list[int]]:
    """A sample as transformers takes it: labels not shifted."""
    labels = np.where(sample.supervised, sample.input_ids, IGNORE_INDEX)
    return {"input_ids": sample.input_ids.tolist(), "attention_mask": [1] * len(sample), "labels": labels.tolist()}


class _Clock(TrainerCallback):
    """From the first batch that a `train()` asks for to the end of its one epoch."""

    def __init__(self, device: str) -> None:
        self.device, self.start, self.seconds = device, 0.0, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start = now(self.device)

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.seconds = now(self.device) - self.start


class _Scheduled:
    """Mixed into a Trainer: its training batches are the micro-batches that it is told."""

    micro_batches: list[list[int]]

    def get_train_dataloader(self: Any) -> DataLoader:
        loader = DataLoader(
            self.train_dataset, batch_sampler=self.micro_batches, collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
        )  # fmt: skip
        return self.accelerator.prepare(loader)


class ScheduledTrainer(_Scheduled, Trainer):
    """transformers' Trainer on scheduled batches."""


class HostLoop:
    """A Trainer that owns its loop: one `train()` a round."""

    def __init__(self, schedule: Schedule, make: Callable[[dict[str, Any]], Any]) -> None:
        setting = schedule.setting
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = make(
            dict(
                output_dir=self.folder.name, gradient_accumulation_steps=setting.accumulation, num_train_epochs=1,
                per_device_train_batch_size=max(len(m) for r in schedule.rounds for step in r.steps for m in step),
                learning_rate=setting.learning_rate, lr_scheduler_type="constant", max_grad_norm=1.0, weight_decay=0.0,
                bf16=setting.half, use_cpu=setting.device == "cpu", logging_strategy="no",
                save_strategy="no", report_to="none", disable_tqdm=True,
            )
        )  # fmt: skip
        self.clock = _Clock(setting.device)
        self.trainer.add_callback(self.clock)
        self.trainer.remove_callback(PrinterCallback)

    def train(self, rnd: ScheduledRound) -> Trained:
        self.trainer.micro_batches = [micro_batch for step in rnd.steps for micro_batch in step]
        output = self.trainer.train()
        assert output.global_step == len(rnd.steps)
        return Trained(self.clock.seconds, output.training_loss)


class WithLiger:
    """A contender with Liger's layers. What it replaces of the process is back in its place outside its own rounds."""

    def __init__(self, schedule: Schedule, make: Callable[[], Contender]) -> None:
        if schedule.setting.device != "cuda":
            raise CannotRunError("Liger's kernels are Triton: a GPU only")
        if find_spec("liger_kernel") is None:
            raise CannotRunError("liger-kernel is not installed")
        own = dict(vars(modeling_llama))
        try:
            self.contender = make()
            self.rotary = modeling_llama.apply_rotary_pos_emb
        finally:
            vars(modeling_llama).update(own)

    def train(self, rnd: ScheduledRound) -> Trained:
        own, modeling_llama.apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb, self.rotary
        try:
            return self.contender.train(rnd)
        finally:
            modeling_llama.apply_rotary_pos_emb = own


def transformers_trainer(schedule: Schedule, model: Any, *, liger: bool) -> HostLoop:
    def make(options: dict[str, Any]) -> Trainer:
        return ScheduledTrainer(
            model=model, args=TrainingArguments(use_liger_kernel=liger, **options), processing_class=schedule.tokenizer,
            train_dataset=[example(sample) for sample in schedule.samples],
            data_collator=DataCollatorForSeq2Seq(schedule.tokenizer, padding="longest"),
        )  # fmt: skip

    return HostLoop(schedule, make)


def trl_trainer(schedule: Schedule, model: Any, *, padding_free: bool) -> HostLoop:
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise CannotRunError(f"not installed ({error})") from error

    class ScheduledSFTTrainer(_Scheduled, SFTTrainer):
        """TRL's SFTTrainer on scheduled batches."""

    columns = [example(sample) for sample in schedule.samples]
    dataset = Dataset.from_dict({name: [c[name] for c in columns] for name in ("input_ids", "labels")})

    def make(options: dict[str, Any]) -> SFTTrainer:
        args = SFTConfig(
            padding_free=padding_free, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=False, **options,
        )  # fmt: skip
        return ScheduledSFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=schedule.tokenizer)

    return HostLoop(schedule, make)


class PublishedStyle:
    """A loop in the style of the published LEAD code, which does not run as it is; selection's result is not used."""

    def __init__(self, schedule: Schedule, model: Any) -> None:
        try:
            import datasets
        except ImportError as error:
            raise CannotRunError(f"not installed ({error})") from error
        datasets.disable_progress_bars()
        setting = schedule.setting
        self.schedule, self.model = schedule, model.train()
        rows = [example(sample) for sample in schedule.samples]
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        columns |= {"idf_cluster": schedule.arm, "task": schedule.task, "dataset_id": np.arange(len(rows))}
        self.dataset = datasets.Dataset.from_dict(columns).with_format("torch")
        self.collate = DataCollatorForSeq2Seq(schedule.tokenizer, padding="longest")
        self.losses = schedule.utility.copy()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=setting.learning_rate, weight_decay=0.0)

    def train(self, rnd: ScheduledRound) -> Trained:
        device = self.schedule.setting.device
        start = now(device)
        for task in range(TASKS_PER_ARM):
            self._select(rnd.arm, task)
        old_model = copy.deepcopy(self.model)
        begun = now(device)
        loss = float(np.mean([self._step([row for micro_batch in step for row in micro_batch]) for step in rnd.steps]))
        end = now(device)
        del old_model  # alive through the round, as there; gone before others train
        return Trained(end - start, loss, end - begun)

    def _select(self, arm: int, task: int) -> np.ndarray:
        """Rows of a task by utility, highest first, through one filter of the whole pool."""
        used_up: list[int] = []
        kept = self.dataset.filter(
            lambda row: row["idf_cluster"] == arm and row["task"] == task and row["dataset_id"].item() not in used_up
        )
        return np.argsort([float(self.losses[row["dataset_id"].item()]) for row in kept.select_columns("dataset_id")])[::-1]

    def _step(self, rows: list[int]) -> float:
        setting, total = self.schedule.setting, 0.0
        num_items = sum(int(self.schedule.samples[row].supervised[1:].sum()) for row in rows)
        for row in rows:
            chosen = self.dataset[row]
            batch = self.collate([{name: chosen[name] for name in ("input_ids", "attention_mask", "labels")}])
            batch = {name: tensor.to(setting.device) for name, tensor in batch.items()}
            with torch.autocast(setting.device, torch.bfloat16, enabled=setting.half):
                out = self.model(**batch, use_cache=False, num_items_in_batch=num_items)
            total += out.loss.detach().item()
            utility = F.cross_entropy(out.logits.squeeze(0), batch["labels"].squeeze(0), ignore_index=IGNORE_INDEX)
            out.loss.backward()
            self.losses[row] = utility.item()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


CONTENDERS: dict[str, Callable[[Schedule, Any], Contender]] = {
    LEAD_ON: lambda schedule, model: LeadFast(schedule, model, lead=True),
    LEAD_OFF: lambda schedule, model: LeadFast(schedule, model, lead=False),
    LEAD_LIGER: lambda schedule, model: WithLiger(schedule, lambda: LeadFast(schedule, model, lead=True, liger=True)),
    TRAINER: lambda schedule, model: transformers_trainer(schedule, model, liger=False),
    LIGER: lambda schedule, model: WithLiger(schedule, lambda: transformers_trainer(schedule, model, liger=True)),
    TRL_FREE: lambda schedule, model: trl_trainer(schedule, model, padding_free=True),
    TRL_PADDED: lambda schedule, model: trl_trainer(schedule, model, padding_free=False),
    PUBLISHED: PublishedStyle,
}
