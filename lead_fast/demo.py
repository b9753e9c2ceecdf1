"""`lead-fast demo`: a generated pool, a tiny model, LEAD beside its controls, and what came out."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from lead_fast.compare import METHODS, compare, table
from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.demo_pool import demo_rows
from lead_fast.files import write_json, write_jsonl
from lead_fast.offline.prepare import Prepared, prepare
from lead_fast.offline.pretrain import pretrained_model
from lead_fast.pool import Pool
from lead_fast.report import write_compare_report
from lead_fast.run import claim_folder

logger = logging.getLogger(__name__)

DEMO_METHODS = ("robust", "paper", "random", "random_in_arm")
_PRETRAIN_ROWS, _HELDOUT_ROWS, _POOL_SEED = 3000, 400, 2025
_FILES = {"pool.jsonl", "heldout.jsonl", "runs", "compare.json", "report.html"}
_PRETRAIN_EPOCHS, _LEARNING_RATE, _STEP_TOKENS = 4.0, 5e-4, 512


def run_demo(out: str, *, num_seeds: int, num_rows: int, train_tokens: int, overwrite: bool) -> dict[str, Any]:
    """Runs the demo into `out` and prints its table.

    Args:
        out: folder; must be empty or absent unless `overwrite`.
        num_seeds: runs of each method.
        num_rows: rows of the generated pool.
        train_tokens: trained tokens of each run.

    Returns:
        A JSON summary: the table's rows, and where the report is.
    """
    start = time.perf_counter()
    if overwrite:
        remove_demo(Path(out))
    folder = claim_folder(out, resume=False)
    pool, heldout, base = demo_data(folder, num_rows)
    config = TrainConfig(
        model=str(base), pool=str(pool.path), out=out, tuning="full", learning_rate=_LEARNING_RATE,
        step_tokens=_STEP_TOKENS, max_length=256, warmup_share=0.05, train_tokens=train_tokens, eval_every=10,
        heldout_rows=0,
    )  # fmt: skip

    prepared: dict[int, Prepared] = {}

    def prepare_seed(seed: int) -> Prepared:
        prepared[seed] = prepare(pool, config, LeadConfig(seed=seed), folder / f"prepared-{seed}")
        return prepared[seed]

    # A robust round fills about one optimizer step, so that every method takes steps of the same size.
    lengths = prepare_seed(0).pool.num_tokens
    assert lengths is not None
    round_rows = max(1, int(_STEP_TOKENS / lengths.mean()))
    lead = LeadConfig(budget=1.0, min_rounds=len(pool) // round_rows)
    methods = [METHODS[name] for name in DEMO_METHODS]
    results = compare(methods, range(num_seeds), prepare_seed, config, lead, heldout, folder)
    rows = table(results, methods, lambda row: pool.id(row).endswith("-noisy"))
    pool_share = float(np.mean([pool.id(row).endswith("-noisy") for row in range(len(pool))]))
    write_json(folder / "compare.json", {"table": rows, "noisy_share_of_pool": pool_share})
    report = write_compare_report(folder, rows, results, noisy_share=pool_share)
    print_table(rows, pool_share)
    return {"seconds": round(time.perf_counter() - start, 1), "report": str(report), "methods": rows}


def remove_demo(folder: Path) -> None:
    """Removes an earlier demo's folder, and no other.

    Raises:
        ValueError: the folder holds something that the demo did not write.
    """
    if not folder.exists():
        return
    foreign = [p.name for p in folder.iterdir() if p.name not in _FILES and not p.name.startswith("prepared-")]
    if foreign:
        raise ValueError(f"out: {folder} holds {foreign[0]}, which no demo wrote; it is not replaced")
    shutil.rmtree(folder)


def demo_data(folder: Path, num_rows: int) -> tuple[Pool, Pool, Path]:
    """The generated pool and held-out set, as files in `folder`, and the tiny model pretrained on other rows."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pool.jsonl", demo_rows(num_rows, seed=_POOL_SEED))
    write_jsonl(folder / "heldout.jsonl", demo_rows(_HELDOUT_ROWS, seed=_POOL_SEED + 1, noisy=0.0, duplicates=0.0))
    # Mostly easy and clean rows, so that the model speaks the format and has something left to learn.
    text = demo_rows(_PRETRAIN_ROWS, seed=_POOL_SEED + 2, noisy=0.0, duplicates=0.0, hard=0.15)
    config = TrainConfig(model_config="tiny", max_length=256, step_tokens=2048, pretrain_epochs=_PRETRAIN_EPOCHS)
    base = pretrained_model([row["messages"] for row in text], config, seed=_POOL_SEED)
    return Pool.open(folder / "pool.jsonl"), Pool.open(folder / "heldout.jsonl"), base


def print_table(rows: list[dict[str, Any]], noisy_share: float) -> None:
    """The comparison as a person reads it, on stdout."""
    seeds = rows[0]["seeds"]
    print(f"\nHeld-out loss at equal trained tokens: mean and deviation over {seeds} seeds (lower is better)\n")
    print(f"{'method':<24}{'held-out loss':>20}{'noisy rows chosen':>20}{'rounds':>9}{'steps':>8}{'tokens':>10}")
    for row in sorted(rows, key=lambda r: r["heldout_loss"]):
        loss = f"{row['heldout_loss']:.4f} +- {row['heldout_loss_std']:.4f}"
        print(f"{row['title']:<24}{loss:>20}{row['noisy_share']:>19.1%} {row['rounds']:>8.0f}{row['optimizer_steps']:>8.0f}"
              f"{row['trained_tokens']:>10,.0f}")  # fmt: skip
    print(f"\nNoisy rows in the pool: {noisy_share:.1%}.\n", flush=True)
