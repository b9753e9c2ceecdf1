"""Optimizer steps over packed batches, on accelerate: one process or several, whole weights or shards."""

from __future__ import annotations

import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, LoggerType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from tqdm import tqdm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from lead_fast.config import PrepareConfig
from lead_fast.device import to_device
from lead_fast.files import write_text
from lead_fast.first_order import FirstOrder
from lead_fast.layers import checkpoint_activations, compile_layers, liger_layers
from lead_fast.lora_linear import fuse_lora
from lead_fast.models import (
    PackedModel,
    forward_replaced,
    trained_parameters,
)
from lead_fast.ops import SampleStats
from lead_fast.packing import PackedBatch, Sample, balanced_fill, fill, pack, split_evenly, without_supervision
from lead_fast.ranks import Ranks
from lead_fast.shards import are_sharded, keep_output_precision

logger = logging.getLogger(__name__)

# For a process that writes, scores or evaluates while the others wait; by way of gloo one that has ended is noticed at once.
_LONGEST_WAIT = timedelta(hours=2)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


def make_accelerator(config: PrepareConfig) -> Accelerator:
    """accelerate decides device and processes; precision "auto" is bf16 on a GPU that has it, else fp32.

    Raises:
        TrainingError: the launcher started more processes than accelerate takes for one run.
    """
    precision = config.precision
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the launcher's; "no" is also what it writes by default
    if precision == "auto" and asked in ("bf16", "fp16"):
        precision = asked
    if precision == "auto":
        precision = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    # gloo beside NCCL: what hosts tell each other need not wait for the devices.
    backend = "cuda:nccl,cpu:gloo" if launched > 1 and torch.cuda.is_available() and not zero else None
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(backend=backend, timeout=_LONGEST_WAIT),
    ]
    accelerator = Accelerator(
        mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=handlers,
        cpu=launched > 1 and not torch.accelerator.is_available(),  # else accelerate sees no processes on a CPU
    )  # fmt: skip
    if zero:  # what is built here is built whole; `partitioned` is for what is loaded
        unset_hf_deepspeed_config()
    if accelerator.num_processes != launched:
        raise TrainingError(f"{launched} processes were started, and accelerate trains with {accelerator.num_processes}")
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that accelerate does not know, or whose package is not installed.

    Raises:
        ValueError: they are named.
    """
    known = [str(tracker) for tracker in LoggerType if tracker is not LoggerType.ALL]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"report_to: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    there = {str(tracker) for tracker in get_available_trackers()}
    if missing := sorted(set(names) - there):
        raise ValueError(f"report_to: {', '.join(missing)} is not installed; install it, or leave it out")


def start_trackers(
    accelerator: Accelerator, names: Sequence[str], folder: Path, options: dict[str, Any], *, num_steps: int
) -> None:
    """Opens trackers, which `accelerator.log` then feeds from the first process.

    Args:
        accelerator: of the run.
        names: as `check_trackers` takes them.
        folder: gets what they keep on disk, and the run's id, by which a resumed run goes on in the same one.
        options: of the run, shown beside its metrics.
        num_steps: optimizer steps done before; what a tracker holds of later ones is dropped or written over.
    """
    accelerator.log_with = filter_trackers(list(names), str(folder))
    simple = {name: value for name, value in options.items() if isinstance(value, int | float | str | bool)}
    accelerator.project_configuration.logging_dir = str(folder)
    run = {"tensorboard": {"purge_step": num_steps + 1} if num_steps else {}}
    if accelerator.is_main_process and {"wandb", "trackio"} & set(names):
        path = folder / "run-id"
        if not path.exists():
            write_text(path, secrets.token_hex(8))
        name = path.read_text()
        run |= {"wandb": {"id": name, "resume": "allow"}, "trackio": {"name": name, "resume": "allow"}}
    accelerator.init_trackers("lead-fast", config=simple, init_kwargs=run)


@contextmanager
def finished_trackers(accelerator: Accelerator) -> Iterator[None]:
    """Ends the trackers that were started, however the block ends."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def learning_rate(progress: float, *, peak: float, schedule: str, warmup: float) -> float:
    """Learning rate at `progress` in [0, 1]: a linear rise over the share `warmup`, then constant, linear or cosine decay."""
    if progress < warmup:
        return peak * max(progress, 1e-2 * warmup) / warmup
    after = (progress - warmup) / (1.0 - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - after, "cosine": 0.5 * (1.0 + math.cos(math.pi * min(after, 1.0)))}[schedule]
    return peak * max(factor, 0.0)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step of all processes.

    Attributes:
        loss: mean over supervised tokens, 0-d.
        num_items: supervised tokens.
        num_tokens: all tokens.
        grad_norm: of the whole gradient before clipping, 0-d; NaN where it is not known.
        seconds: that the host took; on a GPU the device may still be at work.
        taken: False where it was left out, because the gradient is not finite.
    """

    loss: Tensor
    num_items: int
    num_tokens: int
    grad_norm: Tensor
    seconds: float
    taken: bool = True


def is_fsdp(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's stage of ZeRO, None without DeepSpeed."""
    plugin: Any = accelerator.state.deepspeed_plugin if accelerator.distributed_type == DistributedType.DEEPSPEED else None
    return None if plugin is None else plugin.zero_stage


def is_zero3(accelerator: Accelerator) -> bool:
    return zero_stage(accelerator) == 3


def shards_weights(accelerator: Accelerator) -> bool:
    """The weights are sharded, by FSDP or ZeRO 3."""
    return is_fsdp(accelerator) or is_zero3(accelerator)


