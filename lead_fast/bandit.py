"""The EXP3 family over difficulty arms, in log weights (section 5).

The arithmetic is that of the operators `exp3_probs`, `exp3_draw` and `exp3_update`, and of `bandit_draw` and
`bandit_update`, which do it on a state (`lead_fast.reference_state`): fp64 throughout, so that a run is reproducible from
its log. The functions here take one arm and plain numbers; `Bandit` holds the state on a device and names the variants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_fast import state as _state  # noqa: F401, its import defines torch.ops.lead_fast.exp3_probs and the rest
from lead_fast.reference_state import VARIANTS


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
    return torch.ops.lead_fast.exp3_probs(log_w.double(), mask, gamma)


def exp3_draw(probs: Tensor, uniform: float) -> int:
    """The arm whose cumulative probability first exceeds `uniform`; never an arm of probability 0.

    Args:
        probs: fp64 [K], summing to 1 up to rounding.
        uniform: a number in (0, 1).
    """
    return int(torch.ops.lead_fast.exp3_draw(probs.double(), probs.new_full((1,), uniform, dtype=torch.float64)))


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

    def numbers(value: float) -> Tensor:
        return torch.full((1,), value, dtype=torch.float64, device=log_w.device)

    arms = torch.full((1,), arm, dtype=torch.int64, device=log_w.device)
    place = VARIANTS.index(variant)
    return torch.ops.lead_fast.exp3_update(log_w.double(), mask, arms, numbers(reward), numbers(prob), gamma, place, share)


class Bandit:
    """State of the bandit over K arms, on a device: log weights, reward scale, mean reward by arm. Nothing here waits for it.

    Args:
        num_arms: K.
        variant: one of `VARIANTS`.
        gamma: exploration in (0, 1]. `exp3` and `exp3s` never draw an arm of A with less than gamma / |A|; `exp3_ix`
            explores through its loss estimate instead and mixes nothing in.
        share: see `exp3_update`.
        device: None is the CPU.
    """

    def __init__(
        self, num_arms: int, variant: str = "exp3", gamma: float = 0.1, share: float = 0.001, device: torch.device | None = None
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"Bandit: `variant` must be one of {', '.join(VARIANTS)}, got {variant!r}")
        self.variant, self.gamma, self.share = variant, gamma, share
        self._place = VARIANTS.index(variant)
        self.log_w = torch.zeros(num_arms, dtype=torch.float64, device=device)
        self.scale = torch.zeros(3, dtype=torch.float64, device=device)  # count, mean, sum of squared deviations
        self.counts = torch.zeros(num_arms, dtype=torch.float64, device=device)
        self.sums = torch.zeros(num_arms, dtype=torch.float64, device=device)

    def probs(self, mask: Tensor) -> Tensor:
        """Probabilities of the next draw, fp64 [K]; `mask` is the set A, bool [K]. All 0 where A is empty."""
        return self.draw(mask, self.log_w[:0])[2]

    def draw(self, mask: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws one arm for each of `uniforms`, fp64 [m], without replacement.

        Returns:
            arms, int64 [m], -1 where no arm was left; the probability each was drawn with, fp64 [m], min(1, m * P_k): exact
            for m = 1, an upper bound otherwise; all probabilities, fp64 [K].
        """
        return torch.ops.lead_fast.bandit_draw(self.log_w, self.counts, self.sums, mask, uniforms, self.gamma, self._place)

    def update(self, mask: Tensor, arms: Tensor, probs: Tensor, rewards: Tensor) -> Tensor:
        """Takes the raw rewards of `arms`, drawn with `probs`, all [m]; returns them scaled to [-1, 1], fp64 [m].

        An arm of -1 or a reward of NaN counts as nothing.
        """
        return torch.ops.lead_fast.bandit_update(
            self.log_w, self.scale, self.counts, self.sums, mask, arms, rewards, probs, self.gamma, self._place, self.share
        )

    def reachable(self, num_rounds: int) -> float:
        """The largest probability that one of K arms could have after `num_rounds` rounds, each as good for it as can be.

        At few rounds EXP3 can hardly move; reports state this bound beside what happened. 1 for `greedy`, 1/K for `uniform`.
        """
        if self.variant == "greedy":
            return 1.0
        other = Bandit(len(self.log_w), self.variant, self.gamma, self.share)
        mask = torch.ones(len(self.log_w), dtype=torch.bool)
        for _ in range(num_rounds):
            probs = other.probs(mask)
            if float(probs[0]) > 1.0 - self.gamma:
                break
            # Rewards of its own raise an arm; under exp3_ix only the losses of others do.
            arm = 1 + int(probs[1:].argmax()) if self.variant == "exp3_ix" and len(probs) > 1 else 0
            reward = -1.0 if self.variant == "exp3_ix" else 1.0
            other.log_w = exp3_update(
                other.log_w, mask, arm, reward, float(probs[arm]), self.gamma, variant=self.variant, share=self.share
            )  # fmt: skip
        return float(other.probs(mask)[0])

    def state_dict(self) -> dict[str, Any]:
        """Tensors; `load_state_dict` restores them exactly."""
        return {name: getattr(self, name).clone() for name in self._state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`; the number of arms must agree."""
        if state["log_w"].shape != self.log_w.shape:
            raise ValueError(f"Bandit: `log_w` must have {len(self.log_w)} arms, got {tuple(state['log_w'].shape)}")
        for name in self._state:
            getattr(self, name).copy_(state[name])

    _state = ("log_w", "scale", "counts", "sums")
