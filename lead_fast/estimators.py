"""The loss-change estimators `historical` (the paper) and `grad_norm` (this project's default), section 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_fast.reference_state import (
    ALL_PAIRS,
    ARM_OFFSETS,
    ERRORS,
    KAPPA,
    LR_SUM,
    OTHER_E,
    OWN_D,
    REVISITS,
    ROUND_LR,
    SLOPE_C,
)
from lead_fast.utility import Clocks, LossChangeEstimator, register_estimator


@register_estimator
class Historical(LossChangeEstimator):
    """One value for all rows of a round, from the weight change of this and earlier rounds.

        dL = -eta_sum * || beta * g_first + (1 - beta) * g_prev ||^2
        beta* = (c - q) / (a + c - 2 q) clipped to [0, 1],  a = ||g_first||^2, c = ||g_prev||^2, q = <g_first, g_prev>

    g is minus the round's weight change over its summed learning rate, g_prev the previous round's (any arm), g_first
    that of the arm's first visit. On an arm's first visit dL = -eta_sum * c. In the first round nothing is known: dL = 0.
    The value is the round's own: a row keeps the drop of the round it was last seen in.

    Source: arXiv 2505.07437 section 3; the published code's square-root form with a scalar cosine is not used.
    """

    name = "historical"
    needs_weights = True
    by_round = True

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        super().__init__(num_arms, adam_beta1, device)
        self.first: Tensor | None = None  # [K, size], g_first of the arms in `visited`
        self.visited = torch.zeros(num_arms, dtype=torch.bool, device=device)
        self.previous: Tensor | None = None
        self.round_drop = torch.zeros(1, dtype=torch.float64, device=device)  # [rounds + 1], 0 for rows never seen
        self.beta = torch.full((), -1.0, dtype=torch.float64, device=device)  # -1: there was none

    def coefficients(self, clocks: Clocks) -> Tensor:
        level = self.round_drop.expand(self.num_arms, -1)
        return torch.stack([torch.zeros_like(level), level])

    def end_round(self, clocks: Clocks, arms: Tensor, first_step: int, weight_change: Tensor | None) -> None:
        drop = torch.zeros((), dtype=torch.float64, device=self.device)
        if weight_change is not None and clocks.num_steps > first_step:
            eta_sum = clocks.clock[clocks.num_steps, LR_SUM] - clocks.clock[first_step, LR_SUM]
            # A learning rate of 0 moves nothing and says nothing.
            gradient = torch.where(eta_sum > 0.0, -weight_change / eta_sum.clamp_min(1e-300), 0.0).float()
            if self.first is None:
                self.first = gradient.new_zeros(self.num_arms, len(gradient))
            drop = eta_sum * self._norm_sq(arms, self.previous)
            new = torch.zeros_like(self.visited).index_fill(0, arms.clamp_min(0), True) & ~self.visited & (eta_sum > 0.0)
            self.first += new[:, None] * gradient
            self.visited |= new
            previous = gradient if self.previous is None else self.previous
            self.previous = torch.where(eta_sum > 0.0, gradient, previous)
        self.round_drop = torch.cat([self.round_drop, drop[None]])

    def _norm_sq(self, arms: Tensor, previous: Tensor | None) -> Tensor:
        """|| beta * g_first + (1 - beta) * g_prev ||^2; with several arms in a round, their first visits are averaged."""
        self.beta = torch.full_like(self.beta, -1.0)
        if previous is None or self.first is None:
            return torch.zeros_like(self.beta)
        known = self.visited[arms.clamp_min(0)] & (arms >= 0)
        firsts = self.first[arms.clamp_min(0)].double() * known[:, None]
        first, prev = firsts.sum(0) / known.sum().clamp_min(1), previous.double()
        a, c, q = first @ first, prev @ prev, first @ prev
        denominator = a + c - 2.0 * q
        fitted = ((c - q) / denominator.clamp_min(1e-300)).clamp(0.0, 1.0)
        self.beta = torch.where(denominator > 1e-12 * (a + c), fitted, 0.0)
        b = self.beta
        mixed = b * b * a + (1.0 - b) ** 2 * c + 2.0 * b * (1.0 - b) * q
        self.beta = torch.where(known.any(), self.beta, -1.0)
        return torch.where(known.any(), mixed, c)

    def snapshot(self, clocks: Clocks) -> dict[str, Tensor]:
        return {"beta": self.beta, "drop": self.round_drop[-1]}

    def describe(self, snapshot: dict[str, Tensor]) -> dict[str, Any]:
        beta = float(snapshot["beta"])
        return {"estimator": self.name, "beta": beta if beta >= 0.0 else None, "drop": float(snapshot["drop"])}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"visited": self.visited.clone(), "round_drop": self.round_drop.clone(), "beta": self.beta}
        if self.previous is not None and self.first is not None:
            state |= {"first": self.first.clone(), "previous": self.previous.clone()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.visited, self.round_drop, self.beta = (
            state[name].to(self.device).clone() for name in ("visited", "round_drop", "beta")
        )
        self.first, self.previous = (
            state[name].to(self.device).clone() if name in state else None for name in ("first", "previous")
        )


@register_estimator
class GradNorm(LossChangeEstimator):
    """Per row, from its own gradient norm, calibrated online.

        drop_i = (c + c_k) * eta_s * P_i * (1 - beta1^m) * exp(-kappa * tau)  +  d * tau_k  +  e * (tau - tau_k)

    P_i = G_i / (n_i * n_step); eta_s and n_step of the step the row was seen in; m optimizer steps since, its own
    included; tau the learning rate summed since, tau_k the part of it in the row's own arm.

    c, d, e: ridge regression on features scaled to unit mean square, with prior mean 0 and the weight of `PRIOR_PAIRS`
    pairs. c_k: each arm's own slope in what c leaves, shrunk by the same weight. kappa: of `KAPPAS` the one whose
    predictions, each made before its truth was seen, had the lowest squared error. Every observation is a pair (drop
    since last seen); a row's first visit has P = 0 and so informs d and e only. Below `MIN_PAIRS` pairs of a kind the
    prior stands: the estimate is then that of `none`. The pairs are kept by the operator `observe`, the fit is
    `calibrate` and the formula `grad_norm_coefficients` (`lead_fast.reference_state`).

    Source: this project. First-order expansion of the row's loss along its own part of the optimizer step.
    """

    name = "grad_norm"
    KAPPAS = (0.0, 0.25, 0.5, 1.0, 2.0)
    PRIOR_PAIRS = 10.0
    MIN_PAIRS = 30

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        super().__init__(num_arms, adam_beta1, device)
        kinds = len(self.KAPPAS)
        self.pairs = torch.zeros(kinds, num_arms, 12, dtype=torch.float64, device=device)
        self.totals = torch.zeros(ERRORS + kinds, dtype=torch.float64, device=device)
        self.fit = torch.zeros(1 + kinds, ARM_OFFSETS + num_arms, dtype=torch.float64, device=device)
        self.fit[1:, KAPPA] = torch.tensor(self.KAPPAS, dtype=torch.float64)

    def coefficients(self, clocks: Clocks) -> Tensor:
        return torch.ops.lead_fast.grad_norm_coefficients(
            clocks.clock, clocks.counters, clocks.unit, self.fit, self.adam_beta1, clocks.num_steps
        )

    def pair_state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.pairs, self.totals, self.fit

    def calibrate(self, clocks: Clocks) -> None:
        torch.ops.lead_fast.calibrate(self.pairs, self.totals, self.fit, self.PRIOR_PAIRS, float(self.MIN_PAIRS))

    def snapshot(self, clocks: Clocks) -> dict[str, Tensor]:
        return {"fit": self.fit[0], "totals": self.totals, "round_lr": clocks.unit[ROUND_LR]}

    def describe(self, snapshot: dict[str, Tensor]) -> dict[str, Any]:
        """c, d, e, c_k, kappa; d and e in nats per round at peak learning rate."""
        fit, unit = snapshot["fit"].tolist(), float(snapshot["round_lr"])
        totals = snapshot["totals"].tolist()
        revisits, pairs = int(totals[REVISITS]), int(totals[ALL_PAIRS])
        return {
            "estimator": self.name,
            "c": fit[SLOPE_C],
            "d": fit[OWN_D] * unit,
            "e": fit[OTHER_E] * unit,
            "c_k": fit[ARM_OFFSETS:],
            "kappa": fit[KAPPA],
            "pairs": pairs,
            "revisit_pairs": revisits,
            "prior": [name for name, n in (("c", revisits), ("d", pairs), ("e", pairs)) if n < self.MIN_PAIRS],
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in ("pairs", "totals", "fit")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("pairs", "totals", "fit"):
            getattr(self, name).copy_(state[name])


def keeps_grad_norm(estimator: LossChangeEstimator) -> bool:
    """Whether its drops are those of the regression that `observe` keeps for it: of a subclass that changes neither."""
    same = ("coefficients", "drop", "pair_state")
    return isinstance(estimator, GradNorm) and all(getattr(type(estimator), n) is getattr(GradNorm, n) for n in same)
