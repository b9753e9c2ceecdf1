"""Coarse-to-fine choice: inside the drawn arm, the rows of each fine cluster (task) by utility (section 6).

Rows are kept grouped by arm and task, so that a choice costs what its arm costs, whatever the size of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

# Guards ceil(rate * n) against products that are an integer but for rounding: 0.015 * 200 = 3.0000000000000004.
_CEIL_SLACK = 1e-9


class Groups:
    """The pool's rows grouped by (arm, task), ascending within a group; rows set aside are left out.

    Attributes:
        rows: int64 [M], the grouped rows.
        offsets: int64 [G + 1] on the CPU, where each group starts in `rows`.
        arm, task: int64 [G] on the CPU, each group's arm and task.
        arm_groups: for each arm, its groups as a slice of the above.
    """

    def __init__(self, arm: np.ndarray, task: np.ndarray, aside: np.ndarray, num_arms: int, device: torch.device) -> None:
        order = np.lexsort((np.arange(len(arm)), task, arm))
        order = order[~aside[order]]
        a, t = arm[order].astype(np.int64), task[order].astype(np.int64)
        starts = np.flatnonzero(np.r_[True, (a[1:] != a[:-1]) | (t[1:] != t[:-1])]) if len(order) else np.zeros(0, np.int64)
        self.rows = torch.from_numpy(order.astype(np.int64)).to(device)
        self.offsets = np.append(starts, len(order)).astype(np.int64)
        self.arm, self.task = a[starts], t[starts]
        bounds = np.searchsorted(self.arm, np.arange(num_arms + 1))
        self.arm_groups = [slice(lo, hi) for lo, hi in pairwise(bounds.tolist())]

    def arm_rows(self, arm: int) -> Tensor:
        """The rows of an arm, int64, grouped by task."""
        groups = self.arm_groups[arm]
        return self.rows[self.offsets[groups.start] : self.offsets[groups.stop]]

    def arm_group_sizes(self, arm: int) -> np.ndarray:
        """Rows in each task of an arm, int64."""
        groups = self.arm_groups[arm]
        return np.diff(self.offsets[groups.start : groups.stop + 1])


def task_quotas(available: np.ndarray, rate: float, cap: int | None, uniform: float) -> np.ndarray:
    """Rows to take from each task.

    Args:
        available: rows still available in each task, int64 [J].
        rate: share taken of each, rounded up, at least one row of a task that has any.
        cap: rows of the whole arm at most, or None. Above it, the quotas are thinned by systematic sampling: task j gets
            floor or ceil of its proportional share, the total is exactly `cap`, and no task is favoured over the rounds.
        uniform: the number in (0, 1) that places the systematic sample.

    Returns:
        int64 [J].
    """
    wanted = np.ceil(rate * available.astype(np.float64) - _CEIL_SLACK).astype(np.int64)
    wanted = np.minimum(np.maximum(wanted, 1), available)
    total = int(wanted.sum())
    if cap is None or total <= cap:
        return wanted
    edges = np.floor(np.cumsum(np.r_[0, wanted]) * (cap / total) + uniform).astype(np.int64)
    edges[0], edges[-1] = 0, cap
    return np.diff(edges)


@dataclass(frozen=True)
class Candidates:
    """The available rows of a drawn arm, as the choice saw them; all tensors [C].

    `noise` is what the choice adds to or uses instead of utility: Gumbel numbers for softmax, uniform numbers for
    random, zeros for topk.
    """

    row: Tensor  # int64
    task: Tensor  # int64, the task's number inside the pool
    uses: Tensor  # int64, rounds that chose the row before
    utility: Tensor  # fp32
    noise: Tensor  # fp64
    chosen: Tensor  # bool


def rank(
    utility: Tensor, noise: Tensor, group: Tensor, quotas: Tensor, excluded: Tensor, *, choose: str, temperature: float
) -> Tensor:
    """Marks the rows chosen in each group.

    Args:
        utility: fp32 [C].
        noise: fp64 [C], see `Candidates`.
        group: int64 [C], ascending: which task a candidate belongs to, 0..J-1. Within a group rows ascend, so that every
            stable sort breaks ties toward the lower row.
        quotas: int64 [J], rows to choose.
        excluded: int64 [J], highest-utility rows to leave out first.
        choose: "topk" by utility, "softmax" by utility / temperature + Gumbel noise, "random" by noise.
        temperature: of "softmax".

    Returns:
        bool [C].
    """
    starts = torch.searchsorted(group, torch.arange(len(quotas), device=group.device))
    position = torch.arange(len(group), device=group.device) - starts[group]

    def by_rank(key: Tensor) -> Tensor:
        order = torch.argsort(key, descending=True, stable=True)
        order = order[torch.argsort(group[order], stable=True)]
        ranks = torch.empty_like(order)
        ranks[order] = position
        return ranks

    utility_rank = by_rank(utility)
    if choose == "topk":
        chosen_rank = utility_rank - excluded[group]
        return (chosen_rank >= 0) & (chosen_rank < quotas[group])
    key = noise if choose == "random" else utility.double() / temperature + noise
    allowed = utility_rank >= excluded[group]
    return allowed & (by_rank(key.masked_fill(~allowed, -torch.inf)) < quotas[group])


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers from uniform ones, fp64."""
    return -torch.log(-torch.log(uniform.double()))
