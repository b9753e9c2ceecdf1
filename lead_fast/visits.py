"""What each observation shows for free: the loss that was predicted for a row, beside the loss that it then had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lead_fast.utility import Clocks, LossChangeEstimator, UtilityTable, lazy_loss

#: columns of an estimator's predicted losses are named by this prefix and the estimator
PREDICTED = "predicted."

Visits = dict[str, Tensor]


class Watch(LossChangeEstimator):
    """Several estimators that see the same observations, as one; only `pair` speaks for all of them.

    Args:
        estimators: by name. The table and the clocks are shared, what each learns is its own.

    Attributes:
        record: whether `pair` also keeps what it sees.
        visits: what it kept since the list was last replaced, one entry a micro-batch; entries that are not valid have row -1.
    """

    def __init__(self, estimators: dict[str, LossChangeEstimator]) -> None:
        self.estimators, self.record = estimators, False
        self.visits: list[Visits] = []

    def pair(self, table: UtilityTable, clocks: Clocks, rows: Tensor, loss: Tensor, valid: Tensor) -> None:
        if self.record:
            visit = {
                "row": torch.where(valid, rows, -1),
                "arm": table.arm[rows],
                "round_before": table.round[rows],
                "loss_before": table.loss[rows],
                "observed": loss.float(),
            }
            for name, estimator in self.estimators.items():
                visit[PREDICTED + name] = lazy_loss(table, clocks, estimator, rows)
            self.visits.append(visit)
        for estimator in self.estimators.values():
            estimator.pair(table, clocks, rows, loss, valid)


def collect(visits: Sequence[Visits]) -> Visits:
    """The valid visits of micro-batches as one dict of columns on the CPU, in order; no micro-batch, no column."""
    if not visits:
        return {}
    columns = {name: torch.cat([v[name] for v in visits]) for name in visits[0]}
    valid = columns["row"] >= 0
    return {name: column[valid].cpu() for name, column in columns.items()}