@contextmanager
def partitioned(accelerator: Accelerator) -> Iterator[None]:
    """Within, transformers has ZeRO 3 shard a model while it is loaded; nothing changes for anything else."""
    if not is_zero3(accelerator):
        yield
        return
    plugin: Any = accelerator.state.deepspeed_plugin
    plugin.set_deepspeed_weakref()
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


def shards_from_first(accelerator: Accelerator) -> bool:
    """FSDP takes the weights from the first process (its `cpu_ram_efficient_loading`, which launchers set by default)."""
    plugin: Any = accelerator.state.fsdp_plugin if is_fsdp(accelerator) else None
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading)


class Optimization:
    """A model with its AdamW under accelerate: one call is one optimizer step over packed micro-batches.

    Several processes make one step together: its micro-batches are dealt to them round robin, and the gradient is that of
    one process which accumulates over them all.

    Args:
        model: a causal LM or a peft model; its parameters with requires_grad are trained. FSDP shards one that is on the host
            layer by layer, so that no device ever holds it whole.
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
        # On a GPU one kernel in place of a dozen passes. Not under a gradient scaler: the kernel leaves a step out by itself,
        # and nobody would know.
        fused = True if accelerator.device.type == "cuda" and accelerator.scaler is None else None
        options: dict[str, Any] = {"lr": config.peak_learning_rate, "weight_decay": config.weight_decay, "fused": fused}
        optimizer = torch.optim.AdamW(parameters, **options)
        if is_fsdp(accelerator) and not accelerator.is_fsdp2:
            raise TrainingError("FSDP version must be 2 (accelerate launch --fsdp_version 2), got 1")
        if config.liger:
            if accelerator.device.type != "cuda":
                raise TrainingError(f"liger: its kernels need a GPU, got {accelerator.device.type}; leave --liger out")
            liger_layers(model)
        fuse_lora(model)
        packed = PackedModel(model, max_length=config.max_length, check=not is_fsdp(accelerator))
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        self.is_zero = accelerator.distributed_type == DistributedType.DEEPSPEED
        if self.is_zero:
            _prepare_zero(accelerator, config)
        if is_fsdp(accelerator):
            plugin: Any = accelerator.state.fsdp_plugin
            keep_output_precision(plugin)
            # Where the launcher says nothing of what is to be wrapped: the layers, one by one, and not all at once.
            plugin.auto_wrap_policy = plugin.auto_wrap_policy or transformer_auto_wrap_policy
        self.model, self.optimizer = accelerator.prepare(packed, optimizer)
        if not packed.checked:  # its weights are together only while its root is called
            with forward_replaced(packed, lambda _: packed.check()):
                packed(None)  # on a GPU FSDP expects an argument to move there
            reshard(packed)
        if config.compile:
            compile_layers(model)
        self.model.train()

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def packed(self) -> PackedModel:
        """The packed model without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)  # pyright: ignore[reportReturnType]

    @property
    def is_sharded(self) -> bool:
        """The weights are sharded, by FSDP or ZeRO 3."""
        return are_sharded(self.bare.parameters())

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
        start, num_items = time.perf_counter(), sum(batch.num_items for batch in batches)
        total = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        own = self.ranks.share(batches)
        # Gradients are exchanged at the last micro-batch: who has one less than the others still takes part.
        idle = self.ranks.idles(batches)
        for number, on_host in enumerate([*own, without_supervision(batches[0])] if idle else own):
            batch = on_host.to(self.device)
            is_idle, is_last = number == len(own), number + 1 == len(own) + idle
            statistics = None if observe is None or is_idle else "all"
            with self._sync_only(last=is_last), self._sketched(first_order, on_host, num_items):
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
        taken = self.is_zero or self.accelerator.scaler is not None or norm is None or bool(torch.isfinite(norm))
        if taken:
            self.optimizer.step()
            taken = not self.accelerator.optimizer_step_was_skipped
        else:
            logger.warning("a gradient is not finite: its optimizer step is left out")
        self.optimizer.zero_grad(set_to_none=True)
        if first_order is not None:
            first_order.stepped()
        grad_norm = torch.as_tensor(math.nan if norm is None else norm).detach()
        num_tokens, seconds = sum(batch.num_tokens for batch in batches), time.perf_counter() - start
        return StepResult(total, num_items, num_tokens, grad_norm, seconds, taken)

    def _sketched(self, first_order: FirstOrder | None, batch: PackedBatch, num_items: int) -> AbstractContextManager[None]:
        if first_order is None:
            return nullcontext()
        scaler = self.accelerator.scaler
        upstream = (1.0 if scaler is None else scaler.get_scale()) / max(num_items, 1)
        # Of the batch on the host: its boundaries are needed there.
        return first_order.collect(to_device(batch.rows, self.device), batch.cu_seqlens, batch.sample_items, upstream)

    @contextmanager
    def _sync_only(self, *, last: bool) -> Iterator[None]:
        self.accelerator.sync_gradients = last  # DeepSpeed takes its step in the backward of the last
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield


def reshard(model: nn.Module) -> None:
    """Shards again what a forward pass without backward leaves whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def scoring_model(model: nn.Module, accelerator: Accelerator, config: PrepareConfig) -> PackedModel:
    """A packed model for forward passes, sharded where training would shard it."""
    return (
        Optimization(model, accelerator, config).packed
        if shards_weights(accelerator)
        else PackedModel(model, max_length=config.max_length)
    )


def _prepare_zero(accelerator: Accelerator, config: PrepareConfig) -> None:
    """Tells DeepSpeed what it would ask of a data loader; gradients are accumulated as this loop says."""
    plugin: Any = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
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
    reshard(model)
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
