"""`LeadTrainer`: transformers' Trainer on the samples that LEAD chooses while it trains.

The host's loop, arguments, callbacks, logging and checkpoints stay as its users know them. What changes: the training
batches are LEAD's rounds, packed without padding; the fused loss takes the place of the model's head, on the hidden states
of the one forward pass; the run ends when the budget is used.

| host | here |
|---|---|
| `per_device_train_batch_size` | samples packed into a micro-batch, at most |
| `num_train_epochs` | not used: the run is one epoch, and `state.epoch` is the share of the budget that is used |
| `max_steps` | may end a run before its budget does; where not given, `state.max_steps` is an estimate until the last round |
| `torch_compile` | compiles each layer, for batches of any length; not the whole model, whose head packed batches go around |
| learning-rate schedule | without `max_steps`, runs on progress through the budget: the estimate only scales `warmup_steps` |
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from lead_fast.config import LeadConfig
from lead_fast.engine import LeadEngine
from lead_fast.estimators import keeps_grad_norm
from lead_fast.first_order import FirstOrder
from lead_fast.integrations.attention import AttentionSwitch
from lead_fast.integrations.checks import check_host, check_pool
from lead_fast.integrations.rounds import HostRounds
from lead_fast.integrations.samples import ChatSamples, DatasetSamples
from lead_fast.integrations.state_file import load_state, save_state
from lead_fast.layers import compile_layers
from lead_fast.loading import check_length, length_limit, load_converted
from lead_fast.models import PackedModel, causal_lm_of, forward_replaced, trained_parameters
from lead_fast.ops import LinearCrossEntropyOutput
from lead_fast.packing import CutCounts, PackedBatch, Sample
from lead_fast.pool import Pool
from lead_fast.ranks import Ranks
from lead_fast.selection import rows_aside
from lead_fast.shards import keep_output_precision

_Host = Trainer if TYPE_CHECKING else object

logger = logging.getLogger(__name__)

STATE_FILE = "lead_state.safetensors"


class LeadRounds(_Host):
    """What turns a Trainer into one that trains in LEAD's rounds; comes before it among a class's bases.

    Attributes:
        engine: chooses the rows; `engine.export(path)` writes what was chosen.
    """

    loss_is_scaled_for_ga = True  # over the supervised tokens of the whole step, by the fused loss

    engine: LeadEngine

    def start_rounds(self, pool: Pool, lead: LeadConfig | None, samples_of: Callable[[Sequence[int]], list[Sample]]) -> None:
        """Once, when the host is set up."""
        check_host(type(self).__name__, self)
        longest: int | None = None
        if isinstance(samples_of, ChatSamples):
            longest = samples_of.encoder.max_length
        elif isinstance(samples_of, DatasetSamples):
            hard_rows = str((lead or LeadConfig()).resolve().hard_rows)
            longest = samples_of.check(np.flatnonzero(~rows_aside(np.asarray(pool.aside), pool.difficulty, hard_rows)))
        model = self.model
        self._attention = AttentionSwitch(causal_lm_of(model))
        with self._attention.on():
            self._packed = PackedModel(model, max_length=longest)  # pyright: ignore[reportArgumentType]
        if self.is_fsdp_enabled:
            keep_output_precision(self.accelerator.state.fsdp_plugin)
        args, self._ranks = self.args, Ranks.started(self.args.device)
        plugin: Any = self.accelerator.state.dynamo_plugin
        if plugin.backend != DynamoBackend.NO and not args.torch_compile:
            logger.warning("accelerate's dynamo_backend is not used; `torch_compile` compiles the model's layers")
        if args.torch_compile:
            compile_layers(self._packed.model, backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.engine = LeadEngine(pool, lead or LeadConfig(), args.device, group=self._ranks.group)
        self._rounds = HostRounds(self.engine, samples_of, args.train_batch_size, args.gradient_accumulation_steps, self._ranks)
        self._step_items, self._left_out = 0, False
        self._first_order: FirstOrder | None = None
        self.callback_handler.callbacks.insert(0, _RoundCallback(self))  # the others see the progress that it sets
        self._say_of_small_rounds()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not resume_from_checkpoint and self.engine.num_rounds:
            raise RuntimeError(f"{type(self).__name__}.train: its budget is in use already; make a new trainer, or resume")
        self._follow_weights()
        with self._not_compiled_whole():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._not_compiled_whole():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _not_compiled_whole(self) -> Iterator[None]:
        """accelerate prepares the model as it is, whose layers are compiled where `torch_compile` is asked for."""
        plugin: Any = self.accelerator.state.dynamo_plugin
        backend, plugin.backend = plugin.backend, DynamoBackend.NO
        try:
            yield
        finally:
            plugin.backend = backend

    def _say_of_small_rounds(self) -> None:
        rounds, config = self._rounds, self.engine.config
        asked, rows = rounds.batch_size * rounds.step_parts, rounds.rows_per_round()
        if rows < asked:
            logger.warning(
                "a round has about %d rows, and an optimizer step is to have %d: steps will be as small as rounds; raise "
                "`budget` (%d rows), or lower `min_rounds` (%s)", rows, asked, self.engine.budget, config.min_rounds,
            )  # fmt: skip

    def _follow_weights(self) -> None:
        """Shows estimators, and those that watch by now, the weights and gradients that they follow."""
        followers = [name for name, estimator in self.engine.estimators.items() if estimator.needs_weights]
        if followers and (self.is_fsdp_enabled or self._zero_stage == 3):
            raise ValueError(f"{type(self).__name__}: `estimator` {followers[0]} follows whole weights, which are sharded here")
        self.engine.track(parameter for _, parameter in trained_parameters(self._packed))
        self._first_order = next((e for e in self.engine.estimators.values() if isinstance(e, FirstOrder)), None)
        if self._first_order is not None and self._ranks.world > 1:
            raise ValueError(f"{type(self).__name__}: `estimator` first_order runs in one process, got {self._ranks.world}")
        if self._first_order is not None and self.args.torch_compile:
            raise ValueError(
                f"{type(self).__name__}: `torch_compile` must be False: first_order reads layers as they run, got True"
            )
        if self._first_order is not None and self._packed.one_by_one:
            raise ValueError(
                f"{type(self).__name__}: `estimator` first_order reads packed batches, and this model's samples run one by one"
            )
        if self._first_order is not None and self._first_order.sketch is None:
            self._first_order.follow(self._packed.model, seed=self.engine.config.seed)

    @property
    def _zero_stage(self) -> int:
        plugin: Any = self.accelerator.state.deepspeed_plugin
        return plugin.zero_stage if self.is_deepspeed_enabled else 0

    # Data.

    def dataset_samples(self, index: np.ndarray | None = None) -> DatasetSamples:
        """The samples of `train_dataset`, without the columns that the host removes; `index` as `DatasetSamples` takes it."""
        dataset: Any = self.train_dataset
        collator, limit = self.data_collator, length_limit(causal_lm_of(self.model))
        if hasattr(dataset, "column_names"):
            return DatasetSamples(self._remove_unused_columns(dataset, "training"), collator, index, limit)
        return DatasetSamples(dataset, self._get_collator_with_removed_columns(collator, "training"), index, limit)

    def get_train_dataloader(self) -> DataLoader:
        """Micro-batches of one round after another, without a length.

        Not prepared by accelerate, whose loaders fetch a batch ahead to find out which is the last. Its generator is its
        own: an iterator draws a seed, which must not come out of the run's random numbers when it resumes.
        """
        pin_memory = self.args.dataloader_pin_memory and self.args.device.type == "cuda"
        return DataLoader(_Stream(self._micro_batches), batch_size=None, pin_memory=pin_memory, generator=torch.Generator())

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches = list(islice(epoch_iterator, num_batches))
        self._step_items = max(1, self._ranks.sum_of(sum(batch["num_items"] for batch in batches)))
        return batches, self._step_items

    def _micro_batches(self) -> Iterator[dict[str, Any]]:
        rounds = self._rounds
        while rounds.open is not None or rounds.begin():
            assert rounds.open is not None
            rows = rounds.open.round.rows
            self._ranks.agree(f"the rows of round {rounds.open.round.number}", zlib.crc32(rows.numpy().tobytes()))
            self._expect_end()
            yield from rounds.batches()
            if rounds.open is not None:
                raise RuntimeError(
                    f"{type(self).__name__}: a batch was asked for before the last step of round "
                    f"{rounds.open.round.number} was taken; nothing may read ahead of a round"
                )
        # No row is left before the budget is used, or the run that resumes was complete.
        self.state.max_steps = self.state.global_step
        self.control.should_training_stop = True
        self.control.should_save = self.args.save_strategy == "steps"

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple:
        """One epoch, longer than any run: the last round ends it."""
        rounds, step_size = self._rounds, self._rounds.batch_size * self._rounds.step_parts
        most, samples, steps = rounds.most_steps(), self.engine.budget, rounds.estimated_steps()
        if args.max_steps > 0:
            samples, steps = min(samples, args.max_steps * step_size), args.max_steps
        return 1, most, samples, samples, step_size, most * rounds.accumulation, steps

    def _expect_end(self) -> None:
        """Tells the host how many steps the run has: an estimate above those taken, until the last round says it exactly."""
        opened = self._rounds.open
        assert opened is not None
        end = self.state.global_step + opened.num_steps - opened.steps_done
        last, limit = self.engine.num_used >= self.engine.budget, self.args.max_steps
        if limit > 0:
            self.state.max_steps = min(limit, end) if last else limit
        else:
            rest = round((1.0 - self.engine.progress) * self._rounds.estimated_steps())
            self.state.max_steps = end if last else end + max(1, rest)
        for callback in self.callback_handler.callbacks:
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.total = self.state.max_steps

    # The step.

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        if not len(inputs["rows"]):
            return torch.zeros((), device=self.args.device)
        with self._attention.on(), self._sketched(inputs, num_items_in_batch):
            return super().training_step(model, inputs, num_items_in_batch)

    def _sketched(self, inputs: dict[str, Any], num_items: int) -> AbstractContextManager[None]:
        if self._first_order is None:
            return nullcontext()
        batch, scaler = PackedBatch(**inputs), self.accelerator.scaler
        upstream = (1.0 if scaler is None else scaler.get_scale()) / num_items
        return self._first_order.collect(batch.rows, batch.cu_seqlens, batch.sample_items, upstream)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The fused loss of a packed batch, observed by the engine; any other batch (evaluation) is the host's."""
        if "cu_seqlens" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        batch = PackedBatch(**inputs)
        with self.accelerator.autocast():
            out = self._through(model, batch, num_items_in_batch)
        assert out.samples is not None
        self._rounds.observe(batch, out.samples)
        # The processes exchange the mean of their gradients, and log the mean of their losses; the sum is wanted.
        loss = out.loss * self._ranks.world if self._ranks.world > 1 else out.loss
        return (loss, out) if return_outputs else loss

    def _through(self, model: nn.Module, batch: PackedBatch, num_items: Any) -> LinearCrossEntropyOutput:
        """The fused loss, by way of what exchanges gradients or shards weights: the call of the whole model sets that up."""
        inner: Any = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if inner is model and not self.is_fsdp_enabled:
            return self._packed(batch, num_items=num_items)
        with forward_replaced(inner, lambda **_: self._packed(batch, num_items=num_items)):
            return model(input_ids=batch.input_ids)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's; leaves out a step whose gradient is not finite. In fp16 the gradient scaler does that itself, and
        under DeepSpeed the step is taken by now."""
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.accelerator.scaler is not None or self.is_deepspeed_enabled:
            return norm
        self._left_out = not bool(torch.isfinite(torch.as_tensor(norm)))
        if self._left_out:
            logger.warning("a gradient is not finite: its optimizer step is left out")
            self._packed.zero_grad(set_to_none=True)
        return norm

    def train_began(self) -> None:
        """The model is wrapped: one that could not be checked before is; the optimizer is there."""
        beta1 = known = self.engine.config.adam_beta1
        if groups := getattr(self.optimizer, "param_groups", None):  # one that DeepSpeed is to make has none
            group: dict[str, Any] = groups[0]
            beta1 = float(group["betas"][0] if "betas" in group else group.get("momentum") or group.get("beta1") or 0.0)
        if beta1 != known and any(map(keeps_grad_norm, self.engine.estimators.values())):
            logger.warning(
                "the optimizer's beta1 is %g, and grad_norm takes it for %g; give LeadConfig(adam_beta1=%g)",
                beta1,
                known,
                beta1,
            )
        if not self._packed.checked:
            with self._attention.on():
                self._packed.check()

    def step_taken(self, lr: float) -> None:
        """After each optimizer step, with the learning rate it used."""
        left_out = self._left_out or self.accelerator.optimizer_step_was_skipped
        self._rounds.step(0.0 if left_out else lr, self._step_items)
        if self._first_order is not None:
            self._first_order.stepped()

    def step_ended(self) -> None:
        """After the host counted the step: a round whose last step it was is closed."""
        opened = self._rounds.open
        assert opened is not None
        self.state.epoch = self._rounds.progress
        if opened.steps_done == opened.num_steps:
            self._close_round()

    def train_ended(self) -> None:
        """A host that stops in the middle of a round leaves it closed: its rows so far count."""
        if self._rounds.open is not None:
            self._close_round()

    def _close_round(self) -> None:
        metrics = self._rounds.end()
        if self.args.logging_strategy != "no":
            should_log = self.control.should_log
            self.log(metrics)
            self.control.should_log = should_log  # the host's own line is still due
        if metrics["lead/quarantined"] and not metrics["lead/samples"]:
            raise RuntimeError(
                f"{type(self).__name__}: round {metrics['lead/round']}: the loss of all its {metrics['lead/quarantined']} rows "
                "is not finite; lower the learning rate, or go on from the last checkpoint in another precision"
            )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The host's schedule; one that it made, of a number of steps that is an estimate, runs on progress instead."""
        given = self.lr_scheduler
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if scheduler is not given and isinstance(scheduler, LambdaLR) and self.args.max_steps <= 0:
            scheduler.lr_lambdas = [self._on_progress(factor, num_training_steps) for factor in scheduler.lr_lambdas]
        return scheduler

    def _on_progress(self, factor: Callable[[Any], float], num_steps: int) -> Callable[[Any], float]:
        # A plain function: the host pickles the state of any other callable.
        return lambda _: factor(self._rounds.progress * num_steps)

    # Checkpoints: the engine's state lies beside the optimizer's.

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = self._rounds.state_dict()  # of all processes
        if self.args.should_save:
            save_state(os.path.join(output_dir, STATE_FILE), state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._check_checkpoint(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._rounds.load_state_dict(load_state(os.path.join(checkpoint, STATE_FILE)))

    def _check_checkpoint(self, checkpoint: str) -> None:
        """The host goes on without what is missing, with other moments and another rate.

        Raises:
            ValueError: a file is not there: the process ended while it saved, or `save_only_model` left it out.
        """
        needed = [STATE_FILE]
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            needed += [OPTIMIZER_NAME, SCHEDULER_NAME]
        if missing := [name for name in needed if not os.path.isfile(os.path.join(checkpoint, name))]:
            raise ValueError(
                f"{type(self).__name__}: {checkpoint} holds no {', '.join(missing)}: it was not written to its end, or with "
                "`save_only_model`; resume from the one before"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._loaded_from = str(self.state.best_model_checkpoint)
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As the host's, which loads weights by the names that they have in the file: experts are saved under others."""
        model: Any = self.model
        if set(load_result.missing_keys).difference(model._tied_weights_keys or ()):
            load_converted(model, self._loaded_from)
        else:
            super()._issue_warnings_after_load(load_result)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        super()._init_training_state(*args, **kwargs)
        return 0, 0  # nothing to skip: the rounds know their position


class _Stream(IterableDataset):
    def __init__(self, make: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self._make()


class _RoundCallback(TrainerCallback):
    """Steps and ends of rounds, at the host's own events."""

    def __init__(self, trainer: LeadRounds) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.train_began()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.step_taken(
            max(float(g["lr"]) for g in kwargs["optimizer"].param_groups)
        )  # the schedule has not moved on yet

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.step_ended()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.train_ended()


class LeadTrainer(LeadRounds, Trainer):
    """transformers' Trainer with LEAD inside: the usual arguments, `pool` and `lead`.

    Args:
        *args, **kwargs: as `transformers.Trainer` takes them. With `train_dataset`, row i of the pool is `train_dataset[i]`,
            and `data_collator` makes its `input_ids` and `labels`. Without, the pool's own text is tokenized by the chat
            template of `processing_class`, and only assistant turns are supervised.
        pool: rows with `arm` and `utility`, as `lead-fast prepare` writes them or `Pool.from_arrays` takes them.
        lead: how to choose; None is `LeadConfig()`.
        max_length: tokens of a sample made of the pool's text; longer prompts are cut from the left.

    Raises:
        ValueError: an argument or a model that packing, rounds or the fused loss cannot serve; the message names it.

    Logs, beside the host's, a line a round: lead/round, lead/arm, lead/reward, lead/scaled_reward, lead/prob_K,
    lead/mean_loss, lead/samples, lead/quarantined, lead/steps, lead/tokens, lead/supervised_tokens, lead/rows_used,
    lead/progress, lead/calibration_*.

    Determinism: a run resumed from a checkpoint, also one in the middle of a round, ends with the rows and on a CPU with the
    bits of weights of the run that was not interrupted. Two processes (torchrun, accelerate launch) give what one gives that
    accumulates over twice the micro-batches.
    """

    def __init__(self, *args: Any, pool: Pool, lead: LeadConfig | None = None, max_length: int = 1024, **kwargs: Any) -> None:
        check_pool("LeadTrainer", pool)
        super().__init__(*args, **kwargs)
        if self.train_dataset is None:
            tokenizer: Any = self.processing_class
            if tokenizer is None:
                raise ValueError(
                    "LeadTrainer: `processing_class` must be a tokenizer where there is no `train_dataset`, got None"
                )
            check_length(causal_lm_of(self.model), max_length)
            samples: Any = ChatSamples(pool, tokenizer, max_length)
            pool = samples.pool
        else:
            dataset: Any = self.train_dataset
            if not hasattr(dataset, "__len__") or len(dataset) != len(pool):
                got = f"{len(dataset)} rows" if hasattr(dataset, "__len__") else type(dataset).__name__
                raise ValueError(f"LeadTrainer: `train_dataset` must have the pool's {len(pool)} rows in order, got {got}")
            samples = self.dataset_samples()
        self.start_rounds(pool, lead, samples)

    def train_ended(self) -> None:
        super().train_ended()
        samples = self._rounds.samples_of
        if isinstance(samples, ChatSamples):
            cuts = CutCounts.merge(self._ranks.gather(samples.encoder.cuts))
            if self._ranks.is_first and (cuts.prompts or cuts.answers):
                logger.warning("%s", cuts)
