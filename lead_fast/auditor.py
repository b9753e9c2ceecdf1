"""The audit while training: what was predicted beside what is true, for random rows re-scored now and then and every visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lead_fast.audit import write_records
from lead_fast.config import TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.reference_state import STREAM_AUDIT
from lead_fast.rng import philox_uniform
from lead_fast.rounds import Round, RoundReport
from lead_fast.visits import predictions

#: true losses of rows now, fp32 [n] on the CPU, and the tokens of the forward passes that gave them
Scorer = Callable[[Sequence[int]], tuple[Tensor, int]]


class Auditor:
    """Hands each round's truths to the run's folder; predictions and choices are those of a run without it.

    Args:
        engine: before round 1; gets the estimators to audit as shadows and keeps its visits from now on.
        config: `audit_every`, `audit_rows`, `audit_estimators`.
        score: scores rows with the model as it is, in evaluation mode.
        folder: gets rescored-ROUND.parquet and visits-ROUND.parquet; None where another process writes them.
    """

    def __init__(self, engine: LeadEngine, config: TrainConfig, score: Scorer, folder: Path | None) -> None:
        self.engine, self.score, self.folder = engine, score, folder
        self.every, self.num_rows = config.audit_every, config.audit_rows
        engine.shadow(config.audited)
        engine.record_visits = True

    def after_round(self, rnd: Round, report: RoundReport) -> dict[str, Any]:
        """Writes what the round showed, and every `audit_every` rounds what random rows show.

        Returns:
            {"audit": {"rows": re-scored, "tokens": forward tokens}} where rows were re-scored, for the round's record.
        """
        if report.visits and self.folder is not None:
            write_records(self.folder, "visits", rnd.number, report.visits)
        if rnd.number % self.every:
            return {}
        rows = audit_rows(self.engine, rnd.number, self.num_rows)
        engine, at = self.engine, rows.to(self.engine.device)
        # Predicted before they are scored: a scorer that touched the engine could not make the audit look better.
        predicted = predictions(engine.table, engine.clocks, engine.estimators, at)
        columns = {name: column.cpu() for name, column in predicted.items()}
        columns["observed"], tokens = self.score(rows.tolist())
        if self.folder is not None:
            write_records(self.folder, "rescored", rnd.number, columns)
        return {"audit": {"rows": len(rows), "tokens": tokens}}


def audit_rows(engine: LeadEngine, number: int, count: int) -> Tensor:
    """Random rows to re-score after round `number`: half of those trained on so far, half of those never chosen.

    Args:
        engine: its seed, its rows that may be chosen, and its history; nothing else decides, so a resumed run draws the same.
        count: rows in all; fewer where a half has fewer.

    Returns:
        int64 [n] on the CPU, ascending.
    """
    choosable = engine.groups.choosable_rows().cpu()
    trained = torch.zeros(len(engine.pool), dtype=torch.bool)
    for _, rows, _ in engine.history:
        trained[rows] = True
    halves = [choosable[trained[choosable]], choosable[~trained[choosable]]]
    drawn = [
        half[philox_uniform(engine.config.seed, STREAM_AUDIT, number, half).argsort(stable=True)[: count // 2]]
        for half in halves
    ]
    return torch.cat(drawn).sort().values
