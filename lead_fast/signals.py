"""Failure signatures of the method (section 8), watched while it trains from what costs nothing.

Each visit shows a predicted loss beside a true one, each round an arm's reward. A signature is reported once, with the numbers
that were seen and the option that would change it; too few data say nothing. Judged are the records of rounds.jsonl, so
that every warning can be traced to its log.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lead_fast.config import LeadConfig
from lead_fast.engine import LeadEngine
from lead_fast.rounds import Round, RoundReport
from lead_fast.smoothing import SmoothingMemory, smoothing_values
from lead_fast.visits import PREDICTED

logger = logging.getLogger(__name__)

RoundFacts = dict[str, Any]  # of a line of rounds.jsonl: round, arms, rewards, probs, visits

_KINDS = {"again": "visits of rows seen before", "first": "first visits"}
_CHECK_EVERY = 5  # rounds
_MIN_ROUNDS, _MIN_VISITS = 10, 60  # below, a comparison of errors says nothing
_WORSE_BY, _SMOOTHING_WORSE_BY = 0.1, 0.25  # of the error that it is compared with: less is not worth a change
_MIN_T = 3.5  # over rounds, since visits of one round share its noise; asked again every few rounds, so stricter than 2
_MIN_REWARDS, _DRIFT_T, _DRIFT_SHIFT = 6, 5.0, 1.0  # of an arm in each half of the rounds; shift in deviations


class Signals:
    """Looks at each round that has ended, and warns.

    Args:
        engine: keeps its visits from now on.
    """

    def __init__(self, engine: LeadEngine) -> None:
        engine.record_visits = True
        self.config = engine.config
        self.rounds: list[RoundFacts] = []
        self.warned: set[str] = set()
        self.memory = SmoothingMemory(smoothing_values(self.config.smoothing))

    def go_on(self, rounds: Sequence[RoundFacts]) -> None:
        """Takes over the records of the rounds that a resumed run had before; what was warned of is not said again."""
        self.rounds = list(rounds)
        self.warned = {warning["kind"] for facts in rounds for warning in facts["warnings"]}

    def after_round(self, rnd: Round, report: RoundReport) -> dict[str, Any]:
        """The round's errors at visits, and new warnings: {"visits": ..., "warnings": [...]} for its record."""
        visits = {name: column.numpy() for name, column in (report.visits or {}).items()}
        errors = visit_errors(visits, rnd.number, self.config.estimator, self.memory)
        rewards = [reward if math.isfinite(reward) else None for reward in report.rewards]
        self.rounds.append({
            "round": rnd.number, "arms": report.arms, "rewards": rewards, "probs": report.probs.tolist(),
            "calibration": report.calibration, "visits": errors,
        })  # fmt: skip
        warnings = []
        for kind, check in CHECKS.items() if rnd.number % _CHECK_EVERY == 0 else ():
            found = None if kind in self.warned else check(self.rounds, self.config)
            if found is not None:
                self.warned.add(kind)
                logger.warning("round %d: %s", rnd.number, found["text"])
                warnings.append({"kind": kind, "round": rnd.number, **found})
        return {"visits": errors, "warnings": warnings}

    def state_dict(self) -> dict[str, Tensor]:
        """What the records of the rounds do not hold; `load_state_dict` restores it."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores `state_dict()`."""
        self.memory.load_state_dict(state)


# What a round's visits show.


def visit_errors(visits: dict[str, np.ndarray], number: int, estimator: str, memory: SmoothingMemory) -> dict[str, Any]:
    """Errors of a round's visits, in nats; a row that occurs twice in the round counts once.

    Args:
        visits: columns of `RoundReport.visits`.
        number: of the round.
        estimator: the one that chooses.
        memory: gets the visits.

    Returns:
        count; "again" and "first", of visits of rows seen before and of first visits: count, error and bias (predicted minus
        observed) of the estimator, error_unchanged and bias_unchanged, had the loss when last seen been the prediction;
        smoothing: {b: error of the utility at that b}. Where a count is 0, there is only that.
    """
    fresh = visits["seen_round"] < number if visits else np.zeros(0, bool)
    if not fresh.any():
        return {"count": 0}
    row, seen_round, before, observed, predicted = (
        visits[name][fresh] for name in ("row", "seen_round", "seen_loss", "observed", PREDICTED + estimator)
    )
    predicted = np.maximum(predicted, 0.0)
    utility = memory.visit(row, before, predicted, observed)
    return {
        "count": len(row),
        "again": _errors(predicted - observed, before - observed, seen_round > 0),
        "first": _errors(predicted - observed, before - observed, seen_round == 0),
        "smoothing": {f"{b:g}": float(e) for b, e in zip(memory.values, utility, strict=True)},
    }


