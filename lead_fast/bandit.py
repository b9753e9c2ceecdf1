"""The EXP3 family over difficulty arms, in log weights (section 5).

Every function is pure: tensors in, tensors out, fp64 throughout, so that a run is reproducible from its log. `Bandit`
holds the state and names the variants.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

VARIANTS = ("exp3", "exp3_ix", "exp3s", "uniform", "greedy")

# Rewards are scaled by the running mean +- 2 standard deviations; a floor keeps a constant reward from being amplified.
_RELATIVE_FLOOR, _ABSOLUTE_FLOOR = 0.05, 1e-6
_REWARDS_BEFORE_SCALING = 3


def exp3_probs(log_w: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Arm probabilities P_k = (1 - gamma) * softmax over A (log w)_k + gamma / |A|.

    Args:
        log_w: log weights, fp64 [K].
        mask: the set A of arms that still have something to give, bool [K].
        gamma: exploration in [0, 1]; 0 gives the plain softmax.

    Returns:
        fp64 [K], 0 outside A, summing to 1.

    Raises:
        ValueError: no arm is in A.

    Source: Auer et al. 2002, EXP3; arXiv 2505.07437 section 4. The maximum is taken over A only: a retired arm with a
    huge weight must not push the others to 0.
    """
    if not bool(mask.any()):
        raise ValueError("exp3_probs: `mask` must have at least one arm, got none")
    softmax = torch.softmax(log_w.double().masked_fill(~mask, -math.inf), 0)
    return torch.where(mask, (1.0 - gamma) * softmax + gamma / int(mask.sum()), 0.0)


def exp3_draw(probs: Tensor, uniform: float) -> int:
    """The arm whose cumulative probability first exceeds `uniform`; never an arm of probability 0.

    Args:
        probs: fp64 [K], summing to 1 up to rounding.
        uniform: a number in (0, 1).
    """
    cumulative = probs.double().cumsum(0)
    # Scaled by the total, so that rounding of the sum cannot send a uniform number near 1 past the last arm.
    arm = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    possible = probs.nonzero().flatten()
    return min(arm, int(possible[-1]))


def exp3_update(
    log_w: Tensor,
    mask: Tensor,
    arm: int,
    reward: float,
    prob: float,
    gamma: float,
    *,
    variant: str = "exp3",
    share: float = 0.0,
) -> Tensor:
    """Log weights after one reward.

    Args:
        log_w: fp64 [K].
        mask: the arms that could be drawn, bool [K].
        arm: the arm drawn.
        reward: scaled reward in [-1, 1].
        prob: probability with which `arm` was drawn.
        gamma: exploration; the learning rate is gamma / |A|.
        variant: "exp3": + gamma/|A| * r / p. "exp3s": the same, then every arm of A receives e * share / |A| of the total
            weight. "exp3_ix": - gamma/|A| * l / (p + gamma/(2|A|)) with the loss l = (1 - r) / 2. "uniform" and "greedy"
            leave the weights alone.
        share: weight shared by "exp3s".

    Returns:
        fp64 [K], shifted so that the largest weight over A is 0: only differences matter, and a million updates at the
        bounds stay finite.

    Source: Auer et al. 2002 (EXP3, EXP3.S); Neu 2015 (EXP3-IX).
    """
    count = int(mask.sum())
    rate = gamma / count
    log_w = log_w.double().clone()
    if variant in ("exp3", "exp3s"):
        before = log_w.masked_fill(~mask, -math.inf)
        log_w[arm] += rate * reward / prob
        if variant == "exp3s" and share > 0.0:
            shared = before.logsumexp(0) + math.log(math.e * share / count)
            log_w = torch.where(mask, torch.logaddexp(log_w, shared), log_w)
    elif variant == "exp3_ix":
        log_w[arm] -= rate * ((1.0 - reward) / 2.0) / (prob + rate / 2.0)
    return log_w - log_w[mask].max()


@dataclass
class RewardScale:
    """Running mean and spread of the raw rewards (Welford), and the map to [-1, 1]."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, reward: float) -> float:
        """Takes a raw reward and returns it scaled: 0 until three rewards are known."""
        self.count += 1
        delta = reward - self.mean
        self.mean += delta / self.count
        self.squares += delta * (reward - self.mean)
        if self.count < _REWARDS_BEFORE_SCALING:
            return 0.0
        deviation = math.sqrt(self.squares / (self.count - 1))
        deviation = max(deviation, _RELATIVE_FLOOR * abs(self.mean), _ABSOLUTE_FLOOR)
        return max(-1.0, min(1.0, (reward - self.mean) / (2.0 * deviation)))


@dataclass(frozen=True)
class Draw:
    """One round's draw: the arms, the probability each was drawn with, all probabilities, the numbers it came from."""

    arms: list[int]
    probs: list[float]
    all_probs: Tensor
    uniforms: list[float]
    forced: bool


