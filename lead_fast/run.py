"""A whole run: from a pool on disk to a folder with a fine-tuned model, what was chosen and why (`lead-fast train`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lead_fast.audit import AUDIT_FOLDER
from lead_fast.auditor import Auditor, Scorer
from lead_fast.config import LeadConfig, PrepareConfig, TrainConfig, to_yaml
from lead_fast.engine import LeadEngine
from lead_fast.files import atomic_path, write_json, write_jsonl, write_text
from lead_fast.models import save_model
from lead_fast.offline.prepare import PREPARED_FILE, Prepared, encoded_rows, load_prepared, prepare
from lead_fast.packing import ChatEncoder, Sample
from lead_fast.pool import Pool
from lead_fast.report import write_run_report
from lead_fast.rounds import Round
from lead_fast.signals import Signals
from lead_fast.trainer import AfterRound, Optimization, TrainingRun, evaluate, make_accelerator, run_rounds, write_candidates
from lead_fast.utility import estimator_class

logger = logging.getLogger(__name__)


class RunFolderError(ValueError):
    """The output folder cannot be used as asked."""


def claim_folder(path: str, *, resume: bool) -> Path:
    """The output folder; refused when it holds something and the run does not resume."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"out: expected a folder, got the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise RunFolderError(f"out: {folder} is not empty; name another folder, or go on in it with --resume")
    return folder


def open_inputs(config: PrepareConfig) -> Prepared | Pool:
    """A prepared pool's folder, or a raw pool read and checked whole, before anything is written."""
    for name in ("pool", "out"):
        if getattr(config, name) is None:
            raise ValueError(f"{name}: required")
    assert config.pool is not None and config.out is not None
    if (Path(config.pool) / PREPARED_FILE).exists():
        prepared = load_prepared(Path(config.pool))
        if config.model is not None or config.model_config is not None:
            raise ValueError(f"model: {config.pool} was prepared with {prepared.base}; leave --model and --model-config out")
        if prepared.start is not None and prepared.summary["tuning"] != config.tuning:
            raise ValueError(f"tuning: {config.pool} was prepared with {prepared.summary['tuning']!r}, got {config.tuning!r}")
        return prepared
    if (config.model is None) == (config.model_config is None):
        raise ValueError("model: expected exactly one of --model and --model-config")
    rejects = f"{config.out.rstrip('/')}.rejects.jsonl" if config.on_bad_row == "skip" else None
    on_bad_row: Any = config.on_bad_row  # checked by PrepareConfig
    return Pool.open(config.pool, on_bad_row=on_bad_row, rejects=rejects)


def run_prepare(config: PrepareConfig, lead: LeadConfig) -> dict[str, Any]:
    """`lead-fast prepare`: the offline stages alone, into `config.out`.

    Returns:
        A JSON summary.
    """
    _set_threads(config)
    inputs = open_inputs(config)
    if isinstance(inputs, Prepared):
        raise ValueError(f"pool: {config.pool} is prepared already; give it to `lead-fast train`")
    assert config.out is not None
    folder = claim_folder(config.out, resume=config.resume)
    prepared = prepare(inputs, config, lead, folder)
    write_text(folder / "config.yaml", to_yaml(config, lead.resolve()))
    return {"out": str(folder), **prepared.summary}


