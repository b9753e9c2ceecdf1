"""The method once more, one row at a time in plain Python: what `test_engine_from_spec` holds the engine against.

Sections 4 to 7 of the method, written to be read beside it and sharing nothing with the package; the choice inside an arm
and the random numbers are those of `recompute`.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import recompute as r

Shown = tuple[int, float, float, float]  # row (-1: none), mean nll, supervised tokens, G


@dataclass
class Entry:
    """What is remembered of a row; `seen` is the round of its last visit, 0 if none."""

    loss: float
    idu: float
    previous: float
    grad: float = 0.0  # G / n
    step: int = 0
    seen: int = 0
    uses: int = 0
    barred: bool = False


@dataclass
class Pair:
    """One row seen again: features by kappa, the fall that was observed."""

    features: dict[float, np.ndarray]
    fall: float
    arm: int
    revisit: bool


class Estimator:
    """`none`: a row's loss is what it was."""

    def __init__(self, spec: "SpecLead") -> None:
        self.spec = spec

    def drop(self, row: int) -> float:
        return 0.0

    def pair(self, row: int, loss: float) -> None: ...

    def end_round(self, arm: int) -> None: ...

    def calibrate(self) -> None: ...


class Historical(Estimator):
    """eta_sum * ||beta g_first + (1 - beta) g_prev||^2, one value for the rows of a round."""

    def __init__(self, spec: "SpecLead") -> None:
        super().__init__(spec)
        self.drops: dict[int, float] = {}
        self.first: dict[int, np.ndarray] = {}
        self.previous: np.ndarray | None = None
        self.betas: list[float] = []

    def drop(self, row: int) -> float:
        return self.drops.get(self.spec.entries[row].seen, 0.0)

    def end_round(self, arm: int) -> None:
        spec = self.spec
        eta_sum = sum(lr for lr, _, number in spec.steps if number == spec.number)
        g = -(spec.theta_end - spec.theta_start) / eta_sum
        value = 0.0
        if self.previous is not None:
            combined = self.previous
            if arm in self.first:
                first, previous = self.first[arm], self.previous
                a, c, q = float(first @ first), float(previous @ previous), float(first @ previous)
                # Equal vectors have no best beta; 0 is the convention.
                beta = 0.0 if np.array_equal(first, previous) else min(1.0, max(0.0, (c - q) / (a + c - 2 * q)))
                self.betas.append(beta)
                combined = beta * first + (1 - beta) * previous
            value = eta_sum * float(combined @ combined)
        self.drops[spec.number] = value
        self.first.setdefault(arm, g)
        self.previous = g


