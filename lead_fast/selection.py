"""Coarse-to-fine choice: inside the drawn arm, the rows of each fine cluster (task) by utility (section 6).

Rows are kept grouped by arm and task, so that a choice costs what its arm costs, whatever the size of the pool. The choice
itself is the operator `rank` (`lead_fast.reference_state`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from lead_fast.device import scattered
from lead_fast.reference_state import STREAM_SHUFFLE, USES, available_positions
from lead_fast.rng import philox_uniform

logger = logging.getLogger(__name__)

_MAX_ROWS = 2**31 - 2


def rows_aside(aside: np.ndarray, difficulty: np.ndarray | None, hard_rows: str) -> np.ndarray:
    """Rows that are never chosen, bool [N]: `aside`, and where `hard_rows` is "aside" those whose prompt does not help, unless
    there are no others."""
    if hard_rows != "aside" or difficulty is None:
        return aside
    hard = np.asarray(difficulty) > 1.0
    if (aside | hard).all():
        return aside  # as `lead-fast prepare`, which says so
    if num_hard := int((hard & ~aside).sum()):
        logger.info("%d of %d rows have a difficulty above 1: set aside (hard_rows)", num_hard, len(hard))
    return aside | hard


class Groups:
    """The pool's rows in position order: by (arm, task), ascending within a group, rows set aside last.

    Args:
        arm, task: integers [N], by row. aside: bool [N], rows that may never be chosen.

    Attributes:
        rows: int32 [N], position -> row. position: int32 [N], row -> position. arm: int16 [N], by position.
        num_choosable: positions from here on are set aside.
        offsets: int64 [G + 1], where each group starts; arm_groups: int64 [K + 1], the groups of each arm. On the device.
        group_task: int64 [G], the task of each group, on the host. group_sizes: int64 [G]; arm_sizes: int64 [K].
    """

    def __init__(self, arm: np.ndarray, task: np.ndarray, aside: np.ndarray, num_arms: int, device: torch.device) -> None:
        if len(arm) > _MAX_ROWS:
            raise ValueError(f"Groups: the pool must have at most {_MAX_ROWS} rows, got {len(arm)}")
        tasks, dense = np.unique(task, return_inverse=True)
        num_groups = num_arms * len(tasks)
        # A group number a row; numbers of 16 bits are sorted by radix.
        number = arm.astype(np.int64) * len(tasks) + dense
        number[aside] = num_groups
        number = number.astype(np.uint16 if num_groups < 2**16 else np.int64)
        order = np.argsort(number, kind="stable").astype(np.int32)
        sizes = np.bincount(number, minlength=num_groups + 1)[:num_groups]
        present = np.flatnonzero(sizes)
        position = np.empty_like(order)
        position[order] = np.arange(len(order), dtype=np.int32)

        self.num_arms, self.num_choosable = num_arms, int(sizes.sum())
        self.group_task, self.group_sizes = tasks[present % max(len(tasks), 1)].astype(np.int64), sizes[present]
        bounds = np.searchsorted(present // max(len(tasks), 1), np.arange(num_arms + 1))
        self._arm_groups = [slice(lo, hi) for lo, hi in pairwise(bounds.tolist())]
        self._offsets = np.append(0, np.cumsum(self.group_sizes)).astype(np.int64)
        self._most_chosen: dict[tuple[float, int], int] = {}  # rounds ask again and again
        self.arm_sizes = np.array([self.group_sizes[s].sum() for s in self._arm_groups], np.int64)
        self.rows, self.position = torch.from_numpy(order).to(device), scattered(torch.from_numpy(position).to(device))
        self.arm = scattered(torch.from_numpy(arm.astype(np.int16)[order]).to(device))
        self.offsets, self.arm_groups = torch.from_numpy(self._offsets).to(device), torch.from_numpy(bounds).to(device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the order: of two pools with one, a table by position is of the same rows."""
        digest = hashlib.sha256()
        for array in (self.rows, self.offsets, self.arm_groups):
            digest.update(array.cpu().numpy().tobytes())
        return digest.hexdigest()

    def choosable_rows(self) -> Tensor:
        """All rows that may be chosen, in position order: int64 on the device."""
        return self.rows[: self.num_choosable].long()

    def arm_rows(self, arm: int) -> Tensor:
        """The rows of an arm, grouped by task: int64 on the device."""
        groups = self._arm_groups[arm]
        return self.rows[self._offsets[groups.start] : self._offsets[groups.stop]].long()

    def arm_tasks(self, arm: int) -> np.ndarray:
        """The tasks of an arm, in the order of its groups, int64."""
        return self.group_task[self._arm_groups[arm]]

    def most_chosen(self, rate: float, cap: int) -> int:
        """Rows that `rank` can choose at most from any one arm, at `rate` under `cap` (-1: none)."""
        if (known := self._most_chosen.get((rate, cap))) is not None:
            return known
        quotas = np.minimum(np.maximum(np.ceil(rate * self.group_sizes - 1e-9), 1), self.group_sizes).astype(np.int64)
        most = max(int(quotas[groups].sum()) for groups in self._arm_groups)
        self._most_chosen[rate, cap] = most = most if cap < 0 else min(most, cap)
        return most


