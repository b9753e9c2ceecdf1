"""Instance-Level Dynamic Uncertainty (IDU): what is remembered of each row, and estimators of its loss change (section 4).

    Lhat_i(now) = max(0, L_i(seen) - drop_i(seen -> now))
    IDU_i       = (1 - b) * Lhat_i + b * IDU_i(previous visit)

Utilities are evaluated lazily: nothing is written for untouched rows, yet their utility moves with training through
`drop`, which an estimator computes from a row's own entry and the clocks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class UtilityTable:
    """One entry a row, and one spare entry at the end that takes the writes of rows to be ignored; tensors [N + 1].

    32 bytes a row. A row that was never trained on stands as if seen at step 0 with its first utility as loss.
    """

    loss: Tensor  # fp32, mean nll per supervised token when last seen
    idu: Tensor  # fp32, IDU at the end of the round of the last visit
    previous_idu: Tensor  # fp32, the same of the visit before
    grad_sq: Tensor  # fp32, G_i / n_i when last seen; 0 if never
    step: Tensor  # int32, optimizer steps completed when last seen
    round: Tensor  # int32, number of the round when last seen; 0 if never
    arm: Tensor  # int16
    uses: Tensor  # uint8, rounds that chose the row
    quarantined: Tensor  # bool, a loss was not finite: never ranked, never in a mean

    @classmethod
    def create(cls, first_utility: Tensor, arm: Tensor) -> UtilityTable:
        """A table of rows that were never seen; `first_utility` fp32 [N], `arm` int16 [N], on the engine's device."""
        spare = first_utility.new_zeros(1)
        loss = torch.cat([first_utility, spare])

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(len(loss), dtype=dtype, device=loss.device)

        return cls(
            loss=loss,
            idu=loss.clone(),
            previous_idu=loss.clone(),
            grad_sq=zeros(torch.float32),
            step=zeros(torch.int32),
            round=zeros(torch.int32),
            arm=torch.cat([arm, arm.new_zeros(1)]),
            uses=zeros(torch.uint8),
            quarantined=zeros(torch.bool),
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in vars(self).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in vars(self).items():
            if state[name].shape != value.shape:
                raise ValueError(f"UtilityTable: `{name}` must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
            value.copy_(state[name])


class Clocks:
    """What training did at each optimizer step; rows store a step index and look the rest up.

    Attributes (s = steps completed before; entry s describes step s, sums run up to and without it):
        lr: learning rate of step s, fp64 [capacity].
        num_items: supervised tokens of step s over all micro-batches and ranks, fp64 [capacity].
        lr_sum: learning rate summed before step s, fp64 [capacity + 1].
        arm_lr_sum: the part of it spent in each arm, fp64 [capacity + 1, K].
    """

    def __init__(self, num_arms: int, device: torch.device, capacity: int = 1024) -> None:
        self.num_steps = 0
        self.num_rounds = 0
        self.peak_lr = 0.0
        self.round_lr = 1.0  # learning rate of one round at peak rate: the unit of tau
        self.lr = torch.zeros(capacity, dtype=torch.float64, device=device)
        self.num_items = torch.ones(capacity, dtype=torch.float64, device=device)
        self.lr_sum = torch.zeros(capacity + 1, dtype=torch.float64, device=device)
        self.arm_lr_sum = torch.zeros(capacity + 1, num_arms, dtype=torch.float64, device=device)

    def step(self, lr: float, num_items: float | Tensor, arms: list[int]) -> None:
        """Advances by one optimizer step whose samples came from `arms` in equal parts."""
        s = self.num_steps
        if s + 1 >= len(self.lr):
            self._grow()
        self.lr[s] = lr
        self.num_items[s] = num_items
        self.lr_sum[s + 1] = self.lr_sum[s] + lr
        self.arm_lr_sum[s + 1] = self.arm_lr_sum[s]
        for arm in arms:
            self.arm_lr_sum[s + 1, arm] += lr / len(arms)
        self.num_steps = s + 1
        self.peak_lr = max(self.peak_lr, lr)

    def end_round(self) -> None:
        """Counts a round and renews the unit of tau: peak rate times the mean number of steps a round."""
        self.num_rounds += 1
        if self.num_steps and self.peak_lr > 0.0:
            self.round_lr = self.peak_lr * self.num_steps / self.num_rounds

    def _grow(self) -> None:
        for name in self._tensors:
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(old.shape)]))

    def state_dict(self) -> dict[str, Any]:
        n = self.num_steps
        tensors = {k: getattr(self, k)[: n + k.endswith("sum")].clone() for k in self._tensors}
        scalars = {k: getattr(self, k) for k in ("num_steps", "num_rounds", "peak_lr", "round_lr")}
        return tensors | scalars

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("num_steps", "num_rounds", "peak_lr", "round_lr"):
            setattr(self, name, state[name])
        while len(self.lr) <= self.num_steps:
            self._grow()
        for name in self._tensors:
            getattr(self, name)[: len(state[name])] = state[name].to(getattr(self, name).device)

    _tensors = ("lr", "num_items", "lr_sum", "arm_lr_sum")


