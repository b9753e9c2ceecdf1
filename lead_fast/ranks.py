"""Several processes, one table: each observes its own share of a round, and all merge the shares in one order.

Between rounds nothing reads the table, so a rank keeps what it observed until the round ends. Then one gather brings every
rank all observations, which go into the table ordered by (optimizer step, micro-batch, rank): the order in which one process
with as many micro-batches would have made them. So every rank holds the same table, bit for bit, and draws the same arm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Observation(NamedTuple):
    """One micro-batch's statistics, [S] each, and the optimizer steps completed before it."""

    step: int
    rows: Tensor  # int64
    loss: Tensor  # fp32
    num_tokens: Tensor  # fp32
    grad_norm_sq: Tensor  # fp32


class Shards:
    """The open round's observations of this rank.

    Args:
        group: the ranks that train together.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.observations: list[Observation] = []

    def add(self, observation: Observation) -> None:
        self.observations.append(observation)

    def merge(self, device: torch.device) -> Iterator[Observation]:
        """Empties the list, and gives every rank's observations in order. All ranks must call it."""
        records, self.observations = self._records(device), []
        gathered = self._gather(records)
        rank = torch.cat([torch.full((len(part),), r, dtype=torch.float64, device=device) for r, part in enumerate(gathered)])
        everything = torch.cat(gathered)
        # Stable sorts from the last key to the first leave the samples of a micro-batch in their order.
        order = torch.arange(len(rank), device=device)
        for key in (rank, everything[:, 1], everything[:, 0]):
            order = order[torch.argsort(key[order], stable=True)]
        everything, rank = everything[order], rank[order]
        keys = torch.stack([everything[:, 0], everything[:, 1], rank], 1)
        _, counts = torch.unique_consecutive(keys, dim=0, return_counts=True)
        for part in everything.split(counts.tolist()) if len(everything) else ():
            rows, loss, num_tokens, grad_norm_sq = part[:, 2:].unbind(1)
            yield Observation(int(part[0, 0]), rows.long(), loss.float(), num_tokens.float(), grad_norm_sq.float())

    def _records(self, device: torch.device) -> Tensor:
        """This rank's observations, fp64 [n, 6]: step, micro-batch of the step, row, loss, tokens, gradient norm."""
        parts, micro_batches = [torch.zeros(0, 6, dtype=torch.float64, device=device)], dict[int, int]()
        for step, *columns in self.observations:
            number = micro_batches[step] = micro_batches.get(step, -1) + 1
            place = columns[0].new_tensor([step, number]).expand(len(columns[0]), 2)
            parts.append(torch.cat([place.double(), torch.stack([c.double() for c in columns], 1)], 1))
        return torch.cat(parts)

    def _gather(self, records: Tensor) -> list[Tensor]:
        world = dist.get_world_size(self.group)
        counts = torch.zeros(world, dtype=torch.int64, device=records.device)
        dist.all_gather_into_tensor(counts, counts.new_tensor([len(records)]), group=self.group)
        sizes = counts.tolist()
        padded = records.new_zeros(max(sizes), records.shape[1])
        padded[: len(records)] = records
        gathered = padded.new_empty(world * len(padded), records.shape[1])
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        return [part[:size] for part, size in zip(gathered.view(world, -1, records.shape[1]), sizes, strict=True)]