def run_train(config: TrainConfig, lead: LeadConfig) -> dict[str, Any]:
    """`lead-fast train`: the offline stages where the pool is raw, LEAD's rounds, the trained model, the report.

    Returns:
        A JSON summary, also written to summary.json.
    """
    start = time.perf_counter()
    _set_threads(config)
    torch.manual_seed(lead.seed)
    for name in [lead.estimator, *(config.audited if config.audit_every else ())]:
        estimator_class(name)
    inputs = open_inputs(config)
    heldout = None if config.heldout is None else Pool.open(config.heldout)
    assert config.out is not None
    folder = claim_folder(config.out, resume=config.resume)
    if isinstance(inputs, Prepared):
        # The kind of model decides the default learning rate.
        prepared, config = inputs, dataclasses.replace(config, model_config=inputs.summary["model_config"])
    else:
        prepared = prepare(inputs, config, lead, folder / "prepared")
    write_text(folder / "config.yaml", to_yaml(config, lead.resolve()))

    tokenizer = prepared.tokenizer(config)
    encoder = ChatEncoder(tokenizer, config.max_length)
    accelerator = make_accelerator(config)
    engine = LeadEngine(prepared.pool, lead, accelerator.device)
    engine.record_candidates = config.log_utilities
    first_utility = engine.utility(engine.groups.choosable_rows()).cpu().numpy()
    optimization = Optimization(prepared.model(config, seed=lead.seed), accelerator, config)
    after_round: dict[str, AfterRound] = {"signals": Signals(engine).after_round}
    if config.audit_every:
        scorer = row_scorer(optimization, ChatEncoder(tokenizer, config.max_length), prepared.pool, config)
        after_round["audit"] = Auditor(engine, config, scorer, folder / AUDIT_FOLDER).after_round
    if engine.budget < engine.config.budget_rows(len(prepared.pool)):
        logger.warning("the budget is cut to the %d rows that are not set aside", engine.budget)

    rounds_path = folder / "rounds.jsonl"
    rounds_path.unlink(missing_ok=True)
    for name in ("utilities", AUDIT_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)  # of an attempt before
    with rounds_path.open("a", encoding="utf-8") as rounds_file:

        def on_round(rnd: Round, record: dict[str, Any]) -> None:
            rounds_file.write(json.dumps(record, allow_nan=False) + "\n")
            rounds_file.flush()
            if config.log_utilities:
                write_candidates(rnd, folder / "utilities")

        score = heldout_scorer(optimization, encoder, heldout, config, lead.seed)
        run = run_rounds(
            engine, optimization, lambda rows: encoded_rows(encoder, prepared.pool, rows), config,
            after_round=after_round, on_round=on_round, evaluate_now=score,
        )  # fmt: skip
    if encoder.cuts.prompts or encoder.cuts.answers:
        logger.warning("%s", encoder.cuts)

    with atomic_path(folder / "model") as temporary:
        save_model(optimization.bare, tokenizer, temporary)
    write_jsonl(folder / "selected.jsonl", engine.selected())
    summary = summarize(engine, run, prepared, time.perf_counter() - start)
    summary = {"out": str(folder), "model": str(folder / "model"), **summary}
    write_json(folder / "summary.json", summary | {
        "evaluations": run.evaluations,
        "utility": utility_histogram(engine, first_utility),
        "arms": prepared.summary.get("arms"),
        "sources": source_shares(engine),
        "warnings": [warning for r in run.rounds for warning in r["warnings"]],
        "preparation": prepared.summary,
    })  # fmt: skip
    write_run_report(folder)
    return summary


def heldout_scorer(
    optimization: Optimization, encoder: ChatEncoder, heldout: Pool | None, config: TrainConfig, seed: int
) -> Callable[[], dict[str, Any]] | None:
    """A function that scores the held-out rows now: mean over samples and over tokens, and by source."""
    if heldout is None:
        return None
    rows = np.arange(len(heldout))
    if config.heldout_rows and len(heldout) > config.heldout_rows:
        rows = np.sort(np.random.default_rng([seed, 3]).permutation(len(heldout))[: config.heldout_rows])
    samples: list[Sample] = encoded_rows(encoder, heldout, rows)
    tokens = torch.tensor([float(s.supervised[1:].sum()) for s in samples])

    def score() -> dict[str, Any]:
        loss = evaluate(
            optimization.packed, samples, pack_tokens=config.pack_tokens, device=optimization.device, desc="held-out"
        )
        scores: dict[str, Any] = {
            "heldout_loss": float(loss.mean()), "heldout_token_loss": float((loss * tokens).sum() / tokens.sum()),
        }  # fmt: skip
        if heldout.sources is not None:
            source = torch.from_numpy(heldout.sources[rows].astype(np.int64))
            scores["by_source"] = {
                name: float(loss[source == k].mean()) for k, name in enumerate(heldout.source_names) if (source == k).any()
            }
        return scores

    return score


