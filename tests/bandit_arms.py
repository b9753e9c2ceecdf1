"""Simulated arms with known rewards in [0, 1], a player that drives the real bandit over them, and the regret bounds.

Every environment is a table of rewards that is fixed before the first draw, so the adversaries are oblivious and the
bounds hold for each table as it stands: expectations are over the bandit's own draws only.

Regret. Against the best fixed arm ("weak" regret): max_j sum_t x_j(t) - sum_t x_{i_t}(t). Where an environment names a
sequence of arms: against that sequence, of hardness h = 1 + number of its changes.

Bounds, for rewards x in [0, 1], K arms, at every round t for fixed parameters:

    exp3      E regret <= (e - 1) gamma G_max + K ln K / gamma                        Auer et al. 2002, Theorem 3.1
              gamma = min(1, sqrt(K ln K / ((e - 1) g))), g >= G_max:  <= 2 sqrt(e - 1) sqrt(g K ln K)   Corollary 3.2
    exp3s     E regret <= K (h ln(K / alpha) + e alpha t) / gamma + (e - 1) gamma t                      Theorem 8.1
              alpha = 1 / T, gamma = min(1, sqrt(K (h ln(K T) + e) / ((e - 1) T)))                     Corollary 8.3
    exp3_ix   regret <= 2 ln K / eta + eta K t + (1 / eta + 1) ln(2 / delta)  with probability 1 - delta
              eta = sqrt(2 ln K / (K T)): <= 2 sqrt(2 K T ln K) + (sqrt(K T / (2 ln K)) + 1) ln(2 / delta)
              Neu 2015, proof of Theorem 1 (whose statement rounds up), for eta = 2 gamma_ix

How this project's parameters meet them. `exp3_update` learns at gamma / K: for exp3 and exp3s that is the paper's own
rate, and r = x is a reward they allow. For exp3_ix eta = gamma / K and the implicit exploration is gamma / (2 K) =
eta / 2, so eta = 2 gamma_ix holds for every gamma, and gamma = K eta; r = 2 x - 1 makes its loss (1 - r) / 2 = 1 - x.

Signed rewards r in [-1, 1], which the engine uses: the proofs of 3.1 and 8.1 ask for exp(y) <= 1 + y + (e - 2) y^2 at
y = gamma r / (K p) <= 1, true for negative y as well, and for sum_i r_i^2 <= K; with G_max replaced by t the same bounds
follow. With r = 2 x - 1 the regret in x is half the regret in r, and so is its bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lead_fast.bandit import Bandit, exp3_draw, exp3_probs, exp3_update
from lead_fast.rng import philox_uniform

LEARNERS = ("exp3", "exp3_ix", "exp3s")
Tamper = Callable[[float, float], tuple[float, float]]

# Ways to break a learner: (reward, probability) as its update is told them.
BROKEN: dict[str, Tamper] = {
    "flipped": lambda reward, prob: (-reward, prob),
    "unweighted": lambda reward, prob: (reward, 1.0),
}


@dataclass(frozen=True)
class Arms:
    """Arms whose every reward is known.

    Attributes:
        name: of the environment.
        rewards: fp64 [T, K] in [0, 1].
        sequence: int64 [T], the arm that regret is measured against in each round; None: the best fixed arm.
    """

    name: str
    rewards: np.ndarray
    sequence: np.ndarray | None = None

    @property
    def num_rounds(self) -> int:
        return self.rewards.shape[0]

    @property
    def num_arms(self) -> int:
        return self.rewards.shape[1]

    def best_gain(self) -> np.ndarray:
        """What the best choice in hindsight had gained after each round, fp64 [T]."""
        if self.sequence is None:
            return self.rewards.cumsum(0).max(1)
        return self.rewards[np.arange(self.num_rounds), self.sequence].cumsum()

    def hardness(self) -> np.ndarray:
        """h of the comparator up to each round, int64 [T]: 1 for a fixed arm."""
        if self.sequence is None:
            return np.ones(self.num_rounds, np.int64)
        return 1 + np.r_[0, np.diff(self.sequence) != 0].cumsum()

    def fixed(self) -> Arms:
        """The same rewards, with regret against the best fixed arm."""
        return Arms(self.name, self.rewards)


# Environments: (rounds T, arms K, seed) -> Arms. The good arm is never the first one, which ties would favour.


def bernoulli(num_rounds: int, num_arms: int, seed: int) -> Arms:
    """Stationary coins: one arm pays with probability 0.75, the others 0.3."""
    means = np.full(num_arms, 0.3)
    means[num_arms // 2] = 0.75
    return Arms("bernoulli", (np.random.default_rng(seed).random((num_rounds, num_arms)) < means).astype(float))


def continuous(num_rounds: int, num_arms: int, seed: int) -> Arms:
    """Stationary rewards, uniform within 0.2 of a mean: one arm 0.8, the others spread over [0.2, 0.4]."""
    means = np.linspace(0.2, 0.4, num_arms)
    means[num_arms // 2] = 0.8
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, (num_rounds, num_arms))
    return Arms("continuous", means + noise)


def near_tie(num_rounds: int, num_arms: int, seed: int) -> Arms:
    """Fair coins, one of them better by sqrt(K / T): the construction behind the lower bound of Auer et al., Theorem 5.1."""
    means = np.full(num_arms, 0.5)
    means[num_arms // 2] += math.sqrt(num_arms / num_rounds)
    return Arms("near tie", (np.random.default_rng(seed).random((num_rounds, num_arms)) < means).astype(float))


def switching(num_rounds: int, num_arms: int, seed: int, segments: int = 3) -> Arms:
    """Coins of 0.95 and 0.05: the good arm changes `segments` - 1 times, at equal distances."""
    sequence = (np.arange(num_rounds) * segments // num_rounds + 1) % num_arms
    means = np.where(np.arange(num_arms) == sequence[:, None], 0.95, 0.05)
    table = (np.random.default_rng(seed).random((num_rounds, num_arms)) < means).astype(float)
    return Arms("switching", table, sequence)


def late_riser(num_rounds: int, num_arms: int, seed: int) -> Arms:
    """The first arm alone pays for a quarter of the time; then the last one, which had paid nothing, alone pays for good."""
    table = np.zeros((num_rounds, num_arms))
    table[: num_rounds // 4, 0] = 1.0
    table[num_rounds // 4 :, -1] = 1.0
    return Arms("late riser", table)


def trap(num_rounds: int, num_arms: int, seed: int) -> Arms:
    """Written against `greedy`, whose every draw is known in advance: the arm it will draw pays 0, all others 1."""
    table, bandit, mask = np.ones((num_rounds, num_arms)), Bandit(num_arms, "greedy"), torch.ones(num_arms, dtype=torch.bool)
    for row in table:
        drawn, probs, _ = bandit.draw(mask, _number(0.5))
        row[int(drawn)] = 0.0
        bandit.update(mask, drawn, probs, _number(0.0))
    return Arms("trap", table)


def shadow(num_rounds: int, num_arms: int, seed: int) -> Arms:
    """Written against an EXP3 of the adversary's own, played in advance: the arm that copy prefers pays 0, all others 1."""
    table, mask = np.ones((num_rounds, num_arms)), torch.ones(num_arms, dtype=torch.bool)
    gamma, log_w = exp3_gamma(num_arms, num_rounds), torch.zeros(num_arms, dtype=torch.float64)
    for row, uniform in zip(table, uniforms(num_rounds, seed, run=2**31), strict=True):
        probs = exp3_probs(log_w, mask, gamma)
        row[int(probs.argmax())] = 0.0
        arm = exp3_draw(probs, uniform)
        log_w = exp3_update(log_w, mask, arm, row[arm], float(probs[arm]), gamma)
    return Arms("shadow", table)


