"""Instance-Level Dynamic Uncertainty (IDU): what is remembered of each row, and estimators of its loss change (section 4).

    Lhat_i(now) = max(0, L_i(seen) - drop_i(seen -> now))
    IDU_i       = (1 - b) * Lhat_i + b * IDU_i(previous visit)

Utilities are evaluated lazily: nothing is written for untouched rows, yet their utility moves with training through
`drop`, which an estimator computes from a row's own entry and the clocks. The arithmetic is that of the operators in
`lead_fast.state`; this module holds the state they work on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lead_fast import state as _state  # noqa: F401, its import defines torch.ops.lead_fast.observe and the rest
from lead_fast.device import scattered_zeros, to_fp32
from lead_fast.reference_state import (
    ARM_LR_SUM,
    IDU,
    LOSS,
    NUM_ITEMS,
    NUM_ROUNDS,
    NUM_STEPS,
    PREVIOUS,
    PROXY,
    QUARANTINED,
    ROUND,
    STEP,
    last_occurrence,
)
from lead_fast.selection import Groups


class UtilityTable:
    """One entry a row, in the position order of `groups`: 36 bytes a row, so 100 million rows fit in 4 GB.

    A row that was never trained on stands as if seen at step 0 with its first utility as loss.

    Args:
        first_utility: fp32 [N], by row.
        groups: the order; its device is the table's.

    Attributes:
        rows, position: int32 [N], position -> row and row -> position.
        arm: int16 [N], by position, like all that follows.
        values: fp32 [4, N + 1]: LOSS, mean nll per supervised token when last seen; IDU at the end of the round of the last
            visit; PREVIOUS, the same of the visit before; PROXY, G_i / n_i when last seen, 0 if never.
        seen: int32 [2, N + 1]: STEP, optimizer steps completed when last seen; ROUND of the last visit, 0 if never.
        flags: uint8 [2, N + 1]: USES, rounds that chose the row; QUARANTINED, a loss was not finite: never ranked, never in
            a mean.
        left: int64 [K], rows of each arm that may still be chosen.
    """

    def __init__(self, first_utility: Tensor, groups: Groups) -> None:
        self.rows, self.position, self.arm = groups.rows, groups.position, groups.arm
        device, n = groups.rows.device, len(groups.rows)
        self.values = scattered_zeros(4, n + 1, dtype=torch.float32, device=device)
        self.values[LOSS, :n] = first_utility.to(device)[groups.rows]
        self.values[IDU], self.values[PREVIOUS] = self.values[LOSS], self.values[LOSS]
        self.seen = scattered_zeros(2, n + 1, dtype=torch.int32, device=device)
        self.flags = scattered_zeros(2, n + 1, dtype=torch.uint8, device=device)
        self.left = torch.from_numpy(groups.arm_sizes.copy()).to(device)

    def choose(self, rows: Tensor, max_uses: int) -> None:
        """Counts one use of each of `rows`, int64 [R], distinct and on the table's device."""
        torch.ops.lead_fast.mark_chosen(rows, self.position, self.arm, self.flags, self.left, max_uses)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).clone() for name in self._state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in self._state:
            value = getattr(self, name)
            if state[name].shape != value.shape:
                raise ValueError(f"UtilityTable: `{name}` must have shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
            value.copy_(state[name])

    _state = ("values", "seen", "flags", "left")


class Clocks:
    """What training did at each optimizer step; rows store a step index and look the rest up.

    Attributes:
        clock: fp64 [capacity + 1, 3 + K]. Entry s: LR and NUM_ITEMS (supervised tokens over all micro-batches and ranks) of
            step s; LR_SUM, the learning rate summed before step s, and the part of it spent in each arm.
        counters: int64 [4]: NUM_STEPS, NUM_ROUNDS that were closed, NUM_QUARANTINED observations with a loss that was not
            finite, OUT_OF_RANGE row numbers (counted on a GPU; refused on a CPU).
        unit: fp64 [2]: PEAK_LR; ROUND_LR, the learning rate of one round at peak rate, the unit of tau.
        num_steps, num_rounds: the same counters on the host, which knows them without asking the device.
    """

    def __init__(self, num_arms: int, device: torch.device, capacity: int = 1024) -> None:
        self.num_steps, self.num_rounds = 0, 0
        self.clock = self._fresh(capacity + 1, num_arms, device)
        self.counters = torch.zeros(4, dtype=torch.int64, device=device)
        self.unit = torch.tensor([0.0, 1.0], dtype=torch.float64).to(device)

    @staticmethod
    def _fresh(entries: int, num_arms: int, device: torch.device) -> Tensor:
        clock = torch.zeros(entries, ARM_LR_SUM + num_arms, dtype=torch.float64, device=device)
        clock[:, NUM_ITEMS] = 1.0
        return clock

    def step(self, lr: float | Tensor, num_items: float | Tensor, arms: Tensor) -> None:
        """Advances by one optimizer step whose samples came from `arms`, int64 [A] on the device, in equal parts."""
        if self.num_steps + 1 >= len(self.clock):
            clock = self._fresh(2 * len(self.clock), self.clock.shape[1] - ARM_LR_SUM, self.clock.device)
            clock[: len(self.clock)] = self.clock
            self.clock = clock
        if isinstance(lr, Tensor) or isinstance(num_items, Tensor):
            lr, num_items, by = self._number(lr), self._number(num_items), torch.ops.lead_fast.step
        else:
            by = torch.ops.lead_fast.step_by_numbers
        by(lr, num_items, arms, self.clock, self.counters, self.unit)
        self.num_steps += 1

    def _number(self, value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(self.clock.device, torch.float64, non_blocking=True).reshape(())
        return torch.full((), value, dtype=torch.float64, device=self.clock.device)  # a fill, not a copy: no sync

    def state_dict(self) -> dict[str, Any]:
        used = self.clock[: self.num_steps + 1].clone()
        return {"clock": used, "counters": self.counters.clone(), "unit": self.unit.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        used = state["clock"]
        if used.shape[1] != self.clock.shape[1]:
            raise ValueError(f"Clocks: `clock` must have {self.clock.shape[1]} columns, got {tuple(used.shape)}")
        self.clock = self._fresh(max(1025, 2 * len(used)), used.shape[1] - ARM_LR_SUM, self.clock.device)
        self.clock[: len(used)] = used.to(self.clock.device)
        self.counters.copy_(state["counters"])
        self.unit.copy_(state["unit"])
        self.num_steps, self.num_rounds = (int(n) for n in state["counters"][[NUM_STEPS, NUM_ROUNDS]])


class LossChangeEstimator:
    """How much a row's loss fell since it was last seen. Subclass, and register with `register_estimator`.

    An estimator is either affine in a row's proxy, with coefficients by arm and by the step (or round) of the last visit:
    override `coefficients`, and ranking streams at memory speed; or anything else: override `drop`, which ranking then
    evaluates for all rows. The engine calls `pair` with every observation, before the table takes it; `end_round` once a
    round, before its losses are carried to its end; and `calibrate` last of all, so that no reward holds a change of the
    coefficients. This base class is the estimator `none`: nothing ever changes.
    """

    name = "none"
    #: the engine hands `end_round` the round's change of the trained weights only to estimators that ask for it
    needs_weights = False
    #: `coefficients` go by the round of a row's last visit, in place of its step
    by_round = False

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        self.num_arms, self.adam_beta1, self.device = num_arms, adam_beta1, device
        self._nothing = torch.zeros(2, num_arms, 1, dtype=torch.float64, device=device)

    def coefficients(self, clocks: Clocks) -> Tensor:
        """Slope and level of drop = slope * proxy + level, fp64 [2, K, n]; a step or round from n on has drop 0."""
        return self._nothing

    def drop(self, table: UtilityTable, clocks: Clocks, at: Tensor) -> Tensor:
        """Predicted fall of the loss at positions `at` (int64 [R]) since each was last seen, fp32 [R]; may be negative."""
        index = table.seen[ROUND if self.by_round else STEP, at].long()
        coefficients = self.coefficients(clocks)
        known = index < coefficients.shape[2]
        slope, level = coefficients[:, table.arm[at].long(), torch.where(known, index, 0)]
        return torch.where(known, (slope * table.values[PROXY, at].double() + level).float(), 0.0)

    def pair(self, table: UtilityTable, clocks: Clocks, at: Tensor, loss: Tensor, valid: Tensor) -> None:
        """Sees the truth: `loss` fp32 [R] observed now at positions `at`, int64 [R], before the table takes it.

        Entries where `valid`, bool [R], is False are to be ignored; their position is the spare one.
        """

    def pair_state(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """pairs, totals and fit where `observe` itself is to keep grad_norm's regression."""
        return None

    def end_round(self, clocks: Clocks, arms: Tensor, first_step: int, weight_change: Tensor | None) -> None:
        """Closes a round of `arms`, int64 [A] on the device (-1: none), whose first optimizer step was `first_step`."""

    def calibrate(self, clocks: Clocks) -> None:
        """Refits what is learned from the pairs so far."""

    def snapshot(self, clocks: Clocks) -> dict[str, Tensor]:
        """What `describe` needs, on the device: the report keeps copies."""
        return {}

    def describe(self, snapshot: dict[str, Tensor]) -> dict[str, Any]:
        """What a report says of the estimator: coefficients, numbers of pairs, whether the prior is in use."""
        return {"estimator": self.name}

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on identically."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`."""


Estimator = TypeVar("Estimator", bound=LossChangeEstimator)
_ESTIMATORS: dict[str, type[LossChangeEstimator]] = {"none": LossChangeEstimator}


def register_estimator(cls: type[Estimator]) -> type[Estimator]:
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


def has_own_drop(estimator: LossChangeEstimator) -> bool:
    """Whether the estimator overrides `drop`, so that its utilities are not those of the operators."""
    return type(estimator).drop is not LossChangeEstimator.drop


def utility(
    table: UtilityTable, clocks: Clocks, estimator: LossChangeEstimator, rows: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """IDU and Lhat of `rows` (int64 [R]) now, without a forward pass: fp32 [R] each.

    An unseen row's previous utility is its first one.
    """
    if not has_own_drop(estimator):
        return torch.ops.lead_fast.utility(
            rows, table.position, table.arm, table.values, table.seen, estimator.coefficients(clocks),
            estimator.by_round, smoothing,
        )  # fmt: skip
    at = table.position[rows].long()
    loss = (table.values[LOSS, at] - estimator.drop(table, clocks, at)).clamp_min(0.0)
    return (1.0 - smoothing) * loss + smoothing * table.values[PREVIOUS, at], loss


def end_round(
    table: UtilityTable, clocks: Clocks, estimator: LossChangeEstimator, rows: Tensor, begin_idu: Tensor, arms: Tensor,
    smoothing: float, *, fall_of_utility: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes the utility of the round's `rows`, int64 [R] on the device, at its end, and counts the round.

    Returns:
        The reward of each of `arms`; number of rows observed and mean of their losses; which rows are set aside. See
        `lead_fast.reference_state.end_round`.
    """
    drop = None
    if has_own_drop(estimator):
        drop = to_fp32(estimator.drop(table, clocks, table.position[rows].long()), rows.device)
    ended = torch.ops.lead_fast.end_round(
        rows, begin_idu, drop, arms, table.position, table.arm, table.values, table.seen, table.flags,
        estimator.coefficients(clocks), estimator.by_round, smoothing, fall_of_utility, clocks.counters, clocks.unit,
    )  # fmt: skip
    clocks.num_rounds += 1
    return ended


def observed(table: UtilityTable, rows: Tensor, loss: Tensor, num_tokens: Tensor) -> Tensor:
    """Which samples of a micro-batch `observe` will take, bool [S]: arguments as there."""
    present = (rows >= 0) & (rows < len(table.rows)) & (num_tokens > 0)
    at = table.position[torch.where(present, rows, 0)].long()
    usable = present & torch.isfinite(loss) & (table.flags[QUARANTINED, at] == 0)
    return usable & last_occurrence(torch.where(usable, rows, -1))


def show(
    estimators: Iterable[LossChangeEstimator],
    table: UtilityTable,
    clocks: Clocks,
    rows: Tensor,
    loss: Tensor,
    num_tokens: Tensor,
) -> None:
    """Hands a micro-batch to the estimators' `pair`, before the table takes it."""
    valid = observed(table, rows, loss, num_tokens)
    at = torch.where(valid, table.position[torch.where(valid, rows, 0)].long(), len(table.rows))
    for estimator in estimators:
        estimator.pair(table, clocks, at, loss, valid)


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
        start = 0
        for weight in self.weights:
            for part in weight.detach().flatten().split(_SKETCHED_AT_ONCE):
                random = _mixed(torch.arange(start, start + len(part), device=part.device), self.seed)
                out.index_add_(0, (random >> 1) % self.size, part.float() * (2 * (random & 1) - 1))
                start += len(part)
        return out


_SKETCHED_AT_ONCE = 2**24  # weights: the host or card holds a few numbers of 8 bytes for each


def _mixed(index: Tensor, seed: int) -> Tensor:
    """Random int64 of each index, the same on every device: multiplications, which wrap, and shifts (as in splitmix64)."""
    x = index + seed * 1_000_003
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        x = (x ^ (x >> 30)) * factor
    return x ^ (x >> 31)
