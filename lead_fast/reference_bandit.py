"""The bandit's operators in plain PyTorch, in log weights: the specification, and the kernel where no library is loaded.

    log_w, counts, sums [K] fp64           log weight of each arm; its rewards so far and their sum
    scale [3] fp64                         count, mean and sum of squared deviations of all rewards so far
    mask [K] bool                          the set A of arms that still have something to give

Source: section 5 of the method's specification; Auer et al. 2002 (EXP3, EXP3.S); Neu 2015 (EXP3-IX).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

VARIANTS = ("exp3", "exp3_ix", "exp3s", "uniform", "greedy")

# Rewards are scaled by the running mean +- 2 standard deviations; a floor keeps a constant reward from being amplified.
_RELATIVE_FLOOR, _ABSOLUTE_FLOOR = 0.05, 1e-6
_REWARDS_BEFORE_SCALING = 3


def exp3_probs(log_w: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """P_k = (1 - gamma) * softmax over A (log w)_k + gamma / |A|, fp64 [K]; A, bool [K], is `mask`; all 0 where A is empty.

    The maximum is taken over A only: a retired arm with a huge weight must not push the others to 0.
    """
    size = mask.sum().clamp_min(1).double()
    floor = torch.full_like(size, gamma) / size  # a number over a tensor would go through the reciprocal, an ulp below
    inside = torch.where(mask.any(), log_w.masked_fill(~mask, -math.inf), 0.0)
    return torch.where(mask, (1.0 - gamma) * torch.softmax(inside, 0) + floor, 0.0)


def exp3_draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Arms int64 [m], one for each uniform number, without replacement; -1 where no probability is left.

    An arm is the first whose cumulative probability exceeds the uniform number times what is left in all; never an arm of
    probability 0.
    """
    left, arms = probs.clone(), torch.full_like(uniforms, -1, dtype=torch.int64)
    for number in range(len(uniforms)):
        cumulative = left.cumsum(0)
        beyond = (cumulative > uniforms[number] * cumulative[-1]) & (left > 0)
        # Where rounding leaves no such arm, the last possible one.
        possible = torch.arange(len(left), device=left.device).masked_fill(left <= 0, -1)
        drawn = torch.where(beyond.any(), beyond.int().argmax(), possible.max())
        arms[number] = drawn
        left = left.index_fill(0, drawn.clamp_min(0)[None], 0.0)
    return arms


def exp3_update(
    log_w: Tensor, mask: Tensor, arms: Tensor, rewards: Tensor, probs: Tensor, gamma: float, variant: int, share: float
) -> Tensor:
    """Log weights after the rewards of `arms`, in their order: fp64 [K].

    exp3: + gamma/|A| * r / p. exp3s: the same, then every arm of A receives e * share / |A| of the total weight. exp3_ix:
    - gamma/|A| * l / (p + gamma/(2|A|)) with the loss l = (1 - r) / 2. Other variants leave the weights alone. After each,
    the largest weight over A is shifted to 0: only differences matter, and a million updates at the bounds stay finite.

    Args:
        arms: int64 [m]; entries of -1 are skipped.
        rewards: fp64 [m] in [-1, 1]; entries of NaN are skipped. probs: fp64 [m], with which each arm was drawn.
        variant: place in `VARIANTS`.

    Source: Auer et al. 2002 (EXP3, EXP3.S); Neu 2015 (EXP3-IX).
    """
    name, count = VARIANTS[variant], mask.sum().double()
    rate = torch.full_like(count, gamma) / count
    log_w = log_w.clone()
    for arm, reward, prob in zip(arms, rewards, probs, strict=True):
        take = (arm >= 0) & ~torch.isnan(reward) & (count > 0)
        at = arm.clamp_min(0)
        after = log_w.clone()
        if name in ("exp3", "exp3s"):
            after[at] += rate * reward / prob
            if name == "exp3s" and share > 0.0:
                total = log_w.masked_fill(~mask, -math.inf).logsumexp(0)
                after = torch.where(mask, torch.logaddexp(after, total + torch.log(math.e * share / count)), after)
        elif name == "exp3_ix":
            after[at] -= rate * ((1.0 - reward) / 2.0) / (prob + rate / 2.0)
        after = after - after.masked_fill(~mask, -math.inf).max()
        log_w = torch.where(take, after, log_w)
    return log_w


