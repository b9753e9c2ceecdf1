"""The audit while training: what was predicted beside what is true, for random rows re-scored now and then and every visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lead_fast.audit import write_records
from lead_fast.config import TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.reference_state import STREAM_AUDIT
from lead_fast.rng import philox_uniform
from lead_fast.rounds import Round, RoundReport
from lead_fast.visits import PREDICTED

#: true losses of rows now, fp32 [n] on the CPU, and the tokens of the forward passes that gave them
Scorer = Callable[[Sequence[int]], tuple[Tensor, int]]


class Auditor:
    """Hands each round's truths to the run's folder; predictions and choices are those of a run without it.

    Args:
        engine: before round 1; gets the estimators to audit as shadows and keeps its visits from now on.
        config: `audit_every`, `audit_rows`, `audit_estimators`.
        score: scores rows with the model as it is, in evaluation mode.
        folder: gets rescored-ROUND.parquet and visits-ROUND.parquet.
    """

    def __init__(self, engine: LeadEngine, config: TrainConfig, score: Scorer, folder: Path) -> None:
        self.engine, self.score, self.folder = engine, score, folder
        self.every, self.num_rows = config.audit_every, config.audit_rows
        engine.shadow(config.audited)
        engine.record_visits = True

    def after_round(self, rnd: Round, report: RoundReport) -> dict[str, Any]:
        """Writes what the round showed, and every `audit_every` rounds what random rows show.

        Returns:
            {"audit": {"rows": re-scored, "tokens": forward tokens}} where rows were re-scored, for the round's record.
        """
        if report.visits:
            write_records(self.folder, "visits", rnd.number, report.visits)
        if rnd.number % self.every:
            return {}
        rows, seen_round = audit_rows(self.engine, rnd.number, self.num_rows)
        # Predicted before they are scored: a scorer that touched the engine could not make the audit look better.
        columns: dict[str, Any] = {
            "row": rows,
            "arm": np.asarray(self.engine.pool.arm)[rows.numpy()],
            "seen_round": seen_round,
            "seen_loss": self.engine.predicted_loss(rows, "none").cpu(),
        }
        for name in self.engine.estimators:
            columns[PREDICTED + name] = self.engine.predicted_loss(rows, name).cpu()
        columns["observed"], tokens = self.score(rows.tolist())
        write_records(self.folder, "rescored", rnd.number, columns)
        return {"audit": {"rows": len(rows), "tokens": tokens}}


def audit_rows(engine: LeadEngine, number: int, count: int) -> tuple[Tensor, Tensor]:
    """Random rows to re-score after round `number`: half of those trained on so far, half of those never chosen.

    Args:
        engine: its seed, its rows that may be chosen, and its history; nothing else decides, so a resumed run draws the same.
        count: rows in all; fewer where a half has fewer.

    Returns:
        Rows, int64 [n] on the CPU, ascending, and the round in which each was chosen last, int32 [n], 0 for never.
    """
    choosable = engine.groups.choosable_rows().cpu()
    last = torch.zeros(len(engine.pool), dtype=torch.int32)
    for round_number, rows, _ in engine.history:
        last[rows] = round_number
    halves = [choosable[last[choosable] > 0], choosable[last[choosable] == 0]]
    drawn = [
        half[philox_uniform(engine.config.seed, STREAM_AUDIT, number, half).argsort(stable=True)[: count // 2]]
        for half in halves
    ]
    rows = torch.cat(drawn).sort().values
    return rows, last[rows]