def row_scorer(optimization: Optimization, encoder: ChatEncoder, pool: Pool, config: TrainConfig) -> Scorer:
    """A function that scores rows of the pool now: each row's mean nll per supervised token, and the tokens that it took."""

    def score(rows: Sequence[int]) -> tuple[torch.Tensor, int]:
        samples: list[Sample] = encoded_rows(encoder, pool, rows)
        loss = evaluate(optimization.packed, samples, pack_tokens=config.pack_tokens, device=optimization.device, desc="audit")
        return loss, sum(map(len, samples))

    return score


def summarize(engine: LeadEngine, run: TrainingRun, prepared: Prepared, seconds: float) -> dict[str, Any]:
    """What a run did, in one flat JSON object."""
    rewards = [r["reward"] for r in run.rounds if r["reward"] is not None]
    summary: dict[str, Any] = {
        "preset": engine.config.preset,
        "rounds": engine.num_rounds,
        "rows": engine.num_used,
        "budget": engine.budget,
        "pool": len(engine.pool),
        "optimizer_steps": run.num_steps,
        "trained_tokens": run.trained_tokens,
        "supervised_tokens": run.supervised_tokens,
        "final_loss": run.rounds[-1]["mean_loss"] if run.rounds else None,
        "mean_reward": float(np.mean(rewards)) if rewards else None,
        "warmup_tokens": prepared.summary.get("warmup", {}).get("tokens", 0),
        "scoring_tokens": prepared.summary.get("scoring", {}).get("tokens", 0),
        "audit_tokens": sum(r.get("audit", {}).get("tokens", 0) for r in run.rounds),
        "arm_probability_reachable": engine.bandit.reachable(engine.num_rounds),
        "arm_probability_reached": max((max(r["probs"]) for r in run.rounds), default=None),
        "seconds_by_part": {k: round(v, 3) for k, v in sorted(run.seconds.items())},
        "seconds": round(seconds, 3),
    }
    if run.evaluations:
        summary["heldout_loss_before"] = run.evaluations[0]["heldout_loss"]
        summary["heldout_loss_after"] = run.evaluations[-1]["heldout_loss"]
    return summary


def utility_histogram(engine: LeadEngine, first: np.ndarray, bins: int = 40) -> dict[str, Any]:
    """Utilities of all rows that may be chosen, at the start and now, over common bins."""
    last = engine.utility(engine.groups.choosable_rows()).cpu().numpy()
    edges = np.histogram_bin_edges(np.concatenate([first, last]), bins=bins)
    return {
        "edges": edges.tolist(),
        "start": np.histogram(first, edges)[0].tolist(),
        "end": np.histogram(last, edges)[0].tolist(),
    }


def source_shares(engine: LeadEngine) -> list[dict[str, Any]] | None:
    """Rows of each source in the pool, and how many of them were chosen."""
    pool = engine.pool
    if pool.sources is None:
        return None
    chosen: Sequence[int] = sorted({row for _, rows, _ in engine.history for row in rows.tolist()})
    counts = np.bincount(pool.sources, minlength=len(pool.source_names))
    picked = np.bincount(pool.sources[np.asarray(chosen, np.int64)], minlength=len(pool.source_names))
    return [
        {"source": name, "pool": int(counts[k]), "chosen": int(picked[k])}
        for k, name in enumerate(pool.source_names) if counts[k]
    ]  # fmt: skip


def _set_threads(config: PrepareConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
