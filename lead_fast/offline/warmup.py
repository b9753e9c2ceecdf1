"""Warm-up: a short fine-tuning on a small random part of the pool, so that difficulty means something (section 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from tqdm import tqdm

from lead_fast.config import PrepareConfig
from lead_fast.optimization import Optimization, learning_rate, make_accelerator, step_batches
from lead_fast.packing import Sample


def warm_up(model: nn.Module, samples: Sequence[Sample], config: PrepareConfig) -> float:
    """Trains `model` once over `samples`, in order, at the run's own step size and peak rate.

    Returns:
        Mean of the steps' losses over the last tenth (at least one), nats per supervised token.
    """
    optimization = Optimization(model, make_accelerator(config), config)
    ranks = optimization.ranks
    steps = step_batches(samples, [-1] * len(samples), config, ranks.world)
    losses: list[torch.Tensor] = []
    for number, batches in enumerate(tqdm(steps, desc="warm-up", delay=2, leave=False, disable=not ranks.is_first)):
        lr = learning_rate(number / len(steps), peak=config.peak_learning_rate, schedule="linear", warmup=0.03)
        losses.append(optimization.step(batches, lr).loss)
    tail = losses[-max(1, len(losses) // 10) :]
    return float(torch.stack(tail).mean())
