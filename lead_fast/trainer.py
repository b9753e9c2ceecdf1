"""The fine-tuning loop on accelerate: optimizer steps over packed batches, and LEAD's rounds around them."""

from __future__ import annotations

import logging
import math
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from lead_fast.config import PrepareConfig, TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.first_order import FirstOrder
from lead_fast.models import PackedModel, checkpoint_activations, compile_layers, trained_parameters
from lead_fast.ops import SampleStats
from lead_fast.packing import CutCounts, PackedBatch, Sample, balanced_fill, fill, pack, split_evenly, without_supervision
from lead_fast.ranks import Ranks
from lead_fast.rounds import Round, RoundReport

logger = logging.getLogger(__name__)

# A process that has ended is noticed at once; this is for one that writes, scores or evaluates while the others wait.
_LONGEST_WAIT = timedelta(hours=2)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


def make_accelerator(config: PrepareConfig) -> Accelerator:
    """accelerate decides device and processes; precision "auto" is bf16 on a GPU that has it, else fp32.

    Raises:
        TrainingError: the launcher started more processes than accelerate takes for one run.
    """
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=_LONGEST_WAIT),
    ]
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers,
        cpu=launched > 1 and not torch.accelerator.is_available(),  # else accelerate sees no processes on a CPU
    )  # fmt: skip
    if accelerator.num_processes != launched:
        raise TrainingError(f"{launched} processes were started, and accelerate trains with {accelerator.num_processes}")
    return accelerator


