"""LEAD against its controls at the same number of trained tokens, the same step size, the same start."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.files import write_json
from lead_fast.heldout import heldout_scorer
from lead_fast.offline.prepare import Prepared, encoded_rows
from lead_fast.optimization import Optimization, make_accelerator
from lead_fast.pool import Pool
from lead_fast.run import utility_histogram
from lead_fast.trainer import run_rounds

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """A way to choose rows: engine options, and what it does to the pool's arms.

    `arms` is "difficulty" (as prepared), "one" (no arms, no tasks: plain random selection) or "source" (an arm a source).
    """

    name: str
    title: str
    options: dict[str, Any]
    arms: str = "difficulty"


_RANDOM = {"bandit": "uniform", "choose": "random", "exclude_top": 0.0, "visit_all_first": False, "estimator": "none",
           "hard_rows": "zero"}  # fmt: skip

METHODS = {
    m.name: m
    for m in (
        Method("robust", "LEAD, preset robust", {"preset": "robust"}),
        Method("paper", "LEAD, preset paper", {"preset": "paper", "min_rounds": 0}),
        Method("random", "random selection", _RANDOM, arms="one"),
        Method("random_in_arm", "random within arm", {"preset": "robust", "choose": "random", "exclude_top": 0.0}),
        Method("source_balanced", "random, balanced over sources", _RANDOM, arms="source"),
    )
}


def pool_for(method: Method, pool: Pool) -> Pool:
    """The prepared pool with the arms that the method chooses by; controls see rows set aside, too."""
    if method.arms == "difficulty":
        return pool
    arm = np.zeros(len(pool), np.int16)
    if method.arms == "source":
        if pool.sources is None:
            raise ValueError(f"compare: method {method.name!r} needs a pool with sources")
        arm = pool.sources.astype(np.int16)
    return pool.with_arrays(arm=arm, task=np.zeros(len(pool), np.int32), aside=np.zeros(len(pool), bool))


def run_method(
    method: Method, prepared: Prepared, config: TrainConfig, lead: LeadConfig, heldout: Pool, *, desc: str
) -> dict[str, Any]:
    """One run from the prepared start until `config.train_tokens`.

    Returns:
        {"method", "seed", "rounds": [...], "evaluations": [...], "rows": [row, ...], "utility": histogram, ...}.
    """
    lead = dataclasses.replace(lead, **method.options)
    torch.manual_seed(lead.seed)
    pool = pool_for(method, prepared.pool)
    encoder = prepared.encoder(config)
    accelerator = make_accelerator(config)
    engine = LeadEngine(pool, lead, accelerator.device)
    first_utility = engine.utility(engine.groups.choosable_rows()).cpu().numpy()
    optimization = Optimization(prepared.model(config, seed=lead.seed), accelerator, config)
    score = heldout_scorer(optimization, encoder, heldout, config, lead.seed)
    run = run_rounds(
        engine, optimization, lambda rows: encoded_rows(encoder, pool, rows), config, evaluate_now=score, desc=desc
    )
    return {
        "method": method.name,
        "seed": lead.seed,
        "rounds": run.rounds,
        "evaluations": run.evaluations,
        "rows": [row for _, rows, _ in engine.history for row in rows.tolist()],
        "optimizer_steps": run.num_steps,
        "trained_tokens": run.trained_tokens,
        "utility": utility_histogram(engine, first_utility),
        "seconds": {k: round(v, 3) for k, v in run.seconds.items()},
    }


def compare(
    methods: Sequence[Method],
    seeds: Sequence[int],
    prepare_seed: Callable[[int], Prepared],
    config: TrainConfig,
    lead: LeadConfig,
    heldout: Pool,
    folder: Path,
) -> list[dict[str, Any]]:
    """Every method with every seed; a run that is on disk already is not run again.

    Args:
        prepare_seed: the prepared pool and start of a seed, shared by all methods.
        folder: gets runs/METHOD-SEED.json.
    """
    results = []
    for seed in seeds:
        prepared = prepare_seed(seed)
        for method in methods:
            path = folder / "runs" / f"{method.name}-{seed}.json"
            if not path.exists():
                result = run_method(
                    method, prepared, config, dataclasses.replace(lead, seed=seed), heldout,
                    desc=f"{method.title}, seed {seed}",
                )  # fmt: skip
                write_json(path, result)
            results.append(json.loads(path.read_text()))
            logger.info("%-20s seed %d: held-out loss %.4f", method.title, seed, final_loss(results[-1]))
    return results


def final_loss(result: dict[str, Any]) -> float:
    """Held-out loss after the run: mean over held-out samples of their mean nll per supervised token."""
    return float(result["evaluations"][-1]["heldout_loss"])


def table(
    results: Sequence[dict[str, Any]], methods: Sequence[Method], is_noisy: Callable[[int], bool]
) -> list[dict[str, Any]]:
    """A row a method: held-out loss with its spread over seeds, share of noisy samples trained on, rounds, steps."""
    rows = []
    for method in methods:
        runs = [r for r in results if r["method"] == method.name]
        loss = np.array([final_loss(r) for r in runs])
        noisy = np.array([np.mean([is_noisy(row) for row in r["rows"]]) for r in runs])
        rows.append({
            "method": method.name,
            "title": method.title,
            "seeds": len(runs),
            "heldout_loss": float(loss.mean()),
            "heldout_loss_std": float(loss.std(ddof=1)) if len(loss) > 1 else 0.0,
            "heldout_loss_by_seed": loss.tolist(),
            "noisy_share": float(noisy.mean()),
            "rounds": float(np.mean([len(r["rounds"]) for r in runs])),
            "optimizer_steps": float(np.mean([r["optimizer_steps"] for r in runs])),
            "samples": float(np.mean([len(r["rows"]) for r in runs])),
            "distinct_samples": float(np.mean([len(set(r["rows"])) for r in runs])),
            "trained_tokens": float(np.mean([r["trained_tokens"] for r in runs])),
        })  # fmt: skip
    return rows