class LossChangeEstimator:
    """How much a row's loss fell since it was last seen. Subclass, and register with `register_estimator`.

    The engine calls `pair` with every observation, before the table takes it; `end_round` once a round, before its losses
    are carried to its end; and `calibrate` last of all, so that no reward holds a change of the coefficients. `drop` must be
    cheap, since ranking evaluates it for a whole arm. This base class is the estimator `none`: nothing ever changes.
    """

    name = "none"
    #: the engine hands `end_round` the round's change of the trained weights only to estimators that ask for it
    needs_weights = False

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        self.num_arms, self.adam_beta1, self.device = num_arms, adam_beta1, device

    def drop(self, table: UtilityTable, clocks: Clocks, rows: Tensor) -> Tensor:
        """Predicted fall of the loss of `rows` (int64 [R]) since each was last seen, fp32 [R]; may be negative."""
        return torch.zeros(len(rows), dtype=torch.float32, device=rows.device)

    def pair(self, table: UtilityTable, clocks: Clocks, rows: Tensor, loss: Tensor, valid: Tensor) -> None:
        """Sees the truth: `loss` fp32 [R] observed now; entries where `valid` (bool [R]) is False are to be ignored."""

    def end_round(self, clocks: Clocks, arms: list[int], first_step: int, weight_change: Tensor | None) -> None:
        """Closes a round whose first optimizer step was `first_step`."""

    def calibrate(self, clocks: Clocks) -> None:
        """Refits what is learned from the pairs so far."""

    def calibration(self) -> dict[str, Any]:
        """What a report says of the estimator: coefficients, numbers of pairs, whether the prior is in use."""
        return {"estimator": self.name}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on identically."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""


_ESTIMATORS: dict[str, type[LossChangeEstimator]] = {"none": LossChangeEstimator}


def register_estimator(cls: type[LossChangeEstimator]) -> type[LossChangeEstimator]:
    """Makes an estimator available as `LeadConfig(estimator=cls.name)`; usable as a class decorator."""
    if cls.name in _ESTIMATORS:
        raise ValueError(f"register_estimator: `name` must be new, got {cls.name!r} again")
    _ESTIMATORS[cls.name] = cls
    return cls


def estimator_class(name: str) -> type[LossChangeEstimator]:
    """The estimator registered under `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in _ESTIMATORS:
        raise ValueError(f"LeadConfig: `estimator` must be one of {', '.join(_ESTIMATORS)}, got {name!r}")
    return _ESTIMATORS[name]


def lazy_loss(table: UtilityTable, clocks: Clocks, estimator: LossChangeEstimator, rows: Tensor) -> Tensor:
    """Lhat of `rows` (int64 [R]) now, without a forward pass: fp32 [R]."""
    return (table.loss[rows] - estimator.drop(table, clocks, rows)).clamp_min(0.0)


def idu(table: UtilityTable, clocks: Clocks, estimator: LossChangeEstimator, rows: Tensor, smoothing: float) -> Tensor:
    """IDU of `rows` (int64 [R]) now: fp32 [R]. An unseen row's previous utility is its first one."""
    lhat = lazy_loss(table, clocks, estimator, rows)
    return (1.0 - smoothing) * lhat + smoothing * table.previous_idu[rows]


