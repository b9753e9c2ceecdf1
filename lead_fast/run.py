"""A whole run: from a pool on disk to a folder with a fine-tuned model, what was chosen and why (`lead-fast train`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from lead_fast.audit import AUDIT_FOLDER
from lead_fast.auditor import Auditor
from lead_fast.checkpoint import FOREIGN, Checkpoint, Checkpoints
from lead_fast.config import LeadConfig, PrepareConfig, TrainConfig, to_yaml
from lead_fast.doctor import made_with
from lead_fast.engine import LeadEngine
from lead_fast.files import atomic_path, remove_leftovers, write_json, write_jsonl, write_text
from lead_fast.heldout import check_heldout, heldout_scorer, row_scorer
from lead_fast.interrupts import StopSignals
from lead_fast.loading import save_model
from lead_fast.metrics import TRAINING_PARTS, peak_mib, tracked, write_candidates
from lead_fast.offline.prepare import (
    PREPARED_FILE,
    Prepared,
    check_prepared,
    encoded_rows,
    load_prepared,
    prepare,
    rejects_path,
)
from lead_fast.optimization import (
    Optimization,
    check_trackers,
    finished_trackers,
    make_accelerator,
    start_trackers,
)
from lead_fast.pool import Pool
from lead_fast.ranks import Ranks
from lead_fast.report import write_run_report
from lead_fast.resume import (
    CHECKPOINTS,
    CONFIG_FILE,
    ROUNDS_FILE,
    Checkpointer,
    RoundLog,
    check_options,
    failures_explained,
    locked,
    rounds_of,
)
from lead_fast.rounds import Round
from lead_fast.signals import Signals
from lead_fast.trainer import AfterRound, TrainingRun, run_rounds
from lead_fast.training_state import TrainingState, seed_generators
from lead_fast.utility import estimator_class

logger = logging.getLogger(__name__)

AnyConfig = TypeVar("AnyConfig", bound=PrepareConfig)

SUMMARY_FILE, UTILITIES = "summary.json", "utilities"
# What summary.json holds for the report, beside the flat summary.
SUMMARY_DETAILS = ("evaluations", "utility", "arms", "sources", "warnings", "preparation")


class RunFolderError(ValueError):
    """The output folder cannot be used as asked."""


def claim_folder(path: str, *, resume: bool) -> Path:
    """The output folder; refused when it holds something that is no run to resume: a run removes what it does not know."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"out: expected a folder, got the file {folder}")
    names = os.listdir(folder) if folder.exists() else []
    if names and not resume:
        raise RunFolderError(f"out: {folder} is not empty; name another folder, or go on in it with --resume")
    # Of a run that was killed as it began a temporary may be all that is there.
    if CONFIG_FILE not in names and any(not (name.startswith(".") and name.endswith(".tmp")) for name in names):
        raise RunFolderError(
            f"out: {folder} is not empty and holds no {CONFIG_FILE} of a run: there is nothing to resume; name the run's "
            "folder, or an empty one"
        )
    return folder


def open_inputs(config: PrepareConfig) -> Prepared | Pool:
    """A prepared pool's folder, or a raw pool read and checked whole, before anything is written."""
    for name in ("pool", "out"):
        if getattr(config, name) is None:
            raise ValueError(f"{name}: required")
    assert config.pool is not None and config.out is not None
    if config.model is not None and (Path(config.model) / "adapter_config.json").exists():
        raise ValueError(
            f"model: expected a base model, got the adapter in {config.model}; merge it into its base first "
            "(peft: merge_and_unload, save_pretrained)"
        )
    if (Path(config.pool) / PREPARED_FILE).exists():
        prepared = load_prepared(Path(config.pool))
        check_prepared(prepared, config)
        return prepared
    if not Path(config.pool).exists():
        raise ValueError(f"pool: {config.pool} does not exist")
    if (config.model is None) == (config.model_config is None):
        raise ValueError("model: expected exactly one of --model and --model-config")
    rejects = rejects_path(config) if config.on_bad_row == "skip" else None
    on_bad_row: Any = config.on_bad_row  # checked by PrepareConfig
    return Pool.open(config.pool, on_bad_row=on_bad_row, rejects=rejects)


def run_prepare(config: PrepareConfig, lead: LeadConfig) -> dict[str, Any]:
    """`lead-fast prepare`: the offline stages alone, into `config.out`.

    Returns:
        A JSON summary.
    """
    ranks, config = _start(config), with_absolute_paths(config)
    with StopSignals(several=ranks.world > 1), _claimed(config, ranks) as folder:
        inputs = open_inputs(config)
        if isinstance(inputs, Prepared):
            raise ValueError(f"pool: {config.pool} is prepared already; give it to `lead-fast train`")
        with failures_explained(None):
            if ranks.is_first:
                remove_leftovers(folder)
                write_text(folder / CONFIG_FILE, to_yaml(config, lead.resolve()))  # now: by it --resume knows the folder
            prepared = prepare(inputs, config, lead, folder)
    return {"out": str(folder), **prepared.summary}


