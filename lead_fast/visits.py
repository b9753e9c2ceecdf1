"""What each observation shows for free: the loss that was predicted for a row, beside the loss that it then had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lead_fast.reference_state import (
    BEFORE_ARM,
    BEFORE_DROP,
    BEFORE_LOSS,
    BEFORE_OBSERVED,
    BEFORE_ROUND,
    BEFORE_ROW,
    BEFORE_WIDTH,
    LOSS,
    ROUND,
)
from lead_fast.utility import Clocks, LossChangeEstimator, UtilityTable

#: columns of an estimator's predicted losses are named by this prefix and the estimator. They are not cut at 0, as Lhat is:
#: an estimator that foresees too large a fall is to be told by how much.
PREDICTED = "predicted."

Visits = dict[str, Tensor]
#: of one micro-batch: "before" as `observe` writes it, and the drops that other estimators than grad_norm predict
Record = dict[str, Tensor]


def predictions(table: UtilityTable, clocks: Clocks, estimators: Mapping[str, LossChangeEstimator], rows: Tensor) -> Visits:
    """What stands of `rows`, int64 [R], now, and the loss that each estimator predicts of them: columns of `collect`."""
    at = table.position[rows].long()
    visits = {"row": rows, "arm": table.arm[at], "seen_round": table.seen[ROUND, at], "seen_loss": table.values[LOSS, at]}
    for name, estimator in estimators.items():
        visits[PREDICTED + name] = visits["seen_loss"] - estimator.drop(table, clocks, at)
    return visits


def begin_record(table: UtilityTable, clocks: Clocks, others: Mapping[str, LossChangeEstimator], rows: Tensor) -> Record:
    """The record of a micro-batch, in which `observe` is to write what stood of its rows before; nothing waits.

    Args:
        others: estimators whose drops `observe` does not write.
        rows: int64 [S].
    """
    record = {"before": torch.empty(BEFORE_WIDTH, len(rows), dtype=torch.float64, device=rows.device)}
    if others:
        in_pool = (rows >= 0) & (rows < len(table.rows))
        at = table.position[torch.where(in_pool, rows, 0)].long()
        record |= {name: estimator.drop(table, clocks, at).float() for name, estimator in others.items()}
    return record


def collect(records: Sequence[Record], paired: str | None) -> Visits:
    """The visits that the table took of micro-batches as one dict of columns, in order; no micro-batch, no column.

    Args:
        records: as the engine keeps them, on the CPU.
        paired: the estimator whose drops "before" holds.
    """
    if not records:
        return {}
    columns = {name: np.concatenate([record[name].numpy() for record in records], -1) for name in records[0]}
    before = columns.pop("before")
    taken = before[BEFORE_ROW] >= 0
    before = before[:, taken]
    drops = {} if paired is None else {paired: before[BEFORE_DROP].astype(np.float32)}
    drops |= {name: drop[taken] for name, drop in columns.items()}
    seen_loss = before[BEFORE_LOSS].astype(np.float32)
    visits = {
        "row": before[BEFORE_ROW].astype(np.int64), "arm": before[BEFORE_ARM].astype(np.int16),
        "seen_round": before[BEFORE_ROUND].astype(np.int32), "seen_loss": seen_loss,
        "observed": before[BEFORE_OBSERVED].astype(np.float32),
    }  # fmt: skip
    visits |= {PREDICTED + name: seen_loss - drop for name, drop in drops.items()}
    return {name: torch.from_numpy(column) for name, column in visits.items()}