def last_occurrence(rows: Tensor) -> Tensor:
    """True where a row number does not occur again later in `rows` [S]: of duplicates, the last one counts."""
    same = rows[:, None] == rows[None, :]
    return ~torch.triu(same, diagonal=1).any(1)


def observe(
    table: UtilityTable,
    clocks: Clocks,
    estimator: LossChangeEstimator,
    rows: Tensor,
    loss: Tensor,
    num_tokens: Tensor,
    grad_norm_sq: Tensor,
    round_number: int,
) -> None:
    """Scatters one micro-batch's statistics into the table.

    A sample without a row or without supervised tokens is ignored. A non-finite loss quarantines its row for good. Of a row
    that occurs twice in the micro-batch the last finite loss counts; seen twice in a round, the smoothing advances once.

    Args:
        rows: int64 [S]; -1 for samples without a row.
        loss, num_tokens, grad_norm_sq: fp32 [S], see `linear_cross_entropy`.
        round_number: of the round that is open.

    No host synchronisation; the result does not depend on the order in which a device executes writes.
    """
    spare = len(table.loss) - 1
    present = (rows >= 0) & (num_tokens > 0)
    finite = torch.isfinite(loss)
    usable = present & finite & ~table.quarantined[torch.where(present, rows, spare)]
    valid = usable & last_occurrence(torch.where(usable, rows, -1))
    at = torch.where(valid, rows, spare)

    estimator.pair(table, clocks, at, loss, valid)
    table.previous_idu[at] = table.idu[at]  # `idu` moves at the round's end only
    table.loss[at] = torch.where(valid, loss, 0.0)
    per_token = torch.where(torch.isfinite(grad_norm_sq), grad_norm_sq, 0.0) / num_tokens.clamp_min(1.0)
    table.grad_sq[at] = torch.where(valid, per_token, 0.0)
    table.step[at] = clocks.num_steps
    table.round[at] = round_number
    table.quarantined[torch.where(present & ~finite, rows, spare)] = True
    table.quarantined[spare] = False


class WeightChange:
    """The change of the trained weights over a round, as a vector of at most `size` numbers.

    Below `size` weights the vector is exact; above, a count sketch (each weight adds with a fixed random sign into a fixed
    random bin), whose inner products are unbiased estimates of the true ones.

    Args:
        weights: the trained parameters, in a fixed order.
        size: numbers kept.
        seed: seed of bins and signs.
    """

    def __init__(self, weights: Iterable[Tensor], size: int = 2**20, seed: int = 0) -> None:
        self.weights = list(weights)
        if not self.weights:
            raise ValueError("WeightChange: `weights` must have at least one trained parameter, got none")
        total = sum(w.numel() for w in self.weights)
        self.size, self.seed, self.exact = min(size, total), seed, total <= size

    @torch.no_grad()
    def snapshot(self) -> Tensor:
        """The weights themselves as that vector, fp32 [size]: linear, so a change is a difference of two snapshots."""
        if self.exact:
            return torch.cat([w.detach().float().flatten() for w in self.weights])
        out = torch.zeros(self.size, dtype=torch.float32, device=self.weights[0].device)
        for number, weight in enumerate(self.weights):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            bins = torch.randint(self.size, (weight.numel(),), generator=generator)
            signs = torch.randint(2, (weight.numel(),), generator=generator, dtype=torch.int8) * 2 - 1
            flat = weight.detach().float().flatten()
            out.index_add_(0, bins.to(flat.device), flat * signs.to(flat.device))
        return out
