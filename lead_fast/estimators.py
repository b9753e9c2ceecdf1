"""The loss-change estimators `historical` (the paper) and `grad_norm` (this project's default), section 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lead_fast.utility import Clocks, LossChangeEstimator, UtilityTable, register_estimator


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

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        super().__init__(num_arms, adam_beta1, device)
        self.first: dict[int, Tensor] = {}
        self.previous: Tensor | None = None
        self.round_drop = torch.zeros(1, dtype=torch.float32, device=device)  # [rounds + 1], 0 for rows never seen
        self.beta: float | None = None

    def drop(self, table: UtilityTable, clocks: Clocks, rows: Tensor) -> Tensor:
        number = table.round[rows].long()
        closed = number < len(self.round_drop)  # the round that is open has no value yet
        return torch.where(closed, self.round_drop[torch.where(closed, number, 0)], 0.0)

    def end_round(self, clocks: Clocks, arms: list[int], first_step: int, weight_change: Tensor | None) -> None:
        eta_sum = float(clocks.lr_sum[clocks.num_steps] - clocks.lr_sum[first_step])
        drop, gradient = 0.0, None
        if weight_change is not None and eta_sum > 0.0:
            gradient = -weight_change / eta_sum
            # With several arms in a round, their first visits are averaged.
            firsts = [self.first[arm] for arm in arms if arm in self.first]
            first = torch.stack(firsts).mean(0) if firsts else None
            drop = eta_sum * self._norm_sq(first, self.previous)
            for arm in arms:
                self.first.setdefault(arm, gradient)
            self.previous = gradient
        self.round_drop = torch.cat([self.round_drop, self.round_drop.new_tensor([drop])])

    def _norm_sq(self, first: Tensor | None, previous: Tensor | None) -> float:
        self.beta = None
        if previous is None:
            return 0.0
        c = float(previous.double().square().sum())
        if first is None:
            return c
        a, q = float(first.double().square().sum()), float(first.double() @ previous.double())
        denominator = a + c - 2.0 * q
        self.beta = 0.0
        if denominator > 1e-12 * (a + c):
            self.beta = min(1.0, max(0.0, (c - q) / denominator))
        b = self.beta
        return b * b * a + (1.0 - b) ** 2 * c + 2.0 * b * (1.0 - b) * q

    def calibration(self) -> dict[str, Any]:
        return {"estimator": self.name, "beta": self.beta, "drop": float(self.round_drop[-1])}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {f"first.{arm}": vector.clone() for arm, vector in self.first.items()}
        if self.previous is not None:
            state["previous"] = self.previous.clone()
        return state | {"round_drop": self.round_drop.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = {int(k.split(".")[1]): v.clone() for k, v in state.items() if k.startswith("first.")}
        self.previous = state["previous"].clone() if "previous" in state else None
        self.round_drop = state["round_drop"].clone()


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
    prior stands: the estimate is then that of `none`.

    Source: this project. First-order expansion of the row's loss along its own part of the optimizer step.
    """

    name = "grad_norm"
    KAPPAS = (0.0, 0.25, 0.5, 1.0, 2.0)
    PRIOR_PAIRS = 10.0
    MIN_PAIRS = 30

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        super().__init__(num_arms, adam_beta1, device)
        kinds = len(self.KAPPAS)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        # Sufficient statistics per kappa and arm: X^T X, X^T y; numbers of pairs [revisits, all]; past squared errors.
        self.xtx, self.xty = zeros(kinds, num_arms, 3, 3), zeros(kinds, num_arms, 3)
        self.pairs, self.errors = zeros(2), zeros(kinds)
        # What `drop` uses: coefficients (c, d, e) [kinds, 3], arm offsets c_k [kinds, K], index of kappa.
        self.coefficients, self.offsets = zeros(kinds, 3), zeros(kinds, num_arms)
        self.best = torch.zeros((), dtype=torch.int64, device=device)
        self.round_lr = 1.0  # the unit of tau at the last fit: regression uses raw sums, reports this unit

    def _features(self, table: UtilityTable, clocks: Clocks, rows: Tensor) -> Tensor:
        """Features of each kappa's regression, fp64 [kinds, R, 3]."""
        step = table.step[rows].long()
        now = clocks.num_steps
        m = (now - step).double()
        tau = clocks.lr_sum[now] - clocks.lr_sum[step]
        arm = table.arm[rows].long()
        own = clocks.arm_lr_sum[now, arm] - clocks.arm_lr_sum[step, arm]
        proxy = clocks.lr[step] * table.grad_sq[rows].double() / clocks.num_items[step].clamp_min(1.0)
        proxy = torch.where(m > 0, proxy * (1.0 - self.adam_beta1**m), 0.0)
        kappas = torch.tensor(self.KAPPAS, dtype=torch.float64, device=rows.device)
        own_step = proxy * torch.exp(-kappas[:, None] * (tau / clocks.round_lr))
        return torch.stack([own_step, own.expand_as(own_step), (tau - own).expand_as(own_step)], 2)

    def _predict(self, features: Tensor, arm: Tensor) -> Tensor:
        """Every kappa's prediction, fp64 [kinds, R]."""
        coefficients = self.coefficients[:, None, :].expand(features.shape).clone()
        coefficients[..., 0] += self.offsets[:, arm]
        return (features * coefficients).sum(2)

    def drop(self, table: UtilityTable, clocks: Clocks, rows: Tensor) -> Tensor:
        features = self._features(table, clocks, rows)
        return self._predict(features, table.arm[rows].long())[self.best].float()

    def pair(self, table: UtilityTable, clocks: Clocks, rows: Tensor, loss: Tensor, valid: Tensor) -> None:
        # A row seen again before any optimizer step teaches nothing: its features are all 0.
        weight = (valid & (table.step[rows] < clocks.num_steps)).double()
        revisit = weight * (table.round[rows] > 0)
        arm = table.arm[rows].long()
        features = self._features(table, clocks, rows) * weight[:, None]
        truth = torch.where(weight > 0, (table.loss[rows] - loss).double(), 0.0)
        self.errors += ((self._predict(features, arm) - truth).square() * weight).sum(1)
        self.xtx.index_add_(1, arm, features[:, :, :, None] * features[:, :, None, :])
        self.xty.index_add_(1, arm, features * truth[:, None])
        self.pairs += torch.stack([revisit.sum(), weight.sum()])

    def calibrate(self, clocks: Clocks) -> None:
        xtx, xty = self.xtx.sum(1), self.xty.sum(1)
        # Only what enough pairs speak of is fitted; the rest keeps its prior.
        known = torch.stack([self.pairs[0] >= self.MIN_PAIRS, *[self.pairs[1] >= self.MIN_PAIRS] * 2]).double()
        square = xtx.diagonal(dim1=1, dim2=2)
        count = torch.stack([self.pairs[0], self.pairs[1], self.pairs[1]]).clamp_min(1.0)
        scale = (square / count).sqrt()
        use = known * (scale > 0)
        inverse = torch.where(use > 0, 1.0 / scale.clamp_min(1e-300), 0.0)
        ridge = self.PRIOR_PAIRS * torch.eye(3, dtype=torch.float64, device=self.device)
        gram = xtx * inverse[:, :, None] * inverse[:, None, :] + ridge
        self.coefficients = torch.linalg.solve(gram, (xty * inverse)[..., None])[..., 0] * inverse
        # c_k: the slope of what is left on the first feature, arm by arm, shrunk toward 0 by the prior's weight.
        left = self.xty[..., 0] - torch.einsum("kai,ki->ka", self.xtx[:, :, 0, :], self.coefficients)
        prior = self.PRIOR_PAIRS * (square[:, :1] / count[0])
        self.offsets = left / (self.xtx[..., 0, 0] + prior).clamp_min(1e-300) * use[:, :1]
        self.best = self.errors.argmin()
        self.round_lr = clocks.round_lr

    def calibration(self) -> dict[str, Any]:
        """c, d, e, c_k, kappa; d and e in nats per round at peak learning rate."""
        best = int(self.best)
        c, d, e = self.coefficients[best].tolist()
        revisits, pairs = (int(n) for n in self.pairs.tolist())
        return {
            "estimator": self.name,
            "c": c,
            "d": d * self.round_lr,
            "e": e * self.round_lr,
            "c_k": self.offsets[best].tolist(),
            "kappa": self.KAPPAS[best],
            "pairs": pairs,
            "revisit_pairs": revisits,
            "prior": [name for name, n in (("c", revisits), ("d", pairs), ("e", pairs)) if n < self.MIN_PAIRS],
        }

    _state = ("xtx", "xty", "pairs", "errors", "coefficients", "offsets", "best")

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).clone() for name in self._state} | {"round_lr": self.round_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._state:
            setattr(self, name, state[name].to(self.device).clone())
        self.round_lr = float(state["round_lr"])