class GradNorm(Estimator):
    """(c + c_k) eta_s P (1 - beta1^m) exp(-kappa tau) + d tau_k + e (tau - tau_k), fitted to all pairs so far."""

    KAPPAS = (0.0, 0.25, 0.5, 1.0, 2.0)
    PRIOR, MIN_PAIRS = 10.0, 30

    def __init__(self, spec: "SpecLead") -> None:
        super().__init__(spec)
        self.pairs: list[Pair] = []
        self.errors = dict.fromkeys(self.KAPPAS, 0.0)
        self.beta = {kappa: np.zeros(3) for kappa in self.KAPPAS}
        self.offset = {kappa: np.zeros(spec.num_arms) for kappa in self.KAPPAS}
        self.kappa = 0.0
        self.unit = 1.0  # learning rate of a round at peak rate; nothing is known of it before the first round ends

    def features(self, row: int, kappa: float) -> np.ndarray:
        spec, entry = self.spec, self.spec.entries[row]
        m = len(spec.steps) - entry.step
        if not m:
            return np.zeros(3)
        tau = spec.clock[-1] - spec.clock[entry.step]
        own = spec.arm_clock[-1][spec.arm[row]] - spec.arm_clock[entry.step][spec.arm[row]]
        lr, num_items, _ = spec.steps[entry.step]
        push = lr * entry.grad / num_items * (1.0 - spec.rules["adam_beta1"] ** m)
        return np.array([push * math.exp(-kappa * tau / self.unit), own, tau - own])

    def predict(self, features: np.ndarray, kappa: float, arm: int) -> float:
        c, d, e = self.beta[kappa]
        return float(features @ [c + self.offset[kappa][arm], d, e])

    def drop(self, row: int) -> float:
        return self.predict(self.features(row, self.kappa), self.kappa, self.spec.arm[row])

    def pair(self, row: int, loss: float) -> None:
        entry, arm = self.spec.entries[row], self.spec.arm[row]
        if entry.step == len(self.spec.steps):
            return  # no optimizer step since: nothing to learn
        pair = Pair({k: self.features(row, k) for k in self.KAPPAS}, entry.loss - loss, arm, entry.seen > 0)
        for kappa, features in pair.features.items():
            self.errors[kappa] += (self.predict(features, kappa, arm) - pair.fall) ** 2
        self.pairs.append(pair)

    def num_revisits(self) -> int:
        return sum(pair.revisit for pair in self.pairs)

    def calibrate(self) -> None:
        steps = self.spec.steps
        self.unit = max(lr for lr, *_ in steps) * len(steps) / self.spec.number
        count = np.array([self.num_revisits(), len(self.pairs), len(self.pairs)])
        if not self.pairs:
            return
        fall = np.array([pair.fall for pair in self.pairs])
        arms = np.array([pair.arm for pair in self.pairs])
        for kappa in self.KAPPAS:
            x = np.array([pair.features[kappa] for pair in self.pairs])
            scale = np.sqrt((x**2).sum(0) / np.maximum(count, 1))
            use = np.flatnonzero((count >= self.MIN_PAIRS) & (scale > 0))
            # Ridge with prior mean 0 as ten pseudo-pairs for each feature.
            z = np.concatenate([x[:, use] / scale[use], math.sqrt(self.PRIOR) * np.eye(len(use))])
            y = np.concatenate([fall, np.zeros(len(use))])
            self.beta[kappa] = np.zeros(3)
            self.beta[kappa][use] = np.linalg.lstsq(z, y)[0] / scale[use]
            left = fall - x @ self.beta[kappa]
            for k in range(self.spec.num_arms if 0 in use else 0):
                of_arm = arms == k
                slope = x[of_arm, 0] @ left[of_arm]
                self.offset[kappa][k] = slope / (x[of_arm, 0] @ x[of_arm, 0] + self.PRIOR * scale[0] ** 2)
        self.kappa = min(self.KAPPAS, key=lambda kappa: self.errors[kappa])


