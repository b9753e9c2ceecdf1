"""The fine-tuning loop: LEAD's rounds around optimizer steps."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from tqdm import tqdm

from lead_fast.config import TrainConfig
from lead_fast.engine import LeadEngine
from lead_fast.first_order import FirstOrder
from lead_fast.metrics import round_record
from lead_fast.models import trained_parameters
from lead_fast.ops import SampleStats
from lead_fast.optimization import Optimization, StepResult, TrainingError, learning_rate, step_batches
from lead_fast.packing import CutCounts, Sample
from lead_fast.rounds import Round, RoundReport
from lead_fast.shards import are_sharded

logger = logging.getLogger(__name__)


class Seconds:
    """Wall-clock seconds by part of a run."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by part."""
        parts, self.parts = dict(self.parts), defaultdict(float)
        return {name: round(value, 6) for name, value in parts.items()}


#: gets a round that has ended; the fields returned go into its record
AfterRound = Callable[[Round, RoundReport], dict[str, Any]]


@dataclass
class OpenRound:
    """The position inside a round: rows used before it; learning rate and result of each of its optimizer steps so far."""

    used_before: int
    trained: list[tuple[float, StepResult]] = field(default_factory=list)


@dataclass
class TrainingRun:
    """What the rounds leave behind: one dict a round (see `round_record`), totals, held-out losses over training.

    `open` is the round that is being trained, None between rounds; `clock` holds the seconds that no round has yet.
    """

    rounds: list[dict[str, Any]] = field(default_factory=list)
    num_steps: int = 0
    trained_tokens: int = 0
    supervised_tokens: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    cuts: CutCounts = field(default_factory=CutCounts)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    clock: Seconds = field(default_factory=Seconds)
    open: OpenRound | None = None


def attach(engine: LeadEngine, optimization: Optimization) -> FirstOrder | None:
    """Shows estimators the weights that they follow; returns the one that wants the gradients as well, if any."""
    weights = [p for _, p in trained_parameters(optimization.bare)]
    followers = [name for name, e in engine.estimators.items() if e.needs_weights]
    if followers and are_sharded(weights):
        raise TrainingError(f"estimator {followers[0]!r} follows whole weights, which are sharded here; use grad_norm or none")
    engine.track(weights)
    first_order = next((e for e in engine.estimators.values() if isinstance(e, FirstOrder)), None)
    if first_order is not None and optimization.ranks.world > 1:
        raise TrainingError("estimator 'first_order' runs in one process; use grad_norm")
    if first_order is not None and not optimization.plain_layers:
        raise TrainingError(
            "estimator 'first_order' reads the layers as they run: leave --gradient-checkpointing and --compile out"
        )
    if first_order is not None and optimization.packed.one_by_one:
        raise TrainingError(
            "estimator 'first_order' reads packed batches, and this model's samples run one by one; use grad_norm"
        )
    if first_order is not None and first_order.sketch is None:
        first_order.follow(optimization.bare, seed=engine.config.seed)
    return first_order


