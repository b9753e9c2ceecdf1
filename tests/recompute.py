"""Recomputes every round's choice of a finished run from what the run wrote: `python tests/recompute.py RUN`.

Nothing of the selection code is used, only the formulas of the method (sections 5 and 6) in NumPy and plain Python, and
Philox4x32-10 for the random numbers. Read from RUN: config.yaml, rounds.jsonl, selected.jsonl, the candidates that
`lead-fast train --log-utilities` writes to utilities/, and the prepared pool (arms, tasks, rows set aside).

Each round's probabilities follow from the log weights of the line before, the arm from the uniform number, the rows from
the logged utilities, the log weights from the logged reward; a logged number that does not follow is a disagreement. The
utilities themselves are taken as logged, but for the first round's, which are the pool's first utilities.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

import lead_fast as lf

ARM, TASKS, ROWS, SHUFFLE, FIRST_VISITS = range(5)  # streams of random numbers
Candidates = dict[str, np.ndarray]  # columns arm, row, task, uses, utility, noise, chosen


def philox_uniform(seed: int, stream: int, round: int, counters: Any) -> np.ndarray:
    """Uniform numbers in (0, 1) of Philox4x32-10, fp64 in the shape of `counters`.

    Source: Salmon, Moraes, Dror, Shaw, SC 2011. key = (seed low, seed high), counter = (counter low, counter high, round,
    stream), 32 bits each; uniform = (first output word + 0.5) * 2^-32.
    """
    word = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    counter = np.asarray(counters, np.uint64)
    c = [counter & word, counter >> shift, np.full_like(counter, round), np.full_like(counter, stream)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        c = [(right >> shift) ^ c[1] ^ k0, right & word, (left >> shift) ^ c[3] ^ k1, left & word]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return (c[0].astype(np.float64) + 0.5) * 2.0**-32


# Section 5: the bandit.


def first_visits(seed: int, num_arms: int) -> list[int]:
    """All arms in the order in which each is visited once before EXP3 draws."""
    return np.argsort(philox_uniform(seed, FIRST_VISITS, 0, np.arange(num_arms))).tolist()


def exp3_probs(log_w: Sequence[float], active: np.ndarray, gamma: float) -> np.ndarray:
    """(1 - gamma) * softmax over the active arms + gamma / their number; 0 for the others."""
    top = max(w for w, a in zip(log_w, active, strict=True) if a)
    weight = np.array([math.exp(w - top) if a else 0.0 for w, a in zip(log_w, active, strict=True)])
    return np.where(active, (1.0 - gamma) * weight / weight.sum() + gamma / int(active.sum()), 0.0)


def arm_of(probs: np.ndarray, uniform: float) -> int:
    """The arm whose cumulative probability first exceeds the uniform number."""
    return int(np.flatnonzero(np.cumsum(probs) > uniform * np.sum(probs))[0])


def scaled_reward(rewards: Sequence[float]) -> float:
    """The last of `rewards` scaled to [-1, 1] by mean +- 2 standard deviations of all of them; 0 below three.

    Floor of the standard deviation: 5% of the mean's size, and 1e-6.
    """
    if len(rewards) < 3:
        return 0.0
    mean = float(np.mean(rewards))
    deviation = max(float(np.std(rewards, ddof=1)), 0.05 * abs(mean), 1e-6)
    return min(1.0, max(-1.0, (rewards[-1] - mean) / (2.0 * deviation)))


# Section 6: the choice inside an arm.


def task_quotas(available: Sequence[int], rate: float, cap: int | None, uniform: float) -> list[int]:
    """Rows to take of each task: ceil(rate * available), at least one; thinned to `cap` in all by systematic sampling."""
    wanted = [min(n, max(1, math.ceil(rate * n - 1e-9))) for n in available]
    total = sum(wanted)
    if cap is None or total <= cap:
        return wanted
    # Fractions: no edge can fall on the wrong side of an integer by rounding.
    edges = [math.floor(Fraction(sum(wanted[:j]) * cap, total) + Fraction(uniform)) for j in range(len(wanted) + 1)]
    return [high - low for low, high in pairwise(edges)]


def choose_in_task(
    row: np.ndarray, utility: np.ndarray, noise: np.ndarray, quota: int, *, choose: str, temperature: float, exclude_top: float
) -> list[int]:
    """Rows of one task: without the top share by utility, the `quota` highest by the rule `choose`; ties to the lower row."""
    by_utility = sorted(range(len(row)), key=lambda i: (-utility[i], row[i]))
    left = by_utility[math.floor(exclude_top * len(row) + 1e-9) :]
    utility = utility.astype(np.float64)
    key = {"topk": utility, "softmax": utility / temperature + noise, "random": noise}[choose]
    return [int(row[i]) for i in sorted(left, key=lambda i: (-key[i], row[i]))[:quota]]


def choice_noise(choose: str, seed: int, round: int, row: np.ndarray) -> np.ndarray:
    """What `choose` adds to utility (softmax: Gumbel numbers) or ranks by (random: uniform numbers), fp64 [C]."""
    if choose == "topk":
        return np.zeros(len(row))
    uniform = philox_uniform(seed, ROWS, round, row)
    return -np.log(-np.log(uniform)) if choose == "softmax" else uniform


def cut_to_budget(chosen: dict[int, float], new: set[int], left: int) -> list[int]:
    """Chosen rows (with utility) of which at most `left` are new: the new ones of lowest utility are cut."""
    kept = sorted(new & chosen.keys(), key=lambda row: (-chosen[row], row))[:left]
    return [row for row in chosen if row not in new or row in kept]


def shuffled(rows: Sequence[int], seed: int, round: int) -> list[int]:
    """The order in which the round trains."""
    order = np.argsort(philox_uniform(seed, SHUFFLE, round, rows), kind="stable")
    return [int(rows[i]) for i in order]


def budget_rows(budget: int | float, num_rows: int, selectable: int) -> int:
    """Distinct rows a run may use: an int is rows, a float a share of the pool's rows."""
    wanted = budget if isinstance(budget, int) else round(budget * num_rows)
    return max(1, min(wanted, selectable))