class SpecLead:
    """The whole method, one row at a time."""

    def __init__(self, arm: np.ndarray, task: np.ndarray, aside: np.ndarray, utility: np.ndarray, rules: dict) -> None:
        self.arm, self.task, self.rules = arm.tolist(), task, rules
        self.num_arms = max(self.arm) + 1
        self.entries = [Entry(float(u), float(u), float(u), barred=bool(a)) for u, a in zip(utility, aside, strict=True)]
        self.steps: list[tuple[float, float, int]] = []  # learning rate, supervised tokens, round
        self.clock, self.arm_clock = [0.0], [[0.0] * self.num_arms]  # learning rate summed before each step
        self.number, self.num_used = 0, 0
        self.budget = r.budget_rows(rules["budget"], len(arm), int((~aside).sum()))
        self.first_visits = r.first_visits(rules["seed"], self.num_arms) if rules["visit_all_first"] else []
        self.log_w = [0.0] * self.num_arms
        self.rewards: list[float] = []
        kinds = {"none": Estimator, "historical": Historical, "grad_norm": GradNorm}
        self.estimator = kinds[rules["estimator"]](self)
        self.theta_start = self.theta_end = np.zeros(0)
        self.happened: Counter[str] = Counter()

    def lhat(self, row: int) -> float:
        return max(0.0, self.entries[row].loss - self.estimator.drop(row))

    def idu(self, row: int) -> float:
        b = self.rules["smoothing"]
        return (1.0 - b) * self.lhat(row) + b * self.entries[row].previous

    def available(self, row: int) -> bool:
        return not self.entries[row].barred and self.entries[row].uses < self.rules["max_uses"]

    def begin_round(self) -> tuple[int, list[int]] | None:
        left = [row for row in range(len(self.arm)) if self.available(row)]
        if self.num_used >= self.budget or not left:
            return None
        self.number += 1
        seed = self.rules["seed"]
        self.active = np.bincount([self.arm[row] for row in left], minlength=self.num_arms) > 0
        self.probs = r.exp3_probs(self.log_w, self.active, self.rules["gamma"])
        self.first_visits = [k for k in self.first_visits if self.active[k]]
        if self.first_visits:
            arm, self.prob = self.first_visits.pop(0), 1.0
        else:
            arm = r.arm_of(self.probs, float(r.philox_uniform(seed, r.ARM, self.number, 0)))
            self.prob = float(self.probs[arm])
        self.drawn = arm
        row = np.array([row for row in left if self.arm[row] == arm])
        candidates = {"row": row, "task": self.task[row], "utility": np.array([self.idu(i) for i in row])}
        noise = r.choice_noise(self.rules["choose"], seed, self.number, row)
        uniform = float(r.philox_uniform(seed, r.TASKS, self.number, arm))
        chosen = r.choose_round(candidates, noise, quota_uniform=uniform, config=self.rules, budget=self.budget)
        kept = r.cut_to_budget(chosen, {i for i in chosen if not self.entries[i].uses}, self.budget - self.num_used)
        self.begin_idu = {i: chosen[i] for i in kept}
        for i in kept:
            self.num_used += self.entries[i].uses == 0
            self.entries[i].uses += 1
        self.happened["rows cut by the budget"] += len(chosen) - len(kept)
        self.happened["arms run dry"] += not self.active[list(set(self.arm))].all()
        return arm, r.shuffled(kept, seed, self.number)

    def observe(self, batch: Iterable[Shown]) -> None:
        shown = [s for s in batch if s[0] >= 0 and s[2] > 0]
        broken = {row for row, loss, *_ in shown if not math.isfinite(loss)}
        last = {row: rest for row, *rest in shown if math.isfinite(rest[0])}  # of duplicates the last one
        for row, (loss, num_tokens, grad_norm_sq) in last.items():
            entry = self.entries[row]
            if entry.barred:
                continue
            self.estimator.pair(row, loss)
            if entry.seen != self.number:  # b advances once a visit
                self.happened["revisits"] += entry.seen > 0
                entry.previous = entry.idu
            entry.loss, entry.grad, entry.step, entry.seen = loss, grad_norm_sq / num_tokens, len(self.steps), self.number
        for row in broken:
            self.happened["quarantined"] += not self.entries[row].barred
            self.entries[row].barred = True

    def step(self, lr: float, num_items: float) -> None:
        self.steps.append((lr, num_items, self.number))
        self.clock.append(self.clock[-1] + lr)
        self.arm_clock.append([t + lr * (k == self.drawn) for k, t in enumerate(self.arm_clock[-1])])

    def end_round(self) -> dict[str, Any]:
        self.estimator.end_round(self.drawn)
        trained = [i for i in self.begin_idu if self.entries[i].seen == self.number and not self.entries[i].barred]
        self.happened["rows without an observation"] += len(self.begin_idu) - len(trained)
        falls = []
        for row in trained:
            entry = self.entries[row]
            entry.idu = self.idu(row)
            idu_fall, drop = self.begin_idu[row] - entry.idu, entry.loss - self.lhat(row)
            falls.append(idu_fall if self.rules["reward"] == "idu" else drop)
        reward, scaled = math.nan, 0.0
        if trained:
            reward = float(np.mean(falls))
            self.rewards.append(reward)
            scaled = r.scaled_reward(self.rewards)
        self.log_w[self.drawn] += self.rules["gamma"] / int(self.active.sum()) * scaled / self.prob
        self.estimator.calibrate()  # last, as section 7 lists it: no reward holds a change of the coefficients
        return {"reward": reward, "scaled": scaled, "num_samples": len(trained)}