def learning_rate(progress: float, *, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate at `progress` in [0, 1]: a linear rise over the share `warmup`, then constant, linear or cosine decay."""
    if progress < warmup:
        return peak * max(progress, 1e-2 * warmup) / warmup
    after = (progress - warmup) / (1.0 - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - after, "cosine": 0.5 * (1.0 + math.cos(math.pi * min(after, 1.0)))}[schedule]
    return peak * max(factor, 0.0)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: its loss (mean over supervised tokens, 0-d tensor), supervised tokens, all tokens."""

    loss: Tensor
    num_items: int
    num_tokens: int


class Optimization:
    """A model with its AdamW under accelerate: one call is one optimizer step over packed micro-batches.

    Several processes make one step together: its micro-batches are dealt to them round robin, and the gradient is that of
    one process which accumulates over them all.

    Args:
        model: a causal LM or a peft model; its parameters with requires_grad are trained.
        accelerator: decides device, precision and processes.
        config: weight decay, gradient clipping, recomputed activations, compilation.

    Attributes:
        ranks: the processes.
        is_zero: DeepSpeed shards optimizer and gradients, takes the optimizer steps and clips; a gradient that is not finite is
            left to it.
        plain_layers: each layer runs once a micro-batch, as it is written.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator, config: PrepareConfig) -> None:
        self.accelerator, self.max_grad_norm = accelerator, config.max_grad_norm
        self.ranks = Ranks.started(accelerator.device)
        self.bare, self.plain_layers = model, not (config.gradient_checkpointing or config.compile)
        parameters = [p for _, p in trained_parameters(model)]
        if not parameters:
            raise TrainingError("no parameter is trainable: nothing to do")
        optimizer = torch.optim.AdamW(parameters, lr=config.peak_learning_rate, weight_decay=config.weight_decay)
        packed = PackedModel(model)
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if config.compile:
            compile_layers(model)
        self.is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.is_zero:
            _prepare_zero(accelerator, config)
        self.model, self.optimizer = accelerator.prepare(packed, optimizer)
        self.model.train()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def packed(self) -> PackedModel:
        """The packed model without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def step(
        self,
        batches: Sequence[PackedBatch],
        lr: float,
        observe: Callable[[Tensor, SampleStats], None] | None = None,
        first_order: FirstOrder | None = None,
    ) -> StepResult:
        """One optimizer step over micro-batches: the gradient of their mean loss over all supervised tokens.

        Args:
            batches: micro-batches of the whole step, the same for every process; accumulation gives the gradient of the one
                large batch.
            lr: learning rate of the step.
            observe: called with rows and per-sample statistics of each micro-batch of this process.
            first_order: sketches each micro-batch's gradients.
        """
        num_items = sum(batch.num_items for batch in batches)
        total = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        own = self.ranks.share(batches)
        # Gradients are exchanged at the last micro-batch: who has one less than the others still takes part.
        idle = self.ranks.idles(batches)
        for number, batch in enumerate([*own, without_supervision(batches[0])] if idle else own):
            batch = batch.to(self.device)
            is_idle, is_last = number == len(own), number + 1 == len(own) + idle
            statistics = None if observe is None or is_idle else "all"
            with self._sync_only(last=is_last), self._sketched(first_order, batch, num_items):
                out = self.model(batch, num_items=max(num_items, 1), stats=statistics)
                # The exchange takes the mean over processes, and the sum is wanted.
                self.accelerator.backward(out.loss * self.ranks.world if self.ranks.world > 1 else out.loss)
            total += out.loss.detach()
            if observe is not None and out.samples is not None:
                observe(batch.rows, out.samples)
        self.ranks.sum(total)
        limit = self.max_grad_norm if self.max_grad_norm > 0.0 else math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        # One NaN would reach every weight; its sample is quarantined by the engine, and the step is left out. In fp16 the
        # gradient scaler does that itself, and must see the step to lower its scale.
        if self.is_zero or self.accelerator.scaler is not None or norm is None or bool(torch.isfinite(norm)):
            self.optimizer.step()
        else:
            logger.warning("a gradient is not finite: its optimizer step is left out")
        self.optimizer.zero_grad(set_to_none=True)
        if first_order is not None:
            first_order.stepped()
        return StepResult(total, num_items, sum(batch.num_tokens for batch in batches))

    def _sketched(self, first_order: FirstOrder | None, batch: PackedBatch, num_items: int) -> AbstractContextManager[None]:
        if first_order is None:
            return nullcontext()
        scaler = self.accelerator.scaler
        upstream = (1.0 if scaler is None else scaler.get_scale()) / max(num_items, 1)
        return first_order.collect(batch.rows, batch.cu_seqlens, batch.sample_items, upstream)

    @contextmanager
    def _sync_only(self, *, last: bool) -> Iterator[None]:
        self.accelerator.sync_gradients = last  # DeepSpeed takes its step in the backward of the last
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield


def _prepare_zero(accelerator: Accelerator, config: PrepareConfig) -> None:
    """Tells DeepSpeed what it would ask of a data loader; gradients are accumulated as this loop says.

    Raises:
        TrainingError: ZeRO stage 3.
    """
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    if settings["zero_optimization"]["stage"] == 3:
        raise TrainingError("ZeRO stage 3 shards the LM head, which the fused loss needs whole: use stage 1 or 2, or FSDP")
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    settings |= {"train_batch_size": accelerator.num_processes, "gradient_clipping": config.max_grad_norm}


@torch.no_grad()
def evaluate(
    model: PackedModel,
    samples: Sequence[Sample],
    *,
    pack_tokens: int,
    device: torch.device,
    desc: str,
    ranks: Ranks | None = None,
) -> Tensor:
    """Mean nll per supervised token of each sample, fp32 [n] on the CPU, in evaluation mode; `ranks` share the work."""
    ranks = Ranks() if ranks is None else ranks
    was_training = model.training
    model.eval()
    losses = torch.zeros(len(samples), device=device)
    bins = fill([len(s) for s in samples], pack_tokens)
    for index in tqdm(ranks.share(bins), desc=desc, delay=2, leave=False, disable=not ranks.is_first):
        batch = pack([samples[i] for i in index]).to(device)
        losses[index] = model(batch, stats="loss").samples.loss.float()
    if ranks.idles(bins):  # where weights are sharded, all take part in each forward pass
        model(pack([samples[i] for i in bins[0]]).to(device), stats="loss")
    model.train(was_training)
    return ranks.sum(losses).cpu()


def step_batches(
    samples: Sequence[Sample], rows: Sequence[int], config: PrepareConfig, world: int = 1
) -> list[list[PackedBatch]]:
    """Packs samples, in order, into optimizer steps of at most `step_tokens`, each of up to `accumulation` micro-batches a
    process."""
    steps = []
    for index in balanced_fill([len(s) for s in samples], config.step_tokens):
        runs = split_evenly([len(samples[i]) for i in index], config.accumulation * world)
        steps.append([pack([samples[index[i]] for i in run], [rows[index[i]] for i in run]) for run in runs if run])
    return steps


class Seconds:
    """Wall-clock seconds by part of a run."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by part."""
        parts, self.parts = dict(self.parts), defaultdict(float)
        return {name: round(value, 6) for name, value in parts.items()}


#: gets a round that has ended; the fields returned go into its record
AfterRound = Callable[[Round, RoundReport], dict[str, Any]]


@dataclass
class OpenRound:
    """The position inside a round: rows used before it; learning rate and result of each of its optimizer steps so far."""

    used_before: int
    trained: list[tuple[float, StepResult]] = field(default_factory=list)


@dataclass
class TrainingRun:
    """What the rounds leave behind: one dict a round (see `round_record`), totals, held-out losses over training.

    `open` is the round that is being trained, None between rounds; `clock` holds the seconds that no round has yet.
    """

    rounds: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    trained_tokens: int = 0
    supervised_tokens: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    cuts: CutCounts = field(default_factory=CutCounts)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    clock: Seconds = field(default_factory=Seconds)
    open: OpenRound | None = None


def attach(engine: LeadEngine, optimization: Optimization) -> FirstOrder | None:
    """Shows estimators the weights that they follow; returns the one that wants the gradients as well, if any."""
    weights = [p for _, p in trained_parameters(optimization.bare)]
    followers = [name for name, e in engine.estimators.items() if e.needs_weights]
    if followers and any(isinstance(p, DTensor) for p in weights):
        raise TrainingError(f"estimator {followers[0]!r} follows whole weights, which FSDP shards; use grad_norm or none")
    engine.track(weights)
    first_order = next((e for e in engine.estimators.values() if isinstance(e, FirstOrder)), None)
    if first_order is not None and optimization.ranks.world > 1:
        raise TrainingError("estimator 'first_order' runs in one process; use grad_norm")
    if first_order is not None and not optimization.plain_layers:
        raise TrainingError(
            "estimator 'first_order' reads the layers as they run: leave --gradient-checkpointing and --compile out"
        )
    if first_order is not None and first_order.sketch is None:
        first_order.follow(optimization.bare, seed=engine.config.seed)
    return first_order


def run_rounds(
    engine: LeadEngine,
    optimization: Optimization,
    samples_of: Callable[[Sequence[int]], list[Sample]],
    config: TrainConfig,
    *,
    after_round: Mapping[str, AfterRound] | None = None,
    on_round: Callable[[Round, dict[str, Any]], None] | None = None,
    evaluate_now: Callable[[], dict[str, Any]] | None = None,
    run: TrainingRun | None = None,
    at_boundary: Callable[[TrainingRun], None] | None = None,
    desc: str = "LEAD rounds",
) -> TrainingRun:
    """Trains in rounds until the engine's budget (or `config.train_tokens`) is used.

    Args:
        engine: chooses the rows.
        optimization: trains on them.
        samples_of: tokenized samples of rows of the pool.
        config: step size, learning rate schedule, evaluation interval.
        after_round: called in order once a round has ended, by the name that its seconds are booked under.
        on_round: called after each round with the choice and its record.
        evaluate_now: held-out scores now; called before, after, and every `config.eval_every` rounds.
        run: a run to go on with, in the middle of its open round where it has one; engine and model must be at the same place.
        at_boundary: called with the run after each optimizer step but a round's last, and after each round: engine, model and
            run then stand at one place. What it raises ends the training there.

    Returns:
        The run's records.

    Raises:
        TrainingError: the loss of a whole round is not finite.
    """
    run, ranks = TrainingRun() if run is None else run, optimization.ranks
    clock, run.cuts.max_length = run.clock, config.max_length
    first_order = attach(engine, optimization)

    def score() -> None:
        if evaluate_now is not None:
            with clock.part("evaluate"):
                entry = {"round": engine.num_rounds, "trained_tokens": run.trained_tokens, **evaluate_now()}
                run.evaluations.append(entry)

    def boundary() -> None:
        if at_boundary is not None:
            with clock.part("checkpoint"):
                at_boundary(run)

    if not run.evaluations:
        score()
    total = config.train_tokens if config.train_tokens is not None else engine.budget
    done = run.trained_tokens if config.train_tokens else engine.num_used if run.open is None else run.open.used_before
    unit = "tok" if config.train_tokens else "row"
    with tqdm(total=total, initial=done, desc=desc, unit=unit, delay=2, disable=not ranks.is_first) as bar:
        while run.open is not None or config.train_tokens is None or run.trained_tokens < config.train_tokens:
            if run.open is None:
                used_before = engine.num_used
                with clock.part("select"):
                    rnd = engine.begin_round()
                if rnd is None:
                    break
                # A digest, so that ranks which disagree stop here and not in a wrong model.
                ranks.agree(f"the rows of round {rnd.number}", zlib.crc32(rnd.rows.numpy().tobytes()))
                run.open = OpenRound(used_before)
            else:
                rnd = engine.open_round
                assert rnd is not None  # engine and run stand at one place
            used_before, trained = run.open.used_before, run.open.trained
            with clock.part("data"):
                rows = rnd.rows.tolist()
                samples = samples_of(rows)
                steps = step_batches(samples, rows, config, ranks.world)
            for number in range(len(trained), len(steps)):
                lr = learning_rate(
                    _progress(engine, run, config, used_before, number / len(steps)),
                    peak=config.peak_learning_rate, schedule=config.schedule, warmup=config.warmup_ratio,
                )  # fmt: skip
                with clock.part("step"):
                    result = optimization.step(steps[number], lr, _timed_observe(engine, clock), first_order)
                with clock.part("estimate"):
                    engine.step(lr=lr, num_items=result.num_items)
                trained.append((lr, result))
                run.num_steps += 1
                run.trained_tokens += result.num_tokens
                run.supervised_tokens += result.num_items
                if number + 1 < len(steps):
                    boundary()
            with clock.part("estimate"):
                report = engine.end_round()
            notes: dict[str, Any] = {}
            for name, call in (after_round or {}).items():
                with clock.part(name):
                    notes |= call(rnd, report)
            parts = clock.take()
            # `observe` runs inside the step; it is counted once, as estimation.
            parts["step"] = round(parts.get("step", 0.0) - parts.pop("observe", 0.0), 6)
            record = round_record(rnd, report, trained, parts) | notes
            for arm, reward in zip(report.arms, report.rewards, strict=True):
                if not math.isfinite(reward):
                    logger.warning("round %d: no row of arm %d was observed; its reward is not counted", rnd.number, arm)
            run.open = None
            run.rounds.append(record)
            for sample in samples:
                run.cuts.add(sample)
            for name, value in parts.items():
                run.seconds[name] += value
            if on_round is not None:
                on_round(rnd, record)
            if record["mean_loss"] is None:
                raise TrainingError(
                    f"round {rnd.number}: the loss is not finite ({report.num_quarantined} of {len(rnd)} rows); "
                    "lower --learning-rate, or look at the quarantined rows in rounds.jsonl"
                )
            bar.update(record["tokens"] if config.train_tokens else engine.num_used - used_before)
            bar.set_postfix_str(f"round {rnd.number}, arm {rnd.arm}, loss {record['mean_loss']:.3f}", refresh=False)
            if config.eval_every and rnd.number % config.eval_every == 0:
                score()
            boundary()
    if run.rounds and run.evaluations and run.evaluations[-1]["round"] != engine.num_rounds:
        score()
    return run


def _progress(engine: LeadEngine, run: TrainingRun, config: TrainConfig, used_before: int, inside: float) -> float:
    """Progress in [0, 1] of the learning-rate schedule, `inside` of the way through the current round."""
    if config.train_tokens is not None:
        return min(1.0, run.trained_tokens / config.train_tokens)
    return min(1.0, (used_before + inside * (engine.num_used - used_before)) / engine.budget)


def _timed_observe(engine: LeadEngine, clock: Seconds) -> Callable[[Tensor, SampleStats], None]:
    def observe(rows: Tensor, samples: SampleStats) -> None:
        start = time.perf_counter()
        engine.observe(rows, samples)
        seconds = time.perf_counter() - start
        clock.parts["estimate"] += seconds
        clock.parts["observe"] += seconds

    return observe


def round_record(
    rnd: Round, report: RoundReport, trained: Sequence[tuple[float, StepResult]], seconds: dict[str, float]
) -> dict[str, Any]:
    """One line of rounds.jsonl. Log weights are those after the round's update, probabilities those of its draw.

    Args:
        trained: learning rate and result of each optimizer step.
        seconds: wall-clock seconds by part.
    """
    items = [result.num_items for _, result in trained]
    finite = [result for _, result in trained if math.isfinite(float(result.loss))]
    loss = sum(float(r.loss) * r.num_items for r in finite) / sum(r.num_items for r in finite) if finite else math.nan
    rewards = [reward if math.isfinite(reward) else None for reward in report.rewards]
    return {
        "round": rnd.number,
        "arm": rnd.arm,
        "arms": rnd.arms,
        "forced": report.forced,
        "uniform": report.uniforms,
        "task_uniforms": rnd.task_uniforms,
        "probs": report.probs.tolist(),
        "log_weights": report.log_weights.tolist(),
        "reward": rewards[0],
        "rewards": rewards,
        "scaled_rewards": report.scaled_rewards,
        "samples": len(rnd),
        "rows": rnd.rows.tolist(),
        "tokens": sum(result.num_tokens for _, result in trained),
        "supervised_tokens": sum(items),
        "steps": len(trained),
        "learning_rates": [lr for lr, _ in trained],
        "step_items": items,
        "mean_loss": loss if math.isfinite(loss) else None,
        "mean_sample_loss": report.mean_loss if math.isfinite(report.mean_loss) else None,
        "quarantined": report.num_quarantined,
        "quarantined_rows": report.quarantined,
        "calibration": report.calibration,
        "seconds": seconds,
    }


def write_candidates(rnd: Round, folder: Path) -> None:
    """Writes a round's candidates as Parquet: row, task, uses, utility, the choice's noise, and whether it was chosen."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lead_fast.files import atomic_path

    tables = [
        pa.table({
            "arm": pa.array([arm] * len(c.row), pa.int16()),
            "row": c.row.cpu().numpy(),
            "task": c.task.cpu().numpy(),
            "uses": c.uses.cpu().numpy(),
            "utility": c.utility.cpu().numpy(),
            "noise": c.noise.cpu().numpy(),
            "chosen": c.chosen.cpu().numpy(),
        })
        for arm, c in zip(rnd.arms, rnd.candidates, strict=True)
    ]  # fmt: skip
    with atomic_path(folder / f"round-{rnd.number:05d}.parquet", durable=True) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
