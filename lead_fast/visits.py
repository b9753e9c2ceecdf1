"""What each observation shows for free: the loss that was predicted for a row, beside the loss that it then had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lead_fast.device import copy_to_host
from lead_fast.reference_state import BEFORE_ARM, BEFORE_DROP, BEFORE_LOSS, BEFORE_ROUND, BEFORE_ROW, LOSS, ROUND
from lead_fast.utility import Clocks, LossChangeEstimator, UtilityTable

#: columns of an estimator's predicted losses are named by this prefix and the estimator. They are not cut at 0, as Lhat is:
#: an estimator that foresees too large a fall is to be told by how much.
PREDICTED = "predicted."

Visits = dict[str, Tensor]
#: of one micro-batch: "before" as `observe` writes it, "observed", and the drops that other estimators than grad_norm predict
Record = dict[str, Tensor]


def predictions(table: UtilityTable, clocks: Clocks, estimators: Mapping[str, LossChangeEstimator], rows: Tensor) -> Visits:
    """What stands of `rows`, int64 [R], now, and the loss that each estimator predicts of them: columns of `collect`."""
    at = table.position[rows].long()
    visits = {"row": rows, "arm": table.arm[at], "seen_round": table.seen[ROUND, at], "seen_loss": table.values[LOSS, at]}
    for name, estimator in estimators.items():
        visits[PREDICTED + name] = visits["seen_loss"] - estimator.drop(table, clocks, at)
    return visits


def begin_record(
    table: UtilityTable, clocks: Clocks, others: Mapping[str, LossChangeEstimator], rows: Tensor, loss: Tensor
) -> Record:
    """The record of a micro-batch, in which `observe` is to write what stood of its rows before; nothing waits.

    Args:
        others: estimators whose drops `observe` does not write.
        rows: int64 [S]. loss: fp32 [S], observed.
    """
    before = torch.empty(BEFORE_DROP + 1, len(rows), dtype=torch.float64, device=loss.device)
    record = {"before": before, "observed": loss.clone()}  # the caller may fill its buffer again
    if others:
        in_pool = (rows >= 0) & (rows < len(table.rows))
        at = table.position[torch.where(in_pool, rows, 0)].long()
        record |= {name: estimator.drop(table, clocks, at) for name, estimator in others.items()}
    return record


def collect(records: Sequence[Record], paired: str | None) -> Visits:
    """The visits that the table took of micro-batches as one dict of columns on the CPU, in order; no micro-batch, no column.

    Args:
        records: as the engine keeps them.
        paired: the estimator whose drops "before" holds.
    """
    if not records:
        return {}
    names = [name for name in records[0] if name != "before"]
    columns = [torch.cat([record[name] for record in records]) for name in names]
    before, *columns = copy_to_host(torch.cat([record["before"] for record in records], 1), *columns)
    taken = before[BEFORE_ROW] >= 0  # found on the host: on a device it would be waited for once more
    before, rest = before[:, taken], {name: column[taken] for name, column in zip(names, columns, strict=True)}
    visits = {
        "row": before[BEFORE_ROW].long(), "arm": before[BEFORE_ARM].short(), "seen_round": before[BEFORE_ROUND].int(),
        "seen_loss": before[BEFORE_LOSS].float(), "observed": rest.pop("observed"),
    }  # fmt: skip
    if paired is not None:
        rest = {paired: before[BEFORE_DROP].float(), **rest}
    return visits | {PREDICTED + name: visits["seen_loss"] - drop for name, drop in rest.items()}
