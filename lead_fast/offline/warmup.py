"""Warm-up: a short fine-tuning on a small random part of the pool, so that difficulty means something (section 2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from lead_fast.config import PrepareConfig
from lead_fast.optimization import Optimization, TrainingError, learning_rate, make_accelerator, step_batches
from lead_fast.packing import Sample

logger = logging.getLogger(__name__)


def warm_up(model: nn.Module, samples: Sequence[Sample], config: PrepareConfig) -> float:
    """Trains `model` once over `samples`, in order, at the run's own step size and peak rate.

    Returns:
        Mean of the steps' losses over the last tenth (at least one) of those with a finite one, nats per supervised token.

    Raises:
        TrainingError: no step had a finite loss.
    """
    optimization = Optimization(model, make_accelerator(config), config)
    ranks = optimization.ranks
    steps = step_batches(samples, [-1] * len(samples), config, ranks.world)
    losses: list[torch.Tensor] = []
    for number, batches in enumerate(tqdm(steps, desc="warm-up", delay=2, leave=False, disable=not ranks.is_first)):
        lr = learning_rate(number / len(steps), peak=config.peak_learning_rate, schedule="linear", warmup=0.03)
        losses.append(optimization.step(batches, lr).loss)
    found = torch.stack(losses).cpu()
    finite = found[torch.isfinite(found)]
    if len(finite) < len(found):
        logger.warning("warm-up: the loss of %d of %d steps was not finite: left out", len(found) - len(finite), len(found))
    if not len(finite):
        raise TrainingError("warm-up: the loss of no step was finite; look at the model, or use --precision fp32")
    return float(finite[-max(1, len(finite) // 10) :].mean())
