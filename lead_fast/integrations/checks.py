"""What a host trainer may not be asked for here, said before training starts."""

from __future__ import annotations

import logging
from typing import Any

from transformers import Trainer

from lead_fast.pool import Pool

logger = logging.getLogger(__name__)


def check_pool(op: str, pool: Any) -> None:
    """Refuses what is no pool, by name.

    Raises:
        TypeError: `pool` is something else.
    """
    if not isinstance(pool, Pool):
        raise TypeError(
            f"{op}: `pool` must be a Pool, by Pool.load(folder) or Pool.from_jsonl(path), got {type(pool).__name__}"
        )


def check_host(op: str, trainer: Any) -> None:
    """Refuses arguments that would make rounds, packing or the fused loss wrong.

    Args:
        op: name of the trainer's class.
        trainer: the host, set up.

    Raises:
        ValueError: names the argument, what is expected and what was given. ImportError: transformers is too old.
    """
    if not hasattr(Trainer, "loss_is_scaled_for_ga"):
        raise ImportError(f"{op}: transformers must be 5.19 or newer, whose Trainer leaves the loss's scale to its subclass")
    args, model = trainer.args, trainer.model
    for bad, name, expected in (
        (args.n_gpu > 1, "n_gpu", f"1: make one GPU visible (CUDA_VISIBLE_DEVICES), got {args.n_gpu}"),
        (trainer.is_model_parallel, "model", "on one device, got one over several (device_map)"),
        (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2, "args", "of FSDP's version 2, got version 1"),
        (args.parallelism_config is not None, "parallelism_config", f"None, got {args.parallelism_config!r}"),
        (args.dataloader_num_workers > 0, "dataloader_num_workers",
         f"0: workers read ahead of the round, got {args.dataloader_num_workers}"),
        (args.train_sampling_strategy != "random", "train_sampling_strategy",
         f"'random', which leaves the order to LEAD, got {args.train_sampling_strategy!r}"),
        (args.auto_find_batch_size, "auto_find_batch_size", "False: a restart would choose other rows, got True"),
        (args.label_smoothing_factor != 0, "label_smoothing_factor",
         f"0: the fused loss has none, got {args.label_smoothing_factor}"),
        (args.neftune_noise_alpha is not None, "neftune_noise_alpha",
         f"None: its noise scales with the length of the batch, not of the sample, got {args.neftune_noise_alpha}"),
        (trainer.compute_loss_func is not None, "compute_loss_func", "None: the fused loss is the loss, got a function"),
        (trainer.model_init is not None, "model_init", "None: give the model itself, got a function"),
        (_prompt_learning(model), "model", "a causal LM or one with adapters such as LoRA, got one with a learned prompt"),
        (bool(wrapped := _does_more_outside(model)), "model",
         f"a causal LM or one with adapters that act inside its layers, got {wrapped}"),
    ):  # fmt: skip
        if bad:
            raise ValueError(f"{op}: `{name}` must be {expected}")
    for name in ("save_strategy", "eval_strategy"):
        if getattr(args, name) == "epoch":
            logger.warning("%s: a run is one epoch, so `%s` 'epoch' means once, at its end; 'steps' comes more often", op, name)


def _does_more_outside(model: Any) -> str:
    """The kind of adapters whose wrapper does something of its own around the model's forward, where packed batches go past."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return ""
    active: Any = model.active_adapters
    names: Any = active() if callable(active) else active  # a method of transformers' own
    for name in names:
        if (kind := getattr(configs[name].peft_type, "value", "")) == "ADALORA":
            return f"{kind}, whose wrapper adds a term to the loss"
        if getattr(configs[name], "alora_invocation_tokens", None) is not None:
            return "activated LoRA, whose wrapper tells each layer where an adapter begins"
    return ""


def _prompt_learning(model: Any) -> bool:
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))