@dataclass(frozen=True)
class Candidates:
    """The available rows of a drawn arm, as the choice saw them; all tensors [C] on the CPU.

    `noise` is what the choice adds to or uses instead of utility: Gumbel numbers for softmax, uniform numbers for
    random, zeros for topk.
    """

    row: Tensor  # int64
    task: Tensor  # int64, the task's number inside the pool
    uses: Tensor  # int64, rounds that chose the row before
    utility: Tensor  # fp32
    noise: Tensor  # fp64
    chosen: Tensor  # bool

    def marked(self, rows: Set[int]) -> Candidates:
        """The same with `rows` as those chosen."""
        chosen = torch.tensor([row in rows for row in self.row.tolist()], dtype=torch.bool)
        return dataclasses.replace(self, chosen=chosen)


def candidate_positions(groups: Groups, flags: Tensor, arm: int, max_uses: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of an arm's rows that may be chosen: positions int64, tasks int64 on the CPU, uses int64. Waits for the device."""
    at, group, _ = available_positions(arm, groups.offsets, groups.arm_groups, flags, max_uses)
    return at, torch.from_numpy(groups.arm_tasks(arm))[group.cpu()], flags[USES, at].long()


def arranged(chosen: Sequence[Sequence[Tensor]], left: int, seed: int, number: int) -> tuple[Tensor, Tensor, int]:
    """The rows of round `number`, in its seeded shuffle.

    Args:
        chosen: of each arm drawn rows int64, utility fp32 and earlier uses uint8, as `rank` gives them, on the CPU.
        left: how many rows that were never used before it may take, see `cut_to_budget`.
        seed: of the run.

    Returns:
        Rows int64 [n], their utility fp32 [n], and how many of them are new. By NumPy: a round has few rows, and a call of
        torch's costs more than they do.
    """
    rows, utility, uses = (np.concatenate([columns[j].detach().numpy() for columns in chosen]) for j in range(3))
    there = rows >= 0
    rows, utility, uses = cut_to_budget(rows[there], utility[there], uses[there], left)
    place = philox_uniform(seed, STREAM_SHUFFLE, number, torch.from_numpy(rows)).numpy()
    order = np.lexsort((rows, place))
    return torch.from_numpy(rows[order]), torch.from_numpy(utility[order]), int(np.count_nonzero(uses == 0))


def cut_to_budget(
    rows: np.ndarray, utility: np.ndarray, uses: np.ndarray, left: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the chosen rows never used before at most `left`, lowest utility cut first, of equal ones the higher row."""
    new = uses == 0
    if (excess := int(np.count_nonzero(new)) - left) <= 0:
        return rows, utility, uses
    among = np.flatnonzero(new)
    worst = among[np.lexsort((-rows[among], utility[among]))[:excess]]
    kept = np.ones(len(rows), dtype=bool)
    kept[worst] = False
    return rows[kept], utility[kept], uses[kept]
