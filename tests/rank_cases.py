"""Arms with tasks of given sizes, for the tests of the operator `rank`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from state_cases import MAX_USES

from lead_fast.reference_state import CHOOSE, QUARANTINED, USES

Arguments = tuple[Any, ...]


def rank_arguments(
    sizes: list[int],
    *,
    values: Callable[[np.random.Generator, int], np.ndarray] = lambda g, n: g.gamma(3.0, 1.0, n),
    used_up: float = 0.2,
    choose: str = "topk",
    rate: float = 0.1,
    cap: int = -1,
    exclude_top: float = 0.0,
    token_budget: float = 0.0,
    capacity: int | None = None,
    arm: int = 1,
    seed: int = 0,
) -> Arguments:
    """An arm whose tasks have these sizes, between two others of 5 rows; utilities are given by position."""
    g = np.random.default_rng([seed, 8])
    offsets = np.cumsum([0, 5, *sizes, 5, 3])[:-1]  # the last 3 rows are set aside
    n, num_arms, most = int(offsets[-1]) + 3, 3, max(5, sum(sizes))
    flags = np.zeros((2, n + 1), np.uint8)
    flags[USES, :n] = g.choice([0, 2, MAX_USES, 255], n, p=[(1 - used_up) / 2] * 2 + [used_up / 2] * 2)
    flags[QUARANTINED, :n] = g.random(n) < used_up / 2
    return (torch.tensor([arm]), torch.from_numpy(offsets), torch.tensor([0, 1, 1 + len(sizes), 2 + len(sizes)]),
            torch.from_numpy(g.permutation(n).astype(np.int32)), torch.zeros(4, n + 1),
            torch.zeros(2, n + 1, dtype=torch.int32),
            torch.from_numpy(flags), torch.zeros(2, num_arms, 0, dtype=torch.float64), False,
            torch.from_numpy(values(g, n).astype(np.float32)), torch.from_numpy(g.integers(1, 300, n).astype(np.int32)), 0.1,
            rate, cap, token_budget, exclude_top, CHOOSE[choose], 0.8, seed, 3, MAX_USES, most,
            most if capacity is None else capacity)  # fmt: skip


SIZES = [1, 0, 33, 700, 0, 4097, 2]  # beyond one chunk of 4096 keys
RANKS: dict[str, Arguments] = {
    "rows": rank_arguments(SIZES),
    "another arm": rank_arguments(SIZES, arm=2),
    "an arm without tasks": rank_arguments([]),
    "equal utilities": rank_arguments(SIZES, values=lambda g, n: np.full(n, 1.5), exclude_top=0.2),
    "few utilities": rank_arguments(SIZES, values=lambda g, n: g.integers(0, 3, n) / 2, exclude_top=0.3),
    "all signs": rank_arguments(SIZES, values=lambda g, n: g.choice([-np.inf, -3.0, -1e-40, 0.0, 2.0, np.inf], n), rate=0.4),
    "close utilities": rank_arguments(SIZES, values=lambda g, n: 1.0 + g.integers(0, 99, n) * 2.0**-23, exclude_top=0.1),
    "no row left": rank_arguments(SIZES, used_up=1.0),
    "every row": rank_arguments(SIZES, used_up=0.0, rate=1.0),
    "every row left": rank_arguments(SIZES, rate=1.0),
    "no share": rank_arguments(SIZES, rate=0.0),
    "all excluded": rank_arguments(SIZES, exclude_top=1.0),
    "all but few excluded": rank_arguments(SIZES, exclude_top=0.95),
    "cap of nothing": rank_arguments(SIZES, cap=0),
    "cap of one": rank_arguments(SIZES, cap=1),
    "cap not reached": rank_arguments(SIZES, cap=5000),
    "softmax of equals": rank_arguments([600, 33], values=lambda g, n: np.full(n, 1.5), choose="softmax", exclude_top=0.3),
    "random": rank_arguments(SIZES, choose="random", exclude_top=0.2),
    "tokens": rank_arguments(SIZES, token_budget=9000.0, choose="softmax"),
    "tokens and a cap": rank_arguments(SIZES, token_budget=9000.0, cap=11),
    "tokens of too many rows": rank_arguments(SIZES, token_budget=1e15),
    "exact capacity": rank_arguments([50], rate=1.0, used_up=0.0, capacity=50),
}
RANKS |= {f"capped, draw {seed}": rank_arguments([40] * 9, rate=0.2, cap=20, seed=seed) for seed in range(3)}
