"""Rounds of the schedule, contender by contender: time, peak memory and losses.

Every contender trains round r before any trains round r + 1, in an order that rotates and turns round, so that a busy machine
slows all alike; a ratio is the median over rounds of the ratio within a round. Peak memory is the growth over one round of a
contender that has trained one already (its optimizer's state is there): on the CPU in a fresh process each, where nothing
freed by others hides it, on a GPU over the timed rounds.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from contenders import CONTENDERS, LEAD_OFF, LEAD_ON, OURS, PUBLISHED, Contender, LeadFast, Trained
from interleaved import CannotRunError, Measured, peak_mib
from schedule import Schedule, ScheduledRound, build, twin
from test_estimation_price import Pairs

PUBLISHED_STEPS = "published style, its steps alone"


@dataclass
class Result(Measured):
    """One contender over the timed rounds; `losses` begins with the round that warms up."""

    losses: list[float] = field(default_factory=list)
    tokens_per_second: list[float] = field(default_factory=list)

    def add(self, rnd: ScheduledRound, seconds: float, loss: float) -> None:
        self.times_ms.append(1e3 * seconds)
        self.tokens_per_second.append(rnd.num_tokens / seconds)
        self.losses.append(loss)


@dataclass
class Measurement:
    """All contenders on one schedule. `agreed`: rounds in which the replaying engine chose the scheduled rows itself."""

    schedule: Schedule
    results: dict[str, Result]
    agreed: int

    @property
    def ran(self) -> dict[str, Result]:
        return {name: result for name, result in self.results.items() if result.refused is None}

    def price(self) -> tuple[float, float, float]:
        """Median over rounds of on / off - 1 of LEAD, and its 95% bootstrap bounds."""
        return Pairs(on=self.results[LEAD_ON].times_ms, off=self.results[LEAD_OFF].times_ms).price()

    def best_peer(self) -> Result:
        """The fastest of the others, by median; the published style's steps alone count as one."""
        peers = [result for name, result in self.ran.items() if name not in OURS]
        return max(peers, key=lambda result: float(np.median(result.tokens_per_second)))


def measure(
    schedule: Schedule, model: Any, names: Sequence[str] = tuple(CONTENDERS), *, watch: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Measurement:  # fmt: skip
    """Trains twins of `model` through the schedule, interleaved by round.

    Args:
        names: contenders; one that cannot run is in the results with its reason, but this package's own must run.
        watch: memory too, which costs a GPU nothing.
    """
    results = {name: Result(name) for name in names}
    if PUBLISHED in names:
        results[PUBLISHED_STEPS] = Result(PUBLISHED_STEPS)
    contenders: dict[str, Contender] = {}

    def train(name: str, rnd: ScheduledRound) -> tuple[Trained, float] | None:
        """A round and its memory; None where a peer fails, which must not cost the others their numbers."""
        try:
            if name not in contenders:
                contenders[name] = CONTENDERS[name](schedule, twin(model))
            return watched(contenders[name], rnd) if watch else (contenders[name].train(rnd), 0.0)
        except Exception as error:
            if name in (LEAD_ON, LEAD_OFF):
                raise
            for part in (name, PUBLISHED_STEPS) if name == PUBLISHED else (name,):
                results[part].refused = refusal(error)
            contenders.pop(name, None)
            return None

    for name in names:
        say(f"{name}: warming up")
        if (warm := train(name, schedule.rounds[0])) is not None:
            for part in (name, PUBLISHED_STEPS) if name == PUBLISHED else (name,):
                results[part].losses.append(warm[0].loss)
    for number, rnd in enumerate(schedule.rounds[1:]):
        say(f"round {number + 1} of {schedule.setting.num_rounds}")
        order = list(contenders)
        first = number // 2 % len(order)
        for name in (order[first:] + order[:first])[:: -1 if number % 2 else 1]:
            if (found := train(name, rnd)) is None:
                continue
            trained, mib = found
            results[name].add(rnd, trained.seconds, trained.loss)
            say(f"  {name}: {trained.seconds:.2f} s, {rnd.num_tokens / trained.seconds:,.0f} tokens/s, loss {trained.loss:.4f}")
            results[name].peak_mib = max(results[name].peak_mib, mib)
            if trained.steps_seconds is not None:
                results[PUBLISHED_STEPS].add(rnd, trained.steps_seconds, trained.loss)
    on = contenders[LEAD_ON]
    assert isinstance(on, LeadFast)
    return Measurement(schedule, results, on.agreed)


def refusal(error: Exception) -> str:
    """Why a contender does not run, in one line."""
    if isinstance(error, CannotRunError):
        return str(error)
    lines = str(error).splitlines()
    return f"failed: {type(error).__name__}: {lines[0] if lines else ''}"


def watched(contender: Contender, rnd: ScheduledRound) -> tuple[Trained, float]:
    """A trained round and the MiB that it took at its peak."""
    trained: list[Trained] = []
    mib = peak_mib(lambda: trained.append(contender.train(rnd)))
    return trained[0], mib


def measure_memory(measurement: Measurement, say: Callable[[str], None] = lambda _: None) -> None:
    """On the CPU: peak memory of each contender that ran, in a process of its own."""
    for name, result in measurement.ran.items():
        if name != PUBLISHED_STEPS:
            say(f"{name}: memory")
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                result.peak_mib = process.submit(memory_of, name, measurement.schedule, torch.get_num_threads()).result()


def memory_of(name: str, schedule: Schedule, threads: int) -> float:
    """MiB of the schedule's second round, after the first."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    contender = CONTENDERS[name](schedule, build(schedule.setting))
    contender.train(schedule.rounds[0])
    return watched(contender, schedule.rounds[1])[1]


def check_losses(measurement: Measurement, tolerance: float) -> float:
    """The largest relative difference between a contender's loss of a round and that of the run that chose the rounds.

    Raises:
        RuntimeError: it is above `tolerance`: a contender was trained on something else.
    """
    expected, worst = np.array(measurement.schedule.losses), 0.0
    for name, result in measurement.ran.items():
        difference = float(np.max(np.abs(np.array(result.losses) / expected - 1.0)))
        if not difference <= tolerance:
            raise RuntimeError(
                f"check_losses: {name} must train on the schedule within {tolerance:g}, got {difference:.3g} off"
            )
        worst = max(worst, difference)
    return worst