def run_train(config: TrainConfig, lead: LeadConfig) -> dict[str, Any]:
    """`lead-fast train`: the offline stages where the pool is raw, LEAD's rounds, the trained model, the report.

    With `config.resume` the rounds go on from the newest good checkpoint in `config.out`; on a CPU they give what the run
    would have given without the interruption, bit for bit.

    Returns:
        A JSON summary, also written to summary.json.

    Raises:
        ValueError: an option that cannot be. TrainingError: training cannot go on; the message says how to resume.
        Interrupted: SIGINT or SIGTERM; a checkpoint is written.
    """
    start = time.monotonic()
    ranks, config = _start(config), with_absolute_paths(config)
    seed_generators(lead.seed + ranks.number)
    for name in [lead.estimator, *(config.audited if config.audit_every else ())]:
        estimator_class(name)
    check_trackers(config.trackers)
    if config.out is None:
        raise ValueError("out: required")
    folder = Path(config.out)
    if config.resume and config.pool is None:
        raise ValueError(f"resume: expected the folder of a run, got {folder}, which holds no {CONFIG_FILE}")
    if config.resume and (folder / SUMMARY_FILE).exists():
        check_options(folder, config, lead)
        return finished_run(folder) if ranks.is_first else {}
    checkpoints = Checkpoints(folder / CHECKPOINTS)
    with StopSignals(several=ranks.world > 1) as stop, _claimed(config, ranks):
        goes_on = config.resume and bool(checkpoints.paths())
        if goes_on or (config.resume and has_rounds(folder)):
            check_options(folder, config, lead)
        inputs = own_inputs(config) if goes_on else open_inputs(config)
        heldout = None if config.heldout is None else Pool.open(config.heldout)

        def keep_options() -> None:
            if ranks.is_first:
                write_text(folder / CONFIG_FILE, to_yaml(config, lead.resolve()))

        with failures_explained(checkpoints):
            if not goes_on:
                keep_options()  # before the longest part, so that --resume knows them
            # A run that goes on keeps the old ones until pool and held-out rows are known to be its own.
            on_begun = keep_options if goes_on else lambda: None
            return _train(inputs, heldout, config, lead, checkpoints, stop, start, on_begun)


def with_absolute_paths(config: AnyConfig) -> AnyConfig:
    """The options with the paths that exist as they are from any folder: a run may be resumed from within its own."""
    paths = {name: getattr(config, name, None) for name in ("model", "pool", "heldout")}
    found = {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None and Path(path).exists()}
    return dataclasses.replace(config, **found)


def _start(config: PrepareConfig) -> Ranks:
    """The processes of the run, set up as the launcher asked for."""
    accelerator = make_accelerator(config)
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise ValueError("precision: fp16 needs a GPU, got a CPU; use bf16 or fp32")
    if accelerator.num_processes > 1:
        logger.info("%d processes train together, by %s", accelerator.num_processes, accelerator.distributed_type.value)
    if config.threads is not None:
        torch.set_num_threads(config.threads)  # after accelerate, which sets its own for several processes
    return Ranks.started(accelerator.device)


@contextmanager
def _claimed(config: PrepareConfig, ranks: Ranks) -> Iterator[Path]:
    """The output folder, which the first process keeps for the run."""
    assert config.out is not None
    with ExitStack() as kept:

        def claim() -> None:
            kept.enter_context(locked(claim_folder(str(config.out), resume=config.resume)))

        ranks.on_first(claim)
        folder = Path(config.out)
        is_new = ranks.is_first and not any(folder.iterdir())
        try:
            yield folder
        except BaseException:
            if is_new and os.listdir(folder) == [CONFIG_FILE]:
                (folder / CONFIG_FILE).unlink()  # of a run that never began: the folder is free again
            raise


def finished_run(folder: Path) -> dict[str, Any]:
    """The summary of a run that is finished; its report is written where that was interrupted."""
    logger.info("%s: the run is finished, there is nothing to resume", folder)
    if not (folder / "report.html").exists():
        write_run_report(folder)
    summary = json.loads((folder / SUMMARY_FILE).read_text())
    return {name: value for name, value in summary.items() if name not in SUMMARY_DETAILS}


