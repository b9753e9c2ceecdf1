"""Small states of an engine for the tests of the core, and `check`: `_C`, the CPU's torch operators and plain Python agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import state_plain as plain
import torch

from lead_fast import _C
from lead_fast import state as _state  # noqa: F401, defines torch.ops.lead_fast.observe and the rest

BETA1, KAPPAS = 0.9, (0.0, 0.25, 0.5, 1.0, 2.0)
f32 = np.float32


class State:
    """Everything the operators move, small and with many ties: values are multiples of 1/4."""

    def __init__(self, seed: int, num_rows: int = 12, num_arms: int = 2, num_tasks: int = 3, steps: int = 6) -> None:
        self.g = g = np.random.default_rng(seed)
        arm, task = g.integers(0, num_arms, num_rows), g.integers(0, num_tasks, num_rows)
        aside = g.random(num_rows) < 0.1
        order = np.lexsort((np.arange(num_rows), task, arm, aside))
        self.num_rows, self.num_arms, self.num_choosable = num_rows, num_arms, int((~aside).sum())
        self.rows = order.astype(np.int32)
        self.position = np.argsort(order).astype(np.int32)
        self.arm = arm[order].astype(np.int16)
        # One group for each arm and task, some of them empty.
        group = (arm * num_tasks + task)[order][: self.num_choosable]
        self.group_offsets = np.searchsorted(group, np.arange(num_arms * num_tasks + 1))
        self.arm_groups = np.arange(num_arms + 1) * num_tasks
        self.values = (g.integers(0, 12, (4, num_rows + 1)) / 4).astype(f32)
        self.seen = g.integers(0, steps, (2, num_rows + 1)).astype(np.int32)
        self.flags = np.stack([g.integers(0, 5, num_rows + 1), g.random(num_rows + 1) < 0.1]).astype(np.uint8)
        self.left = np.full(num_arms, num_rows)
        self.counters = np.array([steps, 2, 0, 0])
        rates = g.random((steps + 2, num_arms))
        self.clock = np.zeros((steps + 2, 3 + num_arms))
        self.clock[:, 0], self.clock[:, 1] = rates.sum(1), g.integers(0, 50, steps + 2)
        self.clock[1:, 3:] = np.cumsum(rates, 0)[:-1]
        self.clock[:, 2] = self.clock[:, 3:].sum(1)
        self.unit = np.array([1.0, 1.5])
        x, y = g.random((5, num_arms, 9, 3)) * [1e-3, 1, 10], g.normal(0, 1, (5, num_arms, 9))
        self.pairs = np.concatenate([np.einsum("qksi,qksj->qkij", x, x).reshape(5, num_arms, 9),
                                     np.einsum("qksi,qks->qki", x, y)], 2)  # fmt: skip
        self.totals = np.array([20.0, 40.0, *g.random(5)])
        self.fit = g.normal(0, 1, (6, 4 + num_arms))
        self.fit[:, 0] = (KAPPAS[0], *KAPPAS)
        self.coefficients = g.integers(-4, 5, (2, num_arms, steps - 1)) / 8  # rows of the last step have none

    def observe(self, size: int = 20, *, now: int | None = None, pairs: bool = True, max_uses: int = 4) -> list[Any]:
        """Duplicates, entries without a row or without tokens, losses and gradients that are not finite."""
        g = self.g
        rows = g.integers(-1, self.num_rows, size)
        loss = np.where(g.random(size) < 0.15, g.choice([np.nan, np.inf, -np.inf], size), g.random(size)).astype(f32)
        grad = np.where(g.random(size) < 0.1, np.inf, g.random(size)).astype(f32)
        fit = (self.pairs, self.totals, self.fit) if pairs else (None, None, None)
        return [rows, loss, g.integers(0, 3, size).astype(f32), grad, None if now is None else np.array([now]), self.position,
                self.arm, self.values, self.seen, self.flags, self.left, self.counters, self.clock, self.unit, *fit, BETA1,
                max_uses, self.num_choosable, np.full((6, size), np.nan)]  # fmt: skip

    def end_round(self, size: int = 12, arms: Sequence[int] = (0, 1), *, drop: bool = False, by_round: bool = False,
                  smoothing: float = 0.1, fall_of_utility: bool = False) -> list[Any]:  # fmt: skip
        """Of the third round, which a part of the table was seen in."""
        rows = self.g.permutation(self.num_rows)[:size]
        size = len(rows)
        self.seen[1, :-1] = np.where(self.g.random(self.num_rows) < 0.5, 3, self.seen[1, :-1])
        fall = (self.g.integers(-4, 8, size) / 8).astype(f32) if drop else None
        return [rows, self.g.random(size).astype(f32), fall, np.array(arms, np.int64), self.position, self.arm, self.values,
                self.seen, self.flags, self.coefficients, by_round, smoothing, fall_of_utility, self.counters,
                self.unit]  # fmt: skip

    def rank(self, arm: int = 0, **options: Any) -> list[Any]:
        settings = {"by_round": False, "utility": None, "num_tokens": None, "smoothing": 0.1, "rate": 0.3, "cap": -1,
                    "token_budget": 0.0, "exclude_top": 0.0, "choose": 0, "temperature": 0.5, "seed": 7, "round": 3,
                    "max_uses": 4, "max_arm_rows": self.num_rows, "capacity": self.num_rows} | options  # fmt: skip
        return [np.array([arm]), self.group_offsets, self.arm_groups, self.rows, self.values, self.seen, self.flags,
                self.coefficients, *settings.values()]  # fmt: skip

    def arguments(self, op: str) -> list[Any]:
        """Valid arguments of an operator, of more than one element where the shape allows it."""
        numbers, mask, arms = np.array([0.2, 0.5]), np.ones(2, bool), np.array([0, 1])
        table = (self.position, self.arm, self.values, self.seen)
        return {
            "observe": lambda: self.observe(now=4),
            "step": lambda: [np.array(0.5), np.array(9.0), arms, self.clock, self.counters, self.unit],
            "step_by_numbers": lambda: [0.5, 9.0, arms, self.clock, self.counters, self.unit],
            "grad_norm_coefficients": lambda: [self.clock, self.counters, self.unit, self.fit, BETA1, self.counters[0]],
            "utility": lambda: [np.arange(self.num_rows), *table, self.coefficients, False, 0.1],
            "calibrate": lambda: [self.pairs, self.totals, self.fit, 10.0, 15.0],
            "rank": lambda: self.rank(utility=self.values[0, :-1].copy(), num_tokens=self.rows),
            "exp3_probs": lambda: [numbers, mask, 0.1],
            "exp3_draw": lambda: [numbers, numbers],
            "exp3_update": lambda: [numbers, mask, arms, numbers, numbers, 0.1, 0, 0.0],
            "scale_rewards": lambda: [np.zeros(3), numbers],
            "bandit_draw": lambda: [numbers, numbers, numbers, mask, numbers, 0.1, 0],
            "bandit_update": lambda: [
                numbers.copy(),
                np.zeros(3),
                numbers.copy(),
                numbers.copy(),
                mask,
                arms,
                numbers,
                numbers,
                0.1,
                0,
                0.0,
            ],
            "mark_chosen": lambda: [np.arange(self.num_rows), self.position, self.arm, self.flags, self.left, 4],
            "end_round": lambda: self.end_round(drop=True),
        }[op]()


def copies(arguments: list[Any]) -> list[Any]:
    return [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]


def as_list(result: Any) -> list[np.ndarray]:
    return [] if result is None else [np.asarray(r) for r in (result if isinstance(result, tuple) else (result,))]


def run_torch(op: str, arguments: list[Any], threads: int) -> tuple[list[np.ndarray], list[Any]]:
    moved = copies(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    result = getattr(torch.ops.lead_fast, op)(*[torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in moved])
    torch.set_num_threads(before)
    return as_list(result), moved


def run_core(op: str, arguments: list[Any]) -> tuple[list[np.ndarray], list[Any]]:
    """Results and moved arguments of `_C`, which are those of the torch operator on one and two threads, bit for bit."""
    moved = copies(arguments)
    results = as_list(getattr(_C, op)(*moved))
    for threads in (1, 2):
        torch_results, torch_moved = run_torch(op, arguments, threads)
        for ours, theirs in zip([*results, *moved], [*torch_results, *torch_moved], strict=True):
            if isinstance(ours, np.ndarray):
                assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    return results, moved


def check(op: str, arguments: list[Any]) -> list[np.ndarray]:
    """The core against plain Python: exact but for the last bits of sums and transcendental functions in fp64."""
    results, moved = run_core(op, arguments)
    expected_moved = copies(arguments)
    expected = as_list(getattr(plain, op)(*expected_moved))
    for ours, theirs in zip([*results, *moved], [*expected, *expected_moved], strict=True):
        if isinstance(ours, np.ndarray) and ours.dtype == np.float64:
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
        elif isinstance(ours, np.ndarray):
            np.testing.assert_array_equal(ours, theirs)
    return results