def choose_round(
    candidates: Candidates, noise: np.ndarray, *, quota_uniform: float, config: dict[str, Any], budget: int
) -> dict[int, float]:
    """The rows that a round chooses among its candidates, with utility, before the cut to the budget."""
    cap = max(1, budget // config["min_rounds"]) if config["min_rounds"] else None
    members = [np.flatnonzero(candidates["task"] == task) for task in np.unique(candidates["task"])]
    quotas = task_quotas([len(m) for m in members], config["rate"], cap, quota_uniform)
    rules = {name: config[name] for name in ("choose", "temperature", "exclude_top")}
    chosen: list[int] = []
    for m, quota in zip(members, quotas, strict=True):
        chosen += choose_in_task(candidates["row"][m], candidates["utility"][m], noise[m], quota, **rules)
    utility = dict(zip(candidates["row"].tolist(), candidates["utility"].tolist(), strict=True))
    return {row: utility[row] for row in chosen}


# A run on disk.


@dataclass
class RunLog:
    """What a run wrote, as plain arrays and dicts.

    Attributes:
        config: config.yaml. rounds: lines of rounds.jsonl. selected: lines of selected.jsonl.
        candidates: of each round, the columns of its Parquet file.
        arm, task, aside, first_utility: [N] arrays of the prepared pool. ids: its ids.
    """

    config: dict[str, Any]
    rounds: list[dict[str, Any]]
    selected: list[dict[str, Any]]
    candidates: list[Candidates]
    arm: np.ndarray
    task: np.ndarray
    aside: np.ndarray
    first_utility: np.ndarray
    ids: list[str]


class Disagreement(Exception):
    """A logged value that does not follow from the others."""

    def __init__(self, what: str, expected: Any, logged: Any) -> None:
        super().__init__(f"{what}: expected {expected}, logged {logged}")
        self.what, self.expected, self.logged = what, expected, logged


def read_run(folder: str | Path) -> RunLog:
    """Reads a run's folder.

    Raises:
        OSError: a file is missing. ValueError: the run used an option that is not recomputed here.
    """
    folder = Path(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    covered = {"bandit": "exp3", "arms_per_round": 1, "round_tokens": None}
    for name, value in covered.items():
        if config[name] != value:
            raise ValueError(f"recompute: `{name}` must be {value!r}, got {config[name]!r}")
    pool_folder = folder / "prepared" / "pool"
    pool = lf.Pool.load(pool_folder if pool_folder.exists() else Path(config["pool"]) / "pool")
    rounds = _read_jsonl(folder / "rounds.jsonl")
    tables = [pq.read_table(folder / "utilities" / f"round-{n:05d}.parquet") for n in range(1, len(rounds) + 1)]
    return RunLog(
        config=config,
        rounds=rounds,
        selected=_read_jsonl(folder / "selected.jsonl"),
        candidates=[{name: table[name].to_numpy() for name in table.column_names} for table in tables],
        arm=np.asarray(pool.arm, np.int64),
        task=np.asarray(pool.task, np.int64),
        aside=np.asarray(pool.aside),
        first_utility=np.asarray(pool.utility, np.float64),
        ids=[pool.id(row) for row in range(len(pool))],
    )


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _same(what: str, expected: Any, logged: Any) -> None:
    if expected != logged:
        raise Disagreement(what, expected, logged)


def _close(what: str, expected: Any, logged: Any, tolerance: float = 1e-12) -> None:
    expected, logged = np.asarray(expected, np.float64), np.asarray(logged, np.float64)
    if expected.shape != logged.shape or not np.allclose(logged, expected, rtol=tolerance, atol=tolerance):
        raise Disagreement(what, expected.tolist(), logged.tolist())


class Replay:
    """The state that the log implies, advanced round by round."""

    def __init__(self, log: RunLog) -> None:
        self.log, self.config, self.seed = log, log.config, log.config["seed"]
        self.num_arms = int(log.arm.max()) + 1
        self.uses = np.zeros(len(log.arm), np.int64)
        self.barred = log.aside.copy()  # set aside, or quarantined for a loss that is not finite
        self.budget = budget_rows(self.config["budget"], len(log.arm), int((~log.aside).sum()))
        self.first_visits = first_visits(self.seed, self.num_arms) if self.config["visit_all_first"] else []
        self.log_w: Sequence[float] = [0.0] * self.num_arms
        self.rewards: list[float] = []
        self.num_quarantined = 0
        self.chosen: dict[int, list[tuple[int, float]]] = {}  # row: (round, utility at choice), in order of choice

    def available(self) -> np.ndarray:
        return ~self.barred & (self.uses < self.config["max_uses"])

    def active(self) -> np.ndarray:
        return np.bincount(self.log.arm[self.available()], minlength=self.num_arms) > 0

    def finished(self) -> bool:
        return len(self.chosen) >= self.budget or not self.available().any()

    def round(self, number: int, line: dict[str, Any], candidates: Candidates) -> None:
        """Checks one round and advances by it."""
        _same("round number", number, line["round"])
        _same("run goes on", False, self.finished())
        active = self.active()
        arm = self._draw(number, line, active)
        self.check_candidates(number, arm, candidates)
        quota_uniform = float(philox_uniform(self.seed, TASKS, number, arm))
        _same("uniform number of the tasks", [quota_uniform], line["task_uniforms"])
        noise = choice_noise(self.config["choose"], self.seed, number, candidates["row"])
        _close("noise", noise, candidates["noise"])
        chosen = choose_round(candidates, noise, quota_uniform=quota_uniform, config=self.config, budget=self.budget)
        _same("rows chosen", sorted(chosen), sorted(candidates["row"][candidates["chosen"]].tolist()))
        kept = cut_to_budget(chosen, {r for r in chosen if self.uses[r] == 0}, self.budget - len(self.chosen))
        _same("rows trained", shuffled(kept, self.seed, number), line["rows"])
        _same("number of samples", len(kept), line["samples"])
        for row in line["rows"]:
            self.uses[row] += 1
            self.chosen.setdefault(row, []).append((number, chosen[row]))
        self.num_quarantined += line["quarantined"]
        self._update(line, active, arm)

    def _draw(self, number: int, line: dict[str, Any], active: np.ndarray) -> int:
        probs = exp3_probs(self.log_w, active, self.config["gamma"])
        _close("probabilities", probs, line["probs"])
        while self.first_visits and not active[self.first_visits[0]]:
            self.first_visits.pop(0)
        forced = bool(self.first_visits)
        _same("first visit", forced, line["forced"])
        if forced:
            arm, uniforms = self.first_visits.pop(0), []
        else:
            uniforms = philox_uniform(self.seed, ARM, number, [0]).tolist()
            arm = arm_of(probs, uniforms[0])
        _same("uniform number of the arm", uniforms, line["uniform"])
        _same("arm", ([arm], arm), (line["arms"], line["arm"]))
        return arm

    def check_candidates(self, number: int, arm: int, candidates: Candidates) -> None:
        """Checks that a round chose among all rows of its arm that were left, and what is logged of them."""
        expected = np.flatnonzero(self.available() & (self.log.arm == arm))
        missing = np.setdiff1d(expected, candidates["row"])
        # The log says how many rows were quarantined, not which: that many trained rows may be missing.
        if len(missing) <= self.num_quarantined and (self.uses[missing] > 0).all():
            self.barred[missing] = True
            expected = np.setdiff1d(expected, missing)
        _same("candidates", expected.tolist(), sorted(candidates["row"].tolist()))
        row = candidates["row"]
        _same("arm of the candidates", [arm], np.unique(candidates["arm"]).tolist())
        _same("task of the candidates", self.log.task[row].tolist(), candidates["task"].tolist())
        _same("uses of the candidates", self.uses[row].tolist(), candidates["uses"].tolist())
        if number == 1:
            _close("utility of the first round", self.log.first_utility[row], candidates["utility"], 1e-6)

    def _update(self, line: dict[str, Any], active: np.ndarray, arm: int) -> None:
        reward, scaled = line["reward"], 0.0
        _same("rewards", [reward], line["rewards"])
        log_w = np.array(self.log_w)
        if reward is not None:
            self.rewards.append(reward)
            scaled = scaled_reward(self.rewards)
            _close("scaled reward", [scaled], line["scaled_rewards"], 1e-9)
            # A first visit was not drawn: it happens with probability 1.
            prob = 1.0 if line["forced"] else line["probs"][arm]
            log_w[arm] += self.config["gamma"] / int(active.sum()) * scaled / prob
        # Only differences of log weights matter, so both are taken relative to the largest.
        logged = np.array(line["log_weights"])
        _close("log weights", log_w - log_w[active].max(), logged - logged[active].max(), 1e-9)
        self.log_w = line["log_weights"]

    def end(self) -> None:
        """Checks that the run ended where it had to, and selected.jsonl."""
        if self.config["train_tokens"] is None:
            _same("run ended", True, self.finished())
        expected = [
            {"id": self.log.ids[row], "row": row, "rounds": [n for n, _ in uses], "utility": [u for _, u in uses]}
            for row, uses in self.chosen.items()
        ]
        _same("number of lines of selected.jsonl", len(expected), len(self.log.selected))
        for wanted, logged in zip(expected, self.log.selected, strict=True):
            _same("selected.jsonl", wanted, logged)


def recompute(log: RunLog) -> dict[str, Any]:
    """Replays a run.

    Returns:
        {"agree": bool, "rounds": rounds that agree, up to the first disagreement, "rows": distinct rows so far,
        "first_disagreement": None or {"round", "what", "expected", "logged"}; round None is the run as a whole}.
    """
    replay = Replay(log)
    agreed, number = 0, None
    disagreement = None
    try:
        for number, (line, candidates) in enumerate(zip(log.rounds, log.candidates, strict=True), 1):
            replay.round(number, line, candidates)
            agreed += 1
        number = None
        replay.end()
    except Disagreement as found:
        disagreement = {"round": number, "what": found.what, "expected": found.expected, "logged": found.logged}
    rows = len(replay.chosen)
    return {"agree": disagreement is None, "rounds": agreed, "rows": rows, "first_disagreement": disagreement}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python tests/recompute.py RUN", file=sys.stderr)
        return 2
    verdict = recompute(read_run(arguments[0]))
    print(json.dumps({"run": arguments[0], **verdict}))
    return 0 if verdict["agree"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