def _errors(error: np.ndarray, unchanged: np.ndarray, which: np.ndarray) -> dict[str, Any]:
    if not which.any():
        return {"count": 0}
    means = {"error": np.abs(error), "bias": error, "error_unchanged": np.abs(unchanged), "bias_unchanged": unchanged}
    return {"count": int(which.sum())} | {name: float(values[which].mean()) for name, values in means.items()}


# The signatures. Each takes the records of the rounds so far and returns what to say, or None.


def badly_calibrated(rounds: Sequence[RoundFacts], config: LeadConfig) -> dict[str, Any] | None:
    """The chosen estimator's error or bias at visits is worse than that of the loss unchanged."""
    # Rows seen before fall and first visits may rise: taken together, biases would cancel out.
    for kind, words in _KINDS.items() if config.estimator != "none" else ():
        seen = _visited(rounds, kind)
        if not _enough(seen):
            continue
        count, error, bias, error0, bias0 = _columns(seen, "count", "error", "bias", "error_unchanged", "bias_unchanged")
        mean, mean_bias, level, bias_level = (float(np.average(x, weights=count)) for x in (error, bias, error0, bias0))
        worse = paired(count, error - error0)
        more_biased = paired(count, math.copysign(1.0, mean_bias) * bias - math.copysign(1.0, bias_level) * bias0)
        if not (_clear(*worse, level) or _clear(*more_biased, level)):
            continue
        text = (
            f"{config.estimator} predicted the losses of {count.sum():,.0f} {words} ({_span(seen)}) worse than the loss "
            f"unchanged: mean absolute error {mean:.4f} against {level:.4f}, bias {mean_bias:+.4f} against {bias_level:+.4f} "
            f"nats; calibration {_calibration(rounds)}"
        )
        return _warning(text, "estimator", "grad_norm" if config.estimator == "historical" else "none")
    return None


def unreliable_late(rounds: Sequence[RoundFacts], config: LeadConfig) -> dict[str, Any] | None:
    """The chosen estimator was no worse than the loss unchanged in the first third of the rounds, and is in the last."""
    third = len(rounds) // 3
    for kind, words in _KINDS.items() if config.estimator != "none" else ():
        early, late = _visited(rounds[:third], kind), _visited(rounds[len(rounds) - third :], kind)
        if not (_enough(early) and _enough(late)):
            continue
        (count, error, error0), (first_count, first, first0) = (
            _columns(seen, "count", "error", "error_unchanged") for seen in (late, early)
        )
        now, level = (float(np.average(x, weights=count)) for x in (error, error0))
        was, was0 = (float(np.average(x, weights=first_count)) for x in (first, first0))
        if was > was0 or not _clear(*paired(count, error - error0), level):
            continue
        text = (
            f"{config.estimator} has become unreliable: at {words} its mean absolute error is {now:.4f} against {level:.4f} "
            f"nats for the loss unchanged in {_span(late)}, after {was:.4f} against {was0:.4f} in {_span(early)}; "
            f"calibration {_calibration(rounds)}"
        )
        return _warning(text, "estimator", "none")
    return None


def smoothing_off(rounds: Sequence[RoundFacts], config: LeadConfig) -> dict[str, Any] | None:
    """The utility at a neighbouring smoothing coefficient would have predicted the losses at visits better."""
    seen = [facts["visits"] | {"round": facts["round"]} for facts in rounds if facts["visits"]["count"]]
    if not _enough(seen):
        return None
    used = f"{config.smoothing:g}"
    (count,) = _columns(seen, "count")
    errors = {b: np.array([visits["smoothing"][b] for visits in seen]) for b in seen[0]["smoothing"]}
    means = {b: float(np.average(error, weights=count)) for b, error in errors.items()}
    best = min(means, key=means.__getitem__)
    if not _clear(*paired(count, errors[used] - errors[best]), means[best], _SMOOTHING_WORSE_BY):
        return None
    text = (
        f"the utility missed the next observed loss by {means[used]:.4f} nats at smoothing {used}, and would have by "
        f"{means[best]:.4f} at {best} ({count.sum():,.0f} visits, {_span(seen)})"
    )
    return _warning(text, "smoothing", float(best))