ENVIRONMENTS = (bernoulli, continuous, near_tie, switching, late_riser, trap, shadow)


# Players


def uniforms(num_rounds: int, seed: int, run: int) -> list[float]:
    """One number in (0, 1) a round; runs of one seed share none."""
    return philox_uniform(seed, 0, run, torch.arange(num_rounds)).tolist()


def play(
    learner: str,
    arms: Arms,
    numbers: Sequence[float],
    gamma: float,
    *,
    share: float = 0.0,
    signed: bool = False,
    mask: Sequence[bool] | None = None,
    broken: str | None = None,
) -> np.ndarray:
    """One run of `exp3_probs`, `exp3_draw` and `exp3_update`, told the arms' rewards as they are.

    Args:
        learner: one of `LEARNERS`.
        arms: what is played.
        numbers: one number in (0, 1) a round.
        gamma, share: as in `exp3_update`.
        signed: exp3 and exp3s are told r = 2 x - 1 and not r = x; exp3_ix always is.
        mask: the arms that may be drawn; None: all.
        broken: one of `BROKEN`.

    Returns:
        The arm drawn in each round, int64 [T].
    """
    table, tamper = arms.rewards.tolist(), BROKEN[broken] if broken else None
    active = torch.ones(arms.num_arms, dtype=torch.bool) if mask is None else torch.tensor(mask)
    log_w = torch.zeros(arms.num_arms, dtype=torch.float64)
    mixed = 0.0 if learner == "exp3_ix" else gamma
    slope, shift = (2.0, -1.0) if signed or learner == "exp3_ix" else (1.0, 0.0)
    drawn = np.empty(arms.num_rounds, np.int64)
    for t, number in enumerate(numbers):
        probs = exp3_probs(log_w, active, mixed)
        arm = exp3_draw(probs, number)
        reward, prob = slope * table[t][arm] + shift, float(probs[arm])
        if tamper is not None:
            reward, prob = tamper(reward, prob)
        log_w = exp3_update(log_w, active, arm, reward, prob, gamma, variant=learner, share=share)
        drawn[t] = arm
    return drawn


