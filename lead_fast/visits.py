"""What each observation shows for free: the loss that was predicted for a row, beside the loss that it then had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lead_fast.reference_state import LOSS, ROUND
from lead_fast.utility import Clocks, LossChangeEstimator, UtilityTable

#: columns of an estimator's predicted losses are named by this prefix and the estimator. They are not cut at 0, as Lhat is:
#: an estimator that foresees too large a fall is to be told by how much.
PREDICTED = "predicted."

Visits = dict[str, Tensor]


def make_visit(
    table: UtilityTable, clocks: Clocks, estimators: Mapping[str, LossChangeEstimator], rows: Tensor, loss: Tensor,
    valid: Tensor,
) -> Visits:  # fmt: skip
    """One micro-batch's observations beside what every estimator predicted, before the table takes them; nothing waits.

    Args:
        rows: int64 [S]. loss: fp32 [S], observed. valid: bool [S], see `utility.observed`; the others get row -1.
    """
    known = torch.where(valid, rows, 0)
    at = table.position[known].long()
    visit = {
        "row": torch.where(valid, rows, -1),
        "arm": table.arm[at],
        "seen_round": table.seen[ROUND, at],
        "seen_loss": table.values[LOSS, at],
        "observed": loss.clone(),  # the caller may fill its buffer again
    }
    for name, estimator in estimators.items():
        visit[PREDICTED + name] = visit["seen_loss"] - estimator.drop(table, clocks, at)
    return visit


def collect(visits: Sequence[Visits]) -> Visits:
    """The valid visits of micro-batches as one dict of columns on the CPU, in order; no micro-batch, no column."""
    if not visits:
        return {}
    columns = {name: torch.cat([v[name] for v in visits]) for name in visits[0]}
    valid = columns["row"] >= 0
    return {name: column[valid].cpu() for name, column in columns.items()}