def has_rounds(folder: Path) -> bool:
    """Whether a run in the folder got as far as its first round."""
    return (folder / ROUNDS_FILE).exists() and (folder / ROUNDS_FILE).stat().st_size > 0


def own_inputs(config: TrainConfig) -> Prepared | Pool:
    """The inputs of a run that has begun: what it prepared itself does not need the raw pool again."""
    assert config.out is not None
    prepared = Path(config.out) / "prepared"
    return load_prepared(prepared) if (prepared / PREPARED_FILE).exists() else open_inputs(config)


def _train(
    inputs: Prepared | Pool, heldout: Pool | None, config: TrainConfig, lead: LeadConfig, checkpoints: Checkpoints,
    stop: StopSignals, start: float, on_begun: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    folder = checkpoints.folder.parent
    if isinstance(inputs, Prepared):
        # The kind of model decides the default learning rate.
        config = dataclasses.replace(config, model_config=inputs.summary["model_config"])
    check_heldout(heldout, inputs, config, lead.seed)
    prepared = inputs if isinstance(inputs, Prepared) else prepare(inputs, config, lead, folder / "prepared")
    encoder = prepared.encoder(config)
    accelerator = make_accelerator(config)
    ranks = Ranks.started(accelerator.device)
    engine = LeadEngine(prepared.pool, lead, accelerator.device, group=ranks.group)
    engine.record_candidates = config.log_utilities and ranks.is_first
    first_utility = engine.utility(engine.groups.choosable_rows()).cpu().numpy()
    optimization = Optimization(prepared.model(config, seed=lead.seed), accelerator, config)
    signals = Signals(engine)
    after_round: dict[str, AfterRound] = {"signals": signals.after_round}
    if config.audit_every:
        scorer = row_scorer(optimization, prepared.encoder(config), prepared.pool, config)
        target = folder / AUDIT_FOLDER if ranks.is_first else None
        after_round["audit"] = Auditor(engine, _auditable(config, optimization), scorer, target).after_round
    if engine.budget < engine.config.budget_rows(len(prepared.pool)):
        logger.warning("the budget is cut to the %d rows that are not set aside", engine.budget)

    # Again: what the stages drew depends on which of them had to run.
    seed_generators(lead.seed + ranks.number)
    places = {"pool": config.pool, "held-out rows": config.heldout}
    state = TrainingState(engine, optimization, signals, heldout, places)
    run, log, seconds = begin(state, checkpoints, folder)
    on_begun()
    signals.go_on(run.rounds)
    if config.trackers:
        both = dataclasses.asdict(config) | dataclasses.asdict(lead)
        start_trackers(accelerator, config.trackers, folder / "trackers", both, num_steps=run.num_steps)
    checkpointer = Checkpointer(checkpoints, state, config, log, stop, run, start - seconds)

    def on_round(rnd: Round, record: dict[str, Any]) -> None:
        log.append(record)
        if config.trackers:
            for step, values in tracked(record, run.num_steps - record["steps"] + 1):
                accelerator.log(values, step=step)
        if engine.record_candidates:
            write_candidates(rnd, folder / UTILITIES)

    score = heldout_scorer(optimization, encoder, heldout, config, lead.seed)
    with stop.deferred(), finished_trackers(accelerator):
        run_rounds(
            engine, optimization, lambda rows: encoded_rows(encoder, prepared.pool, rows), config,
            after_round=after_round, on_round=on_round, evaluate_now=score, run=run, at_boundary=checkpointer.at_boundary,
        )  # fmt: skip
        checkpointer.finish(run)
    log.close()
    with atomic_path(folder / "model", durable=True) if ranks.is_first else nullcontext() as temporary:
        save_model(optimization.bare, encoder.tokenizer, temporary)
    if ranks.is_first:
        precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        machine = {"processes": ranks.world, **made_with(optimization.device, precision)}
        return write_results(folder, engine, run, prepared, checkpointer.seconds, machine, first_utility)
    return {}


def _auditable(config: TrainConfig, optimization: Optimization) -> TrainConfig:
    """The options of an audit without the estimators that cannot watch here."""
    left_out = [name for name in config.audited if estimator_class(name).needs_weights and optimization.is_sharded]
    if not left_out:
        return config
    logger.warning("audit_estimators: %s follows whole weights, which are sharded here: left out", ", ".join(left_out))
    return dataclasses.replace(config, audit_estimators=",".join(n for n in config.audited if n not in left_out))


def write_results(
    folder: Path, engine: LeadEngine, run: TrainingRun, prepared: Prepared, seconds: float, machine: dict[str, Any],
    first_utility: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """selected.jsonl, summary.json and the report of a run that is finished.

    Returns:
        The summary.
    """
    if run.cuts.prompts or run.cuts.answers:
        logger.warning("%s", run.cuts)
    write_jsonl(folder / "selected.jsonl", engine.selected(), durable=True)
    summary = summarize(engine, run, prepared, seconds) | machine
    summary = {"out": str(folder), "model": str(folder / "model"), **summary}
    write_json(folder / SUMMARY_FILE, summary | {
        "evaluations": run.evaluations,
        "utility": utility_histogram(engine, first_utility),
        "arms": prepared.summary.get("arms"),
        "sources": source_shares(engine),
        "warnings": [warning for r in run.rounds for warning in r["warnings"]],
        "preparation": prepared.summary,
    }, durable=True)  # fmt: skip
    write_run_report(folder)
    return summary


def begin(state: TrainingState, checkpoints: Checkpoints, folder: Path) -> tuple[TrainingRun, RoundLog, float]:
    """A run at its beginning, or at the newest good checkpoint; what the folder holds beyond it is removed.

    Returns:
        The run, its rounds.jsonl, and the seconds that it took before it was interrupted.
    """
    ranks = state.optimization.ranks
    checkpoint = ranks.on_first(lambda: _newest(checkpoints, folder))
    # All go on from the one that the first process has found.
    number = ranks.of_first(-1 if checkpoint is None else checkpoints.paths().index(checkpoint.path))
    if number < 0:
        return TrainingRun(), RoundLog(folder / ROUNDS_FILE if ranks.is_first else None), 0.0
    checkpoint = checkpoint or checkpoints.read(checkpoints.paths()[number])
    run = state.restore(checkpoint.state, rounds_of(checkpoint, folder / ROUNDS_FILE))
    if state.optimization.is_zero:
        state.restore_zero(checkpoint.path / FOREIGN)
    ranks.wait()
    log = checkpoint.state["log"]
    if not ranks.is_first:
        return run, RoundLog(None), log["seconds"]
    checkpoints.set_aside_newer(checkpoint.path)
    for path in (p for name in (UTILITIES, AUDIT_FOLDER) for p in (folder / name).glob("*-*.parquet")):
        if int(path.stem.rpartition("-")[2]) > len(run.rounds):
            path.unlink()
    inside = "" if run.open is None else f", {len(run.open.trained)} optimizer steps into the next"
    logger.info("going on from %s: %d rounds%s", checkpoint.path, len(run.rounds), inside)
    return run, RoundLog(folder / ROUNDS_FILE, log["bytes"]), log["seconds"]


def _newest(checkpoints: Checkpoints, folder: Path) -> Checkpoint | None:
    """The newest good checkpoint; without one, what an interrupted run has left in the folder is removed."""
    for leftovers in (folder, folder / "prepared", folder / UTILITIES, folder / AUDIT_FOLDER):
        remove_leftovers(leftovers)
    checkpoints.remove_leftovers()
    checkpoint = checkpoints.load(lambda found: rounds_of(found, folder / ROUNDS_FILE))
    if checkpoint is None:
        for name in (UTILITIES, AUDIT_FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)
    return checkpoint


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
        "cut_prompts": run.cuts.prompts,
        "cut_answers": run.cuts.answers,
        "final_loss": run.rounds[-1]["mean_loss"] if run.rounds else None,
        "mean_reward": float(np.mean(rewards)) if rewards else None,
        "warmup_tokens": prepared.summary.get("warmup", {}).get("tokens", 0),
        "scoring_tokens": prepared.summary.get("scoring", {}).get("tokens", 0),
        "audit_tokens": sum(r.get("audit", {}).get("tokens", 0) for r in run.rounds),
        "arm_probability_reachable": engine.bandit.reachable(engine.num_rounds),
        "arm_probability_reached": max((max(r["probs"]) for r in run.rounds), default=None),
        **performance(run),
        "seconds_by_part": {k: round(v, 3) for k, v in sorted(run.seconds.items())},
        "seconds": round(seconds, 3),
    }
    if run.evaluations:
        summary["heldout_loss_before"] = run.evaluations[0]["heldout_loss"]
        summary["heldout_loss_after"] = run.evaluations[-1]["heldout_loss"]
    return summary


def performance(run: TrainingRun) -> dict[str, Any]:
    """Tokens per second of the rounds (evaluation, audit and checkpoints apart), LEAD's share of their time, peak memory."""
    spent = {part: run.seconds.get(part, 0.0) for part in TRAINING_PARTS}
    total = max(1e-9, sum(spent.values()))
    return {
        "tokens_per_second": round(run.trained_tokens / total, 1),
        "estimation_share": round((spent["estimate"] + spent["select"]) / total, 6),
        "peak_mib": peak_mib(),
    }


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