def scale_rewards(scale: Tensor, rewards: Tensor) -> Tensor:
    """Rewards scaled to [-1, 1] by their running mean +- 2 standard deviations, fp64 [m]; 0 until three are known.

    Args:
        scale: fp64 [3], count, mean and sum of squared deviations of all rewards so far (Welford); moves.
        rewards: fp64 [m], raw; NaN counts as nothing and gives 0.
    """
    out = torch.zeros_like(rewards)
    for number, reward in enumerate(rewards):
        count, mean, squares = scale.clone()
        count, delta = count + 1.0, reward - mean
        mean = mean + delta / count
        squares = squares + delta * (reward - mean)
        deviation = torch.sqrt(squares / (count - 1.0).clamp_min(1.0))
        deviation = torch.maximum(deviation, _RELATIVE_FLOOR * mean.abs()).clamp_min(_ABSOLUTE_FLOOR)
        scaled = ((reward - mean) / (2.0 * deviation)).clamp(-1.0, 1.0)
        known = ~torch.isnan(reward)
        out[number] = torch.where(known & (count >= _REWARDS_BEFORE_SCALING), scaled, 0.0)
        scale.copy_(torch.where(known, torch.stack([count, mean, squares]), scale))
    return out


def bandit_draw(
    log_w: Tensor, counts: Tensor, sums: Tensor, mask: Tensor, uniforms: Tensor, gamma: float, variant: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one arm for each of `uniforms`, fp64 [m], without replacement.

    Args:
        log_w: fp64 [K]. counts, sums: fp64 [K], each arm's rewards so far. mask: bool [K], the set A.
        variant: place in `VARIANTS`; exp3_ix explores through its estimate of the loss and mixes nothing in, greedy takes
            the highest mean reward, arms without one first.

    Returns:
        Arms int64 [m], -1 where none was left; the probability each was drawn with, fp64 [m], min(1, m * P_k): exact for
        m = 1, an upper bound otherwise; all probabilities, fp64 [K], 0 where A is empty.
    """
    name = VARIANTS[variant]
    if name == "greedy":
        means = torch.where(counts > 0, sums / counts.clamp_min(1.0), math.inf)
        best = means.masked_fill(~mask, -math.inf).argmax()
        probs = (torch.arange(len(means), device=means.device) == best).double() * mask
    elif name == "uniform":
        probs = exp3_probs(torch.zeros_like(log_w), mask, 0.0)
    else:
        probs = exp3_probs(log_w, mask, 0.0 if name == "exp3_ix" else gamma)
    arms = exp3_draw(probs, uniforms)
    drawn = arms >= 0
    return arms, torch.where(drawn, (drawn.sum() * probs[arms.clamp_min(0)]).clamp_max(1.0), 0.0), probs


def bandit_update(
    log_w: Tensor, scale: Tensor, counts: Tensor, sums: Tensor, mask: Tensor, arms: Tensor, rewards: Tensor, probs: Tensor,
    gamma: float, variant: int, share: float,
) -> Tensor:  # fmt: skip
    """Takes the raw rewards of `arms`, in their order, into the bandit's state; returns them scaled to [-1, 1], fp64 [m].

    An arm of -1 or a reward of NaN counts as nothing and gives 0. See `scale_rewards` and `exp3_update`.
    """
    rewards = torch.where(arms >= 0, rewards, math.nan)
    counted = ~rewards.isnan()
    scaled = scale_rewards(scale, rewards)
    counts.index_add_(0, arms.clamp_min(0), counted.double())
    sums.index_add_(0, arms.clamp_min(0), torch.where(counted, rewards, 0.0))
    log_w.copy_(exp3_update(log_w, mask, arms, torch.where(counted, scaled, math.nan), probs, gamma, variant, share))
    return scaled