def arms_drift(rounds: Sequence[RoundFacts], config: LeadConfig) -> dict[str, Any] | None:
    """An arm's reward, beside that of the other arms and in units of their spread, differs between the halves of the rounds."""
    if config.bandit == "uniform":
        return None
    middle = len(rounds) // 2
    halves = [_rewards(rounds[:middle]), _rewards(rounds[middle:])]
    arms = [arm for arm in halves[0] if all(len(half.get(arm, ())) >= _MIN_REWARDS for half in halves)]
    if len(arms) < 2:
        return None
    worth = []
    for half in halves:
        rewards = _without_trend({arm: half[arm] for arm in arms})
        means = np.array([values.mean() for values in rewards.values()])
        # Rewards shrink as training goes on: what counts is an arm's place among the others.
        spread = math.sqrt(np.mean([values.var(ddof=1) for values in rewards.values()]) + means.var())
        if spread == 0.0:
            return None
        worth.append({arm: (values - means.mean(), spread) for arm, values in rewards.items()})
    found = []
    for arm in arms:
        (first, unit), (second, unit2) = (half[arm] for half in worth)
        shift = second.mean() / unit2 - first.mean() / unit
        error = math.sqrt(first.var(ddof=1) / unit**2 / len(first) + second.var(ddof=1) / unit2**2 / len(second))
        if error > 0.0 and abs(shift) > _DRIFT_SHIFT and abs(shift) / error > _DRIFT_T:
            found.append((abs(shift) / error, arm, first, second))
    if not found:
        return None
    t, arm, first, second = max(found, key=lambda f: f[0])
    text = (
        f"arm {arm} has changed its worth: its reward was {first.mean():+.4f} nats beside the mean of the arms in "
        f"{_span(rounds[:middle])} and {second.mean():+.4f} in {_span(rounds[middle:])} ({len(first)} and {len(second)} "
        f"rounds, t {t:.1f}); its probability is {rounds[-1]['probs'][arm]:.2f}"
    )
    if config.bandit == "exp3s":
        return _warning(text, "share", min(0.5, 4.0 * max(config.share, 0.001)))
    return _warning(text, "bandit", "exp3s")


CHECKS: dict[str, Callable[[Sequence[RoundFacts], LeadConfig], dict[str, Any] | None]] = {
    "calibration": badly_calibrated,
    "late": unreliable_late,
    "smoothing": smoothing_off,
    "drift": arms_drift,
}


def paired(count: np.ndarray, difference: np.ndarray) -> tuple[float, float]:
    """A difference's mean over visits, and its t over rounds; `count` visits and their mean difference, [R] each."""
    mean = float(np.average(difference, weights=count))
    spread = float((count**2 * (difference - mean) ** 2).sum()) * len(count) / (len(count) - 1)
    if spread == 0.0:
        return mean, math.copysign(math.inf, mean) if mean else 0.0
    return mean, mean * float(count.sum()) / math.sqrt(spread)


def _clear(mean: float, t: float, level: float, worse_by: float = _WORSE_BY) -> bool:
    return mean > worse_by * level and t > _MIN_T


def _visited(rounds: Sequence[RoundFacts], kind: str) -> list[RoundFacts]:
    """Errors at visits of a kind, of the rounds that had any, with the round."""
    errors = [facts["visits"].get(kind, {"count": 0}) | {"round": facts["round"]} for facts in rounds]
    return [facts for facts in errors if facts["count"]]


def _enough(seen: Sequence[RoundFacts]) -> bool:
    return len(seen) >= _MIN_ROUNDS and sum(facts["count"] for facts in seen) >= _MIN_VISITS


def _columns(seen: Sequence[RoundFacts], *names: str) -> list[np.ndarray]:
    return [np.array([facts[name] for facts in seen], np.float64) for name in names]


def _rewards(rounds: Sequence[RoundFacts]) -> dict[int, np.ndarray]:
    """Rounds and rewards, [n, 2], of each arm."""
    rewards: dict[int, list[tuple[int, float]]] = {}
    for facts in rounds:
        for arm, reward in zip(facts["arms"], facts["rewards"], strict=True):
            if reward:  # exactly 0 as long as the estimator knows nothing: not yet a worth
                rewards.setdefault(arm, []).append((facts["round"], reward))
    return {arm: np.array(values) for arm, values in rewards.items()}


def _without_trend(rewards: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Rewards [n] of each arm without the linear trend over the rounds that all arms share, as they stand at its middle."""
    centred = np.concatenate([values - values.mean(0) for values in rewards.values()])
    slope = float(centred[:, 0] @ centred[:, 1]) / max(float(centred[:, 0] @ centred[:, 0]), 1e-300)
    middle = np.concatenate(list(rewards.values()))[:, 0].mean()
    return {arm: values[:, 1] - slope * (values[:, 0] - middle) for arm, values in rewards.items()}


def _span(rounds: Sequence[RoundFacts]) -> str:
    return f"rounds {rounds[0]['round']} to {rounds[-1]['round']}"


def _calibration(rounds: Sequence[RoundFacts]) -> str:
    shown = {k: v for k, v in rounds[-1]["calibration"].items() if isinstance(v, int | float)}
    return ", ".join(f"{name} {value:.3g}" for name, value in shown.items()) or "none"


def _warning(text: str, option: str, value: str | float) -> dict[str, Any]:
    return {"text": f"{text}; try --{option} {value}", "option": option, "value": value}
