"""States of an engine in the middle of training, made up, for the tests of its operators: arguments by operator name."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_fast.estimators import GradNorm
from lead_fast.reference_state import CHOOSE, LOSS, PREVIOUS, PROXY, QUARANTINED, ROUND, STEP, USES, VARIANTS
from lead_fast.selection import Groups
from lead_fast.utility import Clocks, UtilityTable, end_round

NUM_ROWS, NUM_ARMS, MAX_USES, BETA1 = 300, 4, 3, 0.9
Arguments = tuple[Any, ...]


class State:
    """A table of 300 rows in 4 arms (one of a single row), 40 optimizer steps old, with learned coefficients."""

    def __init__(self, seed: int = 0, num_rows: int = NUM_ROWS) -> None:
        self.g = g = np.random.default_rng(seed)
        arm = g.choice([0, 1, 3], num_rows, p=[0.2, 0.3, 0.5])
        arm[7] = 2
        aside = g.random(num_rows) < 0.05
        aside[7] = False
        self.groups = Groups(arm, g.integers(0, 5, num_rows), aside, NUM_ARMS, torch.device("cpu"))
        self.table = UtilityTable(torch.from_numpy(g.gamma(4.0, 0.5, num_rows).astype(np.float32)), self.groups)
        self.clocks = Clocks(NUM_ARMS, torch.device("cpu"), capacity=64)
        self.estimator = GradNorm(NUM_ARMS, BETA1, torch.device("cpu"))
        for step in range(40):
            self.clocks.step(1e-3 * (1 + step % 3), float(g.integers(20, 90)), torch.tensor([step // 4 % NUM_ARMS]))
            if step % 4 == 3:
                self.close_round()
        seen = np.flatnonzero(g.random(num_rows) < 0.6)
        self.table.values[LOSS, seen] += torch.from_numpy(g.normal(0, 0.3, len(seen)).astype(np.float32)).abs()
        self.table.values[PREVIOUS, seen] *= 1.1
        self.table.values[PROXY, seen] = torch.from_numpy(g.gamma(1.0, 400.0, len(seen)).astype(np.float32))
        self.table.seen[STEP, seen] = torch.from_numpy(g.integers(0, 40, len(seen)).astype(np.int32))
        self.table.seen[ROUND, seen] = self.table.seen[STEP, seen] // 4 + 1
        self.table.flags[USES, seen] = torch.from_numpy(g.integers(0, MAX_USES + 1, len(seen)).astype(np.uint8))
        self.table.flags[QUARANTINED, seen[:9]] = 1
        for number in range(1, 6):  # pairs, and what they teach
            observe_arguments = self.observe(64, seed=number)
            torch.ops.lead_fast.observe(*observe_arguments)
        self.estimator.calibrate(self.clocks)

    def close_round(self) -> None:
        """Ends a round without rows."""
        none = torch.zeros(0, dtype=torch.int64)
        end_round(self.table, self.clocks, self.estimator, none, none.float(), none, 0.1, fall_of_utility=False)

    def mark_chosen(self, rows: Tensor) -> Arguments:
        table = self.table
        return rows, table.position, table.arm, table.flags, table.left, MAX_USES

    def end_round(self, rows: Tensor, arms: list[int], *, reward: str = "drop", by_round: bool = False,
                  drop: Tensor | None = None) -> Arguments:  # fmt: skip
        """After two micro-batches of the round, some of whose losses are not finite."""
        for seed in (31, 32):
            torch.ops.lead_fast.observe(*self.observe(64, seed=seed))
        for arm in (1, 3):  # after which the losses observed have fallen
            self.clocks.step(2e-3, 50.0, torch.tensor([arm]))
        table, clocks = self.table, self.clocks
        coefficients = _BY_ROUND.clone() if by_round else self.estimator.coefficients(clocks)
        begin_idu = torch.from_numpy(self.g.gamma(4.0, 0.5, len(rows)).astype(np.float32))
        return (rows, begin_idu, drop, torch.tensor(arms), table.position, table.arm, table.values, table.seen, table.flags,
                coefficients, by_round, 0.1, reward == "idu", clocks.counters, clocks.unit)  # fmt: skip

    def observe(self, num_samples: int = 24, seed: int = 0) -> Arguments:
        """A micro-batch with duplicates, samples without a row or without tokens, and losses that are not finite."""
        g = np.random.default_rng([seed, 1])
        rows = torch.from_numpy(g.integers(-1, len(self.table.rows), num_samples))
        rows[num_samples // 2 :][: num_samples // 6] = rows[: num_samples // 6]
        loss = torch.from_numpy(g.gamma(4.0, 0.4, num_samples).astype(np.float32))
        loss[1::11] = torch.tensor([torch.nan, torch.inf]).repeat(num_samples)[: len(loss[1::11])]
        tokens = torch.from_numpy(g.integers(0, 12, num_samples).astype(np.float32))
        grad = torch.from_numpy(g.gamma(1.0, 4000.0, num_samples).astype(np.float32))
        grad[::13] = torch.inf
        table, clocks = self.table, self.clocks
        return (rows, loss, tokens, grad, None, table.position, table.arm, table.values, table.seen, table.flags, table.left,
                clocks.counters, clocks.clock, clocks.unit, *self.estimator.pair_state(), BETA1, MAX_USES,
                self.groups.num_choosable)  # fmt: skip

    def step(self, arms: list[int]) -> Arguments:
        lr, num_items = torch.tensor(2.5e-3, dtype=torch.float64), torch.tensor(77.0, dtype=torch.float64)
        return lr, num_items, torch.tensor(arms), self.clocks.clock, self.clocks.counters, self.clocks.unit

    def coefficients(self) -> Arguments:
        clocks = self.clocks
        return clocks.clock, clocks.counters, clocks.unit, self.estimator.fit, BETA1, clocks.num_steps

    def utility(self, rows: Tensor, *, by_round: bool = False, coefficients: Tensor | None = None) -> Arguments:
        table = self.table
        coefficients = self.estimator.coefficients(self.clocks) if coefficients is None else coefficients
        return rows, table.position, table.arm, table.values, table.seen, coefficients, by_round, 0.1

    def calibrate(self) -> Arguments:
        return self.estimator.pairs, self.estimator.totals, self.estimator.fit, 10.0, 30.0

    def rank(self, arm: int, choose: str, *, rate: float = 0.2, cap: int = -1, exclude_top: float = 0.0,
             utility: Tensor | None = None, num_tokens: Tensor | None = None,
             token_budget: float = 0.0) -> Arguments:  # fmt: skip
        table, groups = self.table, self.groups
        largest = int(groups.arm_sizes.max())
        return (torch.tensor([arm]), groups.offsets, groups.arm_groups, table.rows, table.values, table.seen, table.flags,
                self.estimator.coefficients(self.clocks), False, utility, num_tokens, 0.1, rate, cap, token_budget,
                exclude_top, CHOOSE[choose], 0.7, 5, 11, MAX_USES, largest, largest)  # fmt: skip


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _before(num_samples: int) -> Tensor:
    return torch.full((6, num_samples), torch.nan, dtype=torch.float64)


_NO_PAIRS = (None, None, None)
_LOG_W, _MASK = _numbers(0.0, -1.5, 40.0, -0.2), torch.tensor([True, True, False, True])
_BY_ROUND = torch.from_numpy(np.random.default_rng(2).random((2, NUM_ARMS, 6)))


def _update(variant: int) -> Arguments:
    rewards, probs = _numbers(0.7, -1.0, torch.nan, 0.1), _numbers(0.2, 0.5, 0.3, 1.0)
    return _LOG_W.clone(), _MASK, torch.tensor([1, 3, 0, -1]), rewards, probs, 0.1, variant, 0.01


def _bandit() -> tuple[Tensor, ...]:
    """log_w, scale, counts and sums of a bandit that has seen something, and its mask."""
    counts = _numbers(3.0, 0.0, 2.0, 4.0)
    return _LOG_W.clone(), _numbers(9.0, 0.4, 1.3), counts, counts * _numbers(0.3, 0.0, 0.9, 0.2), _MASK


def _bandit_draw(variant: int, mask: Tensor = _MASK, uniforms: Tensor | None = None) -> Arguments:
    log_w, _, counts, sums, _ = _bandit()
    return log_w, counts, sums, mask, _numbers(0.3, 0.999999, 0.5, 0.5) if uniforms is None else uniforms, 0.1, variant


def _bandit_update(variant: int) -> Arguments:
    rewards, probs = _numbers(0.7, -1e3, torch.nan, 0.1, 0.5), _numbers(0.2, 0.5, 0.3, 0.0, 0.9)
    return *_bandit(), torch.tensor([1, 3, 0, -1, 3]), rewards, probs, 0.1, variant, 0.01


_EVERY = torch.from_numpy(np.random.default_rng(3).permutation(NUM_ROWS))


def _by_tokens(state: State) -> Arguments:
    tokens = torch.from_numpy(state.g.integers(5, 200, NUM_ROWS).astype(np.int32))
    return state.rank(3, "softmax", num_tokens=tokens, token_budget=900.0)


#: operator, and its arguments from a fresh state, by case
CASES: dict[str, tuple[str, Callable[[State], Arguments]]] = {
    "observe": ("observe", lambda s: s.observe()),
    "observe many": ("observe", lambda s: s.observe(500, seed=3)),
    "observe nothing": ("observe", lambda s: s.observe(0)),
    "observe, no pairs": ("observe", lambda s: (*(a := s.observe(seed=4))[:14], *_NO_PAIRS, *a[17:])),
    "observe, recorded": ("observe", lambda s: (*s.observe(40, seed=6), _before(40))),
    "observe, recorded without pairs": (
        "observe",
        lambda s: (*(a := s.observe(40, seed=7))[:14], *_NO_PAIRS, *a[17:], _before(40)),
    ),
    "observe, of an earlier step": ("observe", lambda s: (*(a := s.observe(seed=5))[:4], torch.tensor([17]), *a[5:])),
    "step": ("step", lambda s: s.step([1])),
    "step of three arms": ("step", lambda s: s.step([3, -1, 0, 2])),
    "step by numbers": ("step_by_numbers", lambda s: (2.5e-3, 77.0, *s.step([3, -1, 0, 2])[2:])),
    "coefficients": ("grad_norm_coefficients", lambda s: s.coefficients()),
    "utility": ("utility", lambda s: s.utility(torch.arange(NUM_ROWS))),
    "utility of nothing": ("utility", lambda s: s.utility(torch.zeros(0, dtype=torch.int64))),
    "utility by round": ("utility", lambda s: s.utility(torch.arange(NUM_ROWS), by_round=True, coefficients=_BY_ROUND)),
    "calibrate": ("calibrate", lambda s: s.calibrate()),
    "probs": ("exp3_probs", lambda s: (_LOG_W, _MASK, 0.1)),
    "probs of no arm": ("exp3_probs", lambda s: (_LOG_W, torch.zeros_like(_MASK), 0.1)),
    "draw": ("exp3_draw", lambda s: (_numbers(0.0, 0.3, 0.1, 0.6), _numbers(0.2, 0.999999, 0.5, 0.5))),
    "scale": ("scale_rewards", lambda s: (torch.zeros(3, dtype=torch.float64), _numbers(0.3, torch.nan, 0.1, 0.9, -2.0, 1e6))),
    "rank, one row": ("rank", lambda s: s.rank(2, "softmax")),
    "rank, no arm": ("rank", lambda s: s.rank(-1, "topk")),
    "rank, given utilities": (
        "rank",
        lambda s: s.rank(3, "topk", utility=torch.from_numpy(s.g.gamma(3.0, 1.0, NUM_ROWS).astype(np.float32))),
    ),
    "rank, by tokens": ("rank", _by_tokens),
    "draw of a bandit, no arm": ("bandit_draw", lambda s: _bandit_draw(0, torch.zeros_like(_MASK))),
    "draw of a bandit, greedy without an arm": ("bandit_draw", lambda s: _bandit_draw(4, torch.zeros_like(_MASK))),
    "draw of a bandit, one": ("bandit_draw", lambda s: _bandit_draw(0, uniforms=_numbers(0.4))),
    "draw of a bandit, probabilities only": ("bandit_draw", lambda s: _bandit_draw(2, uniforms=_numbers())),
    "mark": ("mark_chosen", lambda s: s.mark_chosen(_EVERY[:170])),
    "mark nothing": ("mark_chosen", lambda s: s.mark_chosen(_EVERY[:0])),
    "end": ("end_round", lambda s: s.end_round(_EVERY, [3])),
    "end, idu": ("end_round", lambda s: s.end_round(_EVERY[:200], [1], reward="idu")),
    "end of several arms": ("end_round", lambda s: s.end_round(_EVERY, [3, -1, 0, 1])),
    "end, by round": ("end_round", lambda s: s.end_round(_EVERY, [0, 3], by_round=True)),
    "end, drops given": (
        "end_round",
        lambda s: s.end_round(_EVERY, [3], drop=torch.from_numpy(s.g.normal(0.5, 1.0, NUM_ROWS).astype(np.float32))),
    ),
    "end of nothing": ("end_round", lambda s: s.end_round(_EVERY[:0], [0])),
    "end before any step": ("end_round", lambda s: (*s.end_round(_EVERY, [3])[:14], _numbers(0.0, 1.5))),
}
for _place, _variant in enumerate(VARIANTS):
    CASES[f"update, {_variant}"] = ("exp3_update", lambda s, place=_place: _update(place))
    CASES[f"draw of a bandit, {_variant}"] = ("bandit_draw", lambda s, place=_place: _bandit_draw(place))
    CASES[f"update of a bandit, {_variant}"] = ("bandit_update", lambda s, place=_place: _bandit_update(place))
for _choose in CHOOSE:
    CASES[f"rank, {_choose}"] = ("rank", lambda s, c=_choose: s.rank(3, c))
    CASES[f"rank, {_choose}, top excluded"] = ("rank", lambda s, c=_choose: s.rank(0, c, exclude_top=0.3))
    CASES[f"rank, {_choose}, capped"] = ("rank", lambda s, c=_choose: s.rank(1, c, rate=0.5, cap=7, exclude_top=0.1))
    CASES[f"rank, {_choose}, all"] = ("rank", lambda s, c=_choose: s.rank(3, c, rate=1.0))


def make_case(name: str, seed: int = 0) -> tuple[str, Arguments]:
    """Operator and arguments, which share nothing with those of another call."""
    operator, arguments = CASES[name]
    return operator, arguments(State(seed))