class Bandit:
    """State of the bandit over K arms: log weights, reward scale, mean reward by arm.

    Args:
        num_arms: K.
        variant: one of `VARIANTS`.
        gamma: exploration in (0, 1]. `exp3` and `exp3s` never draw an arm of A with less than gamma / |A|; `exp3_ix`
            explores through its loss estimate instead and mixes nothing in.
        share: see `exp3_update`.
    """

    def __init__(self, num_arms: int, variant: str = "exp3", gamma: float = 0.1, share: float = 0.01) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"Bandit: `variant` must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.variant, self.gamma, self.share = variant, gamma, share
        self.log_w = torch.zeros(num_arms, dtype=torch.float64)
        self.scale = RewardScale()
        self.counts = torch.zeros(num_arms, dtype=torch.int64)
        self.sums = torch.zeros(num_arms, dtype=torch.float64)

    def probs(self, mask: Tensor) -> Tensor:
        """Probabilities of the next draw, fp64 [K]; `mask` is the set A, bool [K]."""
        if self.variant == "uniform":
            return exp3_probs(torch.zeros_like(self.log_w), mask, 0.0)
        if self.variant == "greedy":
            untried = mask & (self.counts == 0)
            means = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), math.inf)
            best = int(means.masked_fill(~mask, -math.inf).argmax()) if not untried.any() else int(untried.nonzero()[0])
            return torch.nn.functional.one_hot(torch.tensor(best), len(means)).double()
        return exp3_probs(self.log_w, mask, 0.0 if self.variant == "exp3_ix" else self.gamma)

    def draw(self, mask: Tensor, uniforms: list[float]) -> Draw:
        """Draws one arm per uniform number, without replacement.

        The probability of an arm in a draw of m is min(1, m * P_k): exact for m = 1, an upper bound otherwise.
        """
        probs = self.probs(mask)
        left, arms = probs.clone(), []
        for uniform in uniforms[: int((probs > 0).sum())]:
            arms.append(exp3_draw(left / left.sum(), uniform))
            left[arms[-1]] = 0.0
        return Draw(arms, [min(1.0, len(arms) * float(probs[a])) for a in arms], probs, uniforms[: len(arms)], forced=False)

    def forced(self, mask: Tensor, arm: int) -> Draw:
        """The visit of an arm that was not drawn: probability 1 for the update, the bandit's own in the log."""
        return Draw([arm], [1.0], self.probs(mask), [], forced=True)

    def update(self, mask: Tensor, arm: int, prob: float, reward: float) -> float:
        """Takes the raw reward of `arm`, drawn with probability `prob`; returns it scaled to [-1, 1]."""
        scaled = self.scale.add(reward)
        self.counts[arm] += 1
        self.sums[arm] += reward
        self.log_w = exp3_update(self.log_w, mask, arm, scaled, prob, self.gamma, variant=self.variant, share=self.share)
        return scaled

    def reachable(self, num_rounds: int) -> float:
        """The largest probability that one of K arms could have after `num_rounds` maximal rewards.

        At few rounds EXP3 can hardly move; reports state this bound beside what happened.
        """
        log_w, mask = torch.zeros_like(self.log_w), torch.ones_like(self.log_w, dtype=torch.bool)
        for _ in range(num_rounds):
            prob = float(exp3_probs(log_w, mask, self.gamma)[0])
            if prob > 1.0 - self.gamma:
                break
            log_w = exp3_update(log_w, mask, 0, 1.0, prob, self.gamma)
        return float(exp3_probs(log_w, mask, self.gamma)[0])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers; `load_state_dict` restores them exactly."""
        scale = torch.tensor([self.scale.count, self.scale.mean, self.scale.squares], dtype=torch.float64)
        return {"log_w": self.log_w.clone(), "counts": self.counts.clone(), "sums": self.sums.clone(), "scale": scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; the number of arms must agree."""
        if state["log_w"].shape != self.log_w.shape:
            raise ValueError(f"Bandit: `log_w` must have {len(self.log_w)} arms, got {tuple(state['log_w'].shape)}")
        self.log_w, self.counts, self.sums = (state[k].clone() for k in ("log_w", "counts", "sums"))
        count, mean, squares = state["scale"].tolist()
        self.scale = RewardScale(int(count), mean, squares)