def run_rounds(
    engine: LeadEngine,
    optimization: Optimization,
    samples_of: Callable[[Sequence[int]], list[Sample]],
    config: TrainConfig,
    *,
    after_round: Mapping[str, AfterRound] | None = None,
    on_round: Callable[[Round, dict[str, Any]], None] | None = None,
    evaluate_now: Callable[[], dict[str, Any]] | None = None,
    run: TrainingRun | None = None,
    at_boundary: Callable[[TrainingRun], None] | None = None,
    desc: str = "LEAD rounds",
) -> TrainingRun:
    """Trains in rounds until the engine's budget (or `config.train_tokens`) is used.

    Args:
        engine: chooses the rows.
        optimization: trains on them.
        samples_of: tokenized samples of rows of the pool.
        config: step size, learning rate schedule, evaluation interval.
        after_round: called in order once a round has ended, by the name that its seconds are booked under.
        on_round: called after each round with the choice and its record.
        evaluate_now: held-out scores now; called before, after, and every `config.eval_every` rounds.
        run: a run to go on with, in the middle of its open round where it has one; engine and model must be at the same place.
        at_boundary: called with the run after each optimizer step but a round's last, and after each round: engine, model and
            run then stand at one place. What it raises ends the training there.

    Returns:
        The run's records.

    Raises:
        TrainingError: the loss of a whole round is not finite.
    """
    run, ranks = TrainingRun() if run is None else run, optimization.ranks
    clock, run.cuts.max_length = run.clock, config.max_length
    first_order = attach(engine, optimization)

    def score() -> None:
        if evaluate_now is not None:
            with clock.part("evaluate"):
                entry = {"round": engine.num_rounds, "trained_tokens": run.trained_tokens, **evaluate_now()}
                run.evaluations.append(entry)

    def boundary() -> None:
        if at_boundary is not None:
            with clock.part("checkpoint"):
                at_boundary(run)

    if not run.evaluations:
        score()
    total = config.train_tokens if config.train_tokens is not None else engine.budget
    done = run.trained_tokens if config.train_tokens else engine.num_used if run.open is None else run.open.used_before
    unit = "tok" if config.train_tokens else "row"
    with tqdm(total=total, initial=done, desc=desc, unit=unit, delay=2, disable=not ranks.is_first) as bar:
        while run.open is not None or config.train_tokens is None or run.trained_tokens < config.train_tokens:
            if run.open is None:
                used_before = engine.num_used
                with clock.part("select"):
                    rnd = engine.begin_round()
                if rnd is None:
                    if config.train_tokens is not None:
                        logger.warning(
                            "the budget of %d rows was used after %d of the %d tokens of train_tokens, by which the learning "
                            "rate runs: raise budget or max_uses", engine.budget, run.trained_tokens, config.train_tokens,
                        )  # fmt: skip
                    break
                # A digest, so that ranks which disagree stop here and not in a wrong model.
                ranks.agree(f"the rows of round {rnd.number}", zlib.crc32(rnd.rows.numpy().tobytes()))
                run.open = OpenRound(used_before)
            else:
                rnd = engine.open_round
                assert rnd is not None  # engine and run stand at one place
            used_before, trained = run.open.used_before, run.open.trained
            with clock.part("data"):
                rows = rnd.rows.tolist()
                samples = samples_of(rows)
                steps = step_batches(samples, rows, config, ranks.world)
            for number in range(len(trained), len(steps)):
                lr = learning_rate(
                    _progress(engine, run, config, used_before, number / len(steps)),
                    peak=config.peak_learning_rate, schedule=config.schedule, warmup=config.warmup_ratio,
                )  # fmt: skip
                with clock.part("step"):
                    result = optimization.step(steps[number], lr, _timed_observe(engine, clock), first_order)
                lr = lr if result.taken else 0.0
                with clock.part("estimate"):
                    engine.step(lr=lr, num_items=result.num_items)
                trained.append((lr, result))
                run.num_steps += 1
                run.trained_tokens += result.num_tokens
                run.supervised_tokens += result.num_items
                if number + 1 < len(steps):
                    boundary()
            with clock.part("estimate"):
                report = engine.end_round()
            notes: dict[str, Any] = {"rows_used": engine.num_used, "progress": engine.progress}
            for name, call in (after_round or {}).items():
                with clock.part(name):
                    notes |= call(rnd, report)
            parts = clock.take()
            # `observe` runs inside the step; it is counted once, as estimation.
            parts["step"] = round(parts.get("step", 0.0) - parts.pop("observe", 0.0), 6)
            record = round_record(rnd, report, trained, parts) | notes
            for arm, reward in zip(report.arms, report.rewards, strict=True):
                if not math.isfinite(reward):
                    logger.warning("round %d: no row of arm %d was observed; its reward is not counted", rnd.number, arm)
            run.open = None
            run.rounds.append(record)
            for sample in samples:
                run.cuts.add(sample)
            for name, value in parts.items():
                run.seconds[name] += value
            if on_round is not None:
                on_round(rnd, record)
            if record["mean_loss"] is None:
                raise TrainingError(
                    f"round {rnd.number}: the loss is not finite ({report.num_quarantined} of {len(rnd)} rows); "
                    "lower --learning-rate, or look at the quarantined rows in rounds.jsonl"
                )
            bar.update(record["tokens"] if config.train_tokens else engine.num_used - used_before)
            bar.set_postfix_str(f"round {rnd.number}, arm {rnd.arm}, loss {record['mean_loss']:.3f}", refresh=False)
            if config.eval_every and rnd.number % config.eval_every == 0:
                score()
            boundary()
    if run.rounds and run.evaluations and run.evaluations[-1]["round"] != engine.num_rounds:
        score()
    return run


def _progress(engine: LeadEngine, run: TrainingRun, config: TrainConfig, used_before: int, inside: float) -> float:
    """Progress in [0, 1] of the learning-rate schedule, `inside` of the way through the current round."""
    if config.train_tokens is not None:
        return min(1.0, run.trained_tokens / config.train_tokens)
    return min(1.0, (used_before + inside * (engine.num_used - used_before)) / engine.budget)


def _timed_observe(engine: LeadEngine, clock: Seconds) -> Callable[[Tensor, SampleStats], None]:
    def observe(rows: Tensor, samples: SampleStats) -> None:
        start = time.perf_counter()
        engine.observe(rows, samples)
        seconds = time.perf_counter() - start
        clock.parts["estimate"] += seconds
        clock.parts["observe"] += seconds

    return observe
