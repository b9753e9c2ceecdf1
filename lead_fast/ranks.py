"""Several processes, one run: what they tell each other (`Ranks`), and one table out of what each observed (`Shards`).

Between rounds nothing reads the table, so a rank keeps what it observed until the round ends. Then one gather brings every
rank all observations, which go into the table ordered by (optimizer step, micro-batch, rank): the order in which one process
with as many micro-batches would have made them. So every rank holds the same table, bit for bit, and draws the same arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# torch 2.13 deprecates the older name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class FirstProcessError(RuntimeError):
    """The first process has failed at what the others waited for; it says itself why."""


class Ranks:
    """The processes that train together; without a group it is this process alone, and every call is free.

    All of them must make the same calls in the same order. What the host wants to know crosses by way of the host where the
    group can (gloo): the device need not wait, and a process that has ended is noticed.

    Args:
        group: of torch.distributed, or None.
        device: where this process trains.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self.group, self.device = group, torch.device(device)
        self._host = torch.device("cpu") if group is None or _crosses_by_host(group) else self.device
        self.number = 0 if group is None else dist.get_rank(group)
        self.world = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def started(cls, device: torch.device | str) -> Ranks:
        """Those that the launcher started; this process alone where there is one, or none were set up."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return cls(dist.group.WORLD if several else None, device)

    @property
    def is_first(self) -> bool:
        """This process is the one that writes files and talks to the person."""
        return self.number == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's share of items that are dealt round robin."""
        return list(items[self.number :: self.world])

    def idles(self, items: Sequence[Any]) -> bool:
        """This process's share is one item smaller than that of others."""
        return len(items[self.number :: self.world]) * self.world < len(items)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes of a tensor of one shape and device; in place where there are several."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """True where it is for one of them."""
        return flag if self.group is None else bool(self.sum_of(int(flag)))

    def sum_of(self, value: int) -> int:
        """The sum of an integer over processes."""
        return value if self.group is None else int(self.sum(torch.tensor([value], device=self._host)))

    def of_first(self, value: int) -> int:
        """The first process's value."""
        return self.sum_of(value if self.is_first else 0)

    def max_of(self, *values: int) -> list[int]:
        """The largest of each integer over processes."""
        if self.group is None:
            return list(values)
        largest = torch.tensor(values, device=self._host)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

    def on_first(self, call: Callable[[], T]) -> T | None:
        """What `call` returns, which the first process alone runs, None on the others, which wait for it.

        Raises:
            Exception: on the first process, what the call raised. FirstProcessError: on the others, then.
        """
        result, error = None, None
        if self.is_first:
            try:
                result = call()
            except Exception as raised:
                error = raised
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise FirstProcessError("the first process has failed, and says why")
        return result

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in their order; of any type, by way of the host."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def wait(self) -> None:
        """Returns when all have called it."""
        self.any(False)

    def agree(self, what: str, value: int) -> None:
        """Checks that all have one value.

        Raises:
            RuntimeError: they have not: `what` is named, with each process's value.
        """
        if self.group is None:
            return
        values = torch.zeros(self.world, dtype=torch.int64, device=self._host)
        values[self.number] = value
        found = self.sum(values).tolist()
        if len(set(found)) > 1:
            raise RuntimeError(f"the {self.world} processes must agree on {what}, got {found}")


def _crosses_by_host(group: dist.ProcessGroup) -> bool:
    try:
        group._get_backend(torch.device("cpu"))
    except RuntimeError:  # NCCL alone
        return False
    return True


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
        """Keeps a copy: the caller may fill its buffers again before the round ends."""
        step, *columns = observation
        self.observations.append(Observation(step, *(column.clone() for column in columns)))

    def merge(self, device: torch.device) -> Iterator[Observation]:
        """Empties the list, and gives every rank's observations in order. All ranks must call it."""
        records, self.observations = self._records(device), []
        yield from _in_order(self._gather(records))

    def state_dict(self, device: torch.device) -> dict[str, Tensor]:
        """Every rank's observations so far, by rank. All ranks must call it."""
        return {str(rank): part.cpu() for rank, part in enumerate(self._gather(self._records(device)))}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Takes this rank's share of `state_dict()`; where there are other ranks than then, the first one takes all."""
        parts = _by_rank(state, device)
        if len(parts) == dist.get_world_size(self.group):
            parts = [parts[dist.get_rank(self.group)]]
        elif dist.get_rank(self.group):
            parts = []
        self.observations = list(_in_order(parts))

    def _records(self, device: torch.device) -> Tensor:
        """This rank's observations, fp64 [n, 6]: step, micro-batch of the step, row, loss, tokens, gradient norm."""
        if not self.observations:
            return torch.zeros(0, 6, dtype=torch.float64, device=device)
        places, micro_batches = [], dict[int, int]()
        for observation in self.observations:
            number = micro_batches[observation.step] = micro_batches.get(observation.step, -1) + 1
            places += [[observation.step, number]] * len(observation.rows)
        columns = [torch.cat(column).double() for column in list(zip(*self.observations, strict=True))[1:]]
        return torch.cat([torch.tensor(places, dtype=torch.float64).to(device).reshape(-1, 2), torch.stack(columns, 1)], 1)

    def _gather(self, records: Tensor) -> list[Tensor]:
        world = dist.get_world_size(self.group)
        counts = torch.zeros(world, dtype=torch.int64, device=records.device)
        _all_gather(counts, counts.new_tensor([len(records)]), group=self.group)
        sizes = counts.tolist()
        padded = records.new_zeros(max(sizes), records.shape[1])
        padded[: len(records)] = records
        gathered = padded.new_empty(world * len(padded), records.shape[1])
        _all_gather(gathered, padded, group=self.group)
        return [part[:size] for part, size in zip(gathered.view(world, -1, records.shape[1]), sizes, strict=True)]


def _in_order(parts: Sequence[Tensor]) -> Iterator[Observation]:
    """Observations of `_records` of ranks: by step, by micro-batch of the step, by rank."""
    if not parts or not any(map(len, parts)):
        return
    rank = torch.cat([part.new_full((len(part),), r) for r, part in enumerate(parts)])
    everything = torch.cat(list(parts))
    # Stable sorts from the last key to the first leave the samples of a micro-batch in their order.
    order = torch.arange(len(rank), device=rank.device)
    for key in (rank, everything[:, 1], everything[:, 0]):
        order = order[torch.argsort(key[order], stable=True)]
    everything, rank = everything[order], rank[order]
    keys = torch.stack([everything[:, 0], everything[:, 1], rank], 1)
    _, counts = torch.unique_consecutive(keys, dim=0, return_counts=True)
    sizes = counts.tolist()
    steps = everything[(counts.cumsum(0) - counts), 0].tolist()
    for step, part in zip(steps, everything.split(sizes), strict=True):
        rows, loss, num_tokens, grad_norm_sq = part[:, 2:].unbind(1)
        yield Observation(int(step), rows.long(), loss.float(), num_tokens.float(), grad_norm_sq.float())


def observations_of(state: dict[str, Tensor], device: torch.device) -> Iterator[Observation]:
    """All observations of a `Shards.state_dict()`, in the order in which one process would have made them."""
    return _in_order(_by_rank(state, device))


def _by_rank(state: dict[str, Tensor], device: torch.device) -> list[Tensor]:
    """Its parts in the order of ranks; a file may hold "10" before "2"."""
    return [state[str(rank)].to(device) for rank in range(len(state))]