def play_bandit(bandit: Bandit, arms: Arms, numbers: Sequence[float]) -> np.ndarray:
    """One run of a whole `Bandit`, which scales rewards by their running mean and spread as in training.

    Returns:
        The arm drawn in each round, int64 [T].
    """
    mask, drawn = torch.ones(arms.num_arms, dtype=torch.bool), np.empty(arms.num_rounds, np.int64)
    for t, number in enumerate(numbers):
        arm, prob, _ = bandit.draw(mask, _number(number))
        drawn[t] = int(arm)
        bandit.update(mask, arm, prob, _number(arms.rewards[t, drawn[t]]))
    return drawn


def _number(value: float) -> torch.Tensor:
    return torch.full((1,), float(value), dtype=torch.float64)


def regret(arms: Arms, drawn: np.ndarray) -> np.ndarray:
    """Regret after each round of one run's draws, int64 [T] in, fp64 [T] out."""
    return arms.best_gain() - arms.rewards[np.arange(arms.num_rounds), drawn].cumsum()


# Bounds. Rounds, gains and hardness may be numbers or arrays [T].


def exp3_gamma(num_arms: int, best_gain: float) -> float:
    """gamma of Corollary 3.2 for a known g >= G_max."""
    return min(1.0, math.sqrt(num_arms * math.log(num_arms) / ((math.e - 1.0) * best_gain)))


def exp3_bound(num_arms: int, gamma: float, best_gain):
    """Theorem 3.1: expected regret against the best fixed arm, whose gain is `best_gain`."""
    return (math.e - 1.0) * gamma * best_gain + num_arms * math.log(num_arms) / gamma


def exp3s_gamma(num_arms: int, num_rounds: int, hardness: int) -> float:
    """gamma of Corollary 8.3 for share = 1 / T and a known hardness."""
    numerator = num_arms * (hardness * math.log(num_arms * num_rounds) + math.e)
    return min(1.0, math.sqrt(numerator / ((math.e - 1.0) * num_rounds)))


def exp3s_bound(num_arms: int, gamma: float, share: float, rounds, hardness):
    """Theorem 8.1: expected regret against any sequence of arms of this hardness."""
    shared = num_arms * (hardness * math.log(num_arms / share) + math.e * share * rounds) / gamma
    return shared + (math.e - 1.0) * gamma * rounds


def exp3_ix_gamma(num_arms: int, num_rounds: int) -> float:
    """This project's gamma = K eta for the eta of Neu's Theorem 1."""
    return math.sqrt(2.0 * num_arms * math.log(num_arms) / num_rounds)


def exp3_ix_bound(num_arms: int, gamma: float, rounds, delta: float):
    """Neu 2015: regret against the best fixed arm, exceeded with probability at most `delta`."""
    eta = gamma / num_arms
    return 2.0 * math.log(num_arms) / eta + eta * num_arms * rounds + (1.0 / eta + 1.0) * math.log(2.0 / delta)
