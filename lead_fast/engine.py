"""`LeadEngine`: rounds of selection around any training loop (section 7).

begin_round  draw an arm, choose rows in its tasks, return them
observe      per micro-batch: the loss's own statistics into the table
step         per optimizer step: its learning rate and supervised tokens advance the clocks
end_round    loss change, utility, reward, bandit, calibration
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import lead_fast.estimators  # noqa: F401  registers the estimators by name
from lead_fast.bandit import Bandit, Draw
from lead_fast.config import LeadConfig
from lead_fast.files import write_jsonl
from lead_fast.pool import Pool
from lead_fast.rng import philox_uniform
from lead_fast.selection import Candidates, Groups, gumbel, rank, task_quotas
from lead_fast.utility import (
    Clocks,
    UtilityTable,
    WeightChange,
    estimator_class,
    idu,
    lazy_loss,
    observe,
)

logger = logging.getLogger(__name__)

# Streams of the counter-based generator: each draw is philox(seed, stream, round, counter), so a resumed run, or a reader
# of the log, draws the same.
STREAM_ARM, STREAM_TASKS, STREAM_ROWS, STREAM_SHUFFLE, STREAM_FIRST = range(5)

STATE_VERSION = 2


class SampleStatistics(Protocol):
    """What `observe` reads of `linear_cross_entropy(...).samples`; fp32 [S] each."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def num_tokens(self) -> Tensor: ...
    @property
    def grad_norm_sq(self) -> Tensor: ...


@dataclass(frozen=True)
class Round:
    """One round's choice.

    Attributes:
        number: 1, 2, ...
        arm: the arm drawn (the first, where `arms_per_round` > 1); `arms` has all.
        rows: int64 [n] on the CPU, row numbers of the pool in the round's seeded shuffle: train once over them.
        utility: fp32 [n] on the CPU, IDU of those rows at choice.
        draw: probabilities and the uniform numbers behind the draw of the arms.
        task_uniforms: per arm, the uniform number that placed the systematic sample over its tasks.
        candidates: per arm, all rows that could be chosen, as the choice saw them.
    """

    number: int
    arms: list[int]
    rows: Tensor
    utility: Tensor
    draw: Draw
    task_uniforms: list[float]
    candidates: list[Candidates]

    @property
    def arm(self) -> int:
        return self.arms[0]

    def __len__(self) -> int:
        return len(self.rows)


class RoundReport:
    """What a round did. Tensors stay on the device until a property is read."""

    def __init__(self, rnd: Round, reward: Tensor, scaled: list[float], log_w: Tensor, seen: Tensor, loss: Tensor,
                 quarantined: Tensor, calibration: dict[str, Any]) -> None:  # fmt: skip
        self._rows = rnd.rows
        self.number, self.arm, self.arms = rnd.number, rnd.arm, rnd.arms
        self.probs, self.uniforms, self.forced = rnd.draw.all_probs, rnd.draw.uniforms, rnd.draw.forced
        self.scaled_rewards, self.log_weights, self.calibration = scaled, log_w, calibration
        self._rewards, self._seen, self._loss, self._quarantined = reward, seen, loss, quarantined

    @cached_property
    def rewards(self) -> list[float]:
        """Raw reward of each arm drawn; NaN where none of its rows was observed."""
        return self._rewards.tolist()

    @property
    def reward(self) -> float:
        """Raw reward of `arm`: mean fall of utility ("idu") or of loss ("drop") over the round's rows, in nats."""
        return self.rewards[0]

    @cached_property
    def num_samples(self) -> int:
        """Rows of the round that were observed with a finite loss."""
        return int(self._seen)

    @cached_property
    def mean_loss(self) -> float:
        """Mean over those rows of their mean nll per supervised token, as observed."""
        return float(self._loss)

    @cached_property
    def quarantined(self) -> list[int]:
        """Rows of the round whose loss was not finite: never chosen again."""
        return self._rows[self._quarantined.cpu()].tolist()

    @property
    def num_quarantined(self) -> int:
        """Number of those rows."""
        return len(self.quarantined)

    def __repr__(self) -> str:
        return f"RoundReport(number={self.number}, arm={self.arm}, reward={self.reward:.4g}, num_samples={self.num_samples})"


class LeadEngine:
    """LEAD around any training loop.

    Args:
        pool: rows with `arm` and `utility` (first utility); `task` and `difficulty` where known. The engine holds arrays
            only, never text.
        config: how to choose.
        device: where the table lives; None is the CPU.

    Raises:
        ValueError: the pool lacks an array the engine needs, has no selectable row, or holds non-finite utilities.

    Example:
        while (rnd := engine.begin_round()) is not None:
            for batch in batches(rnd.rows):
                ...
                engine.observe(batch.rows, out.samples)
                ...
                engine.step(lr=lr, num_items=n)
            report = engine.end_round()
    """

    def __init__(self, pool: Pool, config: LeadConfig, device: torch.device | str | None = None) -> None:
        self.pool, self.config = pool, config.resolve()
        self.device = torch.device(device or "cpu")
        for name in ("arm", "utility"):
            if getattr(pool, name) is None:
                raise ValueError(f"LeadEngine: `pool.{name}` must be set (see `lead-fast prepare`), got None")
        arm = np.asarray(pool.arm)
        task = np.zeros(len(arm), np.int64) if pool.task is None else np.asarray(pool.task)
        self.num_arms = int(arm.max()) + 1 if len(arm) else 0
        self.groups = Groups(arm, task, np.asarray(pool.aside), self.num_arms, self.device)
        if not len(self.groups.rows):
            raise ValueError(f"LeadEngine: `pool` must have a row that may be chosen, got {len(pool)} rows, all set aside")
        utility = torch.from_numpy(np.asarray(pool.utility, np.float32)).to(self.device)
        if not bool(torch.isfinite(utility).all()):
            raise ValueError("LeadEngine: `pool.utility` must be finite, got NaN or inf")
        if self.config.round_tokens is not None and pool.num_tokens is None:
            raise ValueError("LeadEngine: `round_tokens` needs `pool.num_tokens`, got None")
        self.table = UtilityTable.create(utility, torch.from_numpy(arm.astype(np.int16)).to(self.device))
        self.clocks = Clocks(self.num_arms, self.device)
        self.estimator = estimator_class(self.config.estimator)(self.num_arms, self.config.adam_beta1, self.device)
        self.bandit = Bandit(self.num_arms, self.config.bandit, self.config.gamma, self.config.share)
        self.budget = min(self.config.budget_rows(len(pool)), len(self.groups.rows))
        self.num_rounds, self.num_used = 0, 0
        self.history: list[tuple[int, Tensor, Tensor]] = []  # (round, rows, utility at choice) of every round
        self._round: Round | None = None
        self._weights: WeightChange | None = None
        sizes = [len(self.groups.arm_rows(k)) for k in range(self.num_arms)]
        empty = [k for k, n in enumerate(sizes) if n == 0]
        if empty:
            logger.warning("arms without a row that may be chosen: %s; they are never drawn", empty)
        order = self._uniform(STREAM_FIRST, 0, torch.arange(self.num_arms)).argsort()
        self._first_visits = [int(k) for k in order if sizes[int(k)]] if self.config.visit_all_first else []

    # What the training loop calls.

    def track(self, weights: Iterable[Tensor]) -> None:
        """Hands over the trained parameters to estimators that follow their change (`historical`); once, before round 1."""
        if self.estimator.needs_weights:
            self._weights = WeightChange(weights, seed=self.config.seed)

    @property
    def progress(self) -> float:
        """Distinct rows used over the budget, in [0, 1]."""
        return min(1.0, self.num_used / self.budget)

    def begin_round(self) -> Round | None:
        """Draws an arm and chooses its rows; None when the budget is used or no row is left.

        Raises:
            RuntimeError: the round before was not ended, or `historical` runs without `track`.
        """
        if self._round is not None:
            raise RuntimeError(f"LeadEngine.begin_round: round {self._round.number} must be ended first (end_round)")
        if self.estimator.needs_weights and self._weights is None:
            raise RuntimeError(f"LeadEngine.begin_round: estimator {self.estimator.name!r} needs track(parameters) first")
        mask = self._arms_left()
        if self.num_used >= self.budget or not bool(mask.any()):
            return None
        number = self.num_rounds + 1
        draw = self._draw(mask, number)
        candidates, uniforms = [], []
        for arm in draw.arms:
            uniforms.append(float(self._uniform(STREAM_TASKS, number, torch.tensor([arm]))))
            candidates.append(self._choose(arm, number, uniforms[-1], len(draw.arms)))
        rows, utility = self._cut_to_budget(candidates)
        order = self._uniform(STREAM_SHUFFLE, number, rows).argsort(stable=True)
        rows, utility = rows[order], utility[order]
        self._begin_idu = utility
        self.num_used += int((self.table.uses[rows] == 0).sum())
        self.table.uses[rows] += 1
        self.num_rounds = number
        self._round = Round(number, draw.arms, rows.cpu(), utility.cpu(), draw, uniforms, candidates)
        self._rows, self._mask, self._first_step = rows, mask, self.clocks.num_steps
        self._begin_weights = None if self._weights is None else self._weights.snapshot()
        self.history.append((number, self._round.rows, self._round.utility))
        return self._round

    def observe(self, rows: Tensor, samples: SampleStatistics) -> None:
        """Takes one micro-batch's statistics, before the optimizer step it belongs to.

        Args:
            rows: int64 [S], row numbers of the pool in the order of the micro-batch's samples; -1 for a sample that is
                no row of the pool.
            samples: fp32 [S] each, from `linear_cross_entropy(...).samples` with stats="all".

        Raises:
            ValueError: wrong dtype or shape. RuntimeError: no round is open.
        """
        rnd = self._open("observe")
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise ValueError(f"LeadEngine.observe: `rows` must be int64 [S], got {rows.dtype} {list(rows.shape)}")
        if samples.loss.shape != rows.shape:
            raise ValueError(
                f"LeadEngine.observe: `samples` must have {len(rows)} entries, one a row, got {list(samples.loss.shape)}"
            )
        if rows.device.type == "cpu" and len(rows) and (int(rows.max()) >= len(self.pool) or int(rows.min()) < -1):
            raise ValueError(f"LeadEngine.observe: `rows` must be in -1..{len(self.pool) - 1}, got {rows.tolist()}")
        rows = rows.to(self.device)
        loss, tokens, grad_norm_sq = (t.to(self.device) for t in (samples.loss, samples.num_tokens, samples.grad_norm_sq))
        observe(self.table, self.clocks, self.estimator, rows, loss, tokens, grad_norm_sq, rnd.number)

    def step(self, *, lr: float, num_items: float | Tensor) -> None:
        """Advances the clocks after an optimizer step.

        Args:
            lr: the learning rate that the step used.
            num_items: supervised tokens of the whole step, over all micro-batches and ranks; number or 0-d tensor.
        """
        rnd = self._open("step")
        if not math.isfinite(lr) or lr < 0.0:
            raise ValueError(f"LeadEngine.step: `lr` must be a finite number >= 0, got {lr!r}")
        self.clocks.step(lr, num_items, rnd.arms)

    def end_round(self) -> RoundReport:
        """Closes the round: loss change and utility of its rows, the arms' rewards, the bandit, the calibration."""
        rnd, rows = self._open("end_round"), self._rows
        change = None
        if self._weights is not None and self._begin_weights is not None:
            change = (now := self._weights.snapshot()) - self._begin_weights.to(now.device)
        self.estimator.end_round(self.clocks, rnd.arms, self._first_step, change)
        table = self.table
        seen = (table.round[rows] == rnd.number) & ~table.quarantined[rows]
        end = idu(table, self.clocks, self.estimator, rows, self.config.smoothing)
        table.idu[rows] = torch.where(seen, end, table.idu[rows])
        if self.config.reward == "idu":
            gain = self._begin_idu - end
        else:
            gain = table.loss[rows] - lazy_loss(table, self.clocks, self.estimator, rows)
        in_arm = (table.arm[rows] == torch.tensor(rnd.arms, device=self.device)[:, None]) & seen
        rewards = torch.where(in_arm, gain, 0.0).sum(1) / in_arm.sum(1)
        loss = torch.where(seen, table.loss[rows], 0.0).sum() / seen.sum()
        scaled = []
        for arm, prob, reward in zip(rnd.arms, rnd.draw.probs, rewards.tolist(), strict=True):
            if math.isfinite(reward):
                scaled.append(self.bandit.update(self._mask, arm, prob, reward))
            else:
                logger.warning("round %d: no row of arm %d was observed; its reward is not counted", rnd.number, arm)
                scaled.append(0.0)
        self.clocks.end_round()
        self.estimator.calibrate(self.clocks)
        self._round = None
        return RoundReport(
            rnd, rewards, scaled, self.bandit.log_w.clone(), seen.sum(), loss, table.quarantined[rows],
            self.estimator.calibration(),
        )  # fmt: skip

    def utility(self, rows: Tensor) -> Tensor:
        """IDU of `rows` (int64 [R]) now, fp32 [R] on the engine's device."""
        return idu(self.table, self.clocks, self.estimator, rows.to(self.device), self.config.smoothing)

    # How a round is made.

    def _open(self, call: str) -> Round:
        if self._round is None:
            raise RuntimeError(f"LeadEngine.{call}: no round is open; call begin_round first")
        return self._round

    def _uniform(self, stream: int, round_number: int, counters: Tensor) -> Tensor:
        return philox_uniform(self.config.seed, stream, round_number, counters)

    def _available(self, rows: Tensor) -> Tensor:
        return (self.table.uses[rows] < self.config.max_uses) & ~self.table.quarantined[rows]

    def _arms_left(self) -> Tensor:
        return torch.tensor([bool(self._available(self.groups.arm_rows(k)).any()) for k in range(self.num_arms)])

    def _draw(self, mask: Tensor, number: int) -> Draw:
        while self._first_visits:
            arm = self._first_visits.pop(0)
            if mask[arm]:
                return self.bandit.forced(mask, arm)
        uniforms = self._uniform(STREAM_ARM, number, torch.arange(self.config.arms_per_round))
        return self.bandit.draw(mask, uniforms.tolist())

    def _choose(self, arm: int, number: int, uniform: float, num_arms: int) -> Candidates:
        """Ranks one arm's tasks and marks the rows chosen."""
        config, groups = self.config, self.groups.arm_groups[arm]
        assert config.choose is not None and config.exclude_top is not None  # resolved in __init__
        rows = self.groups.arm_rows(arm)
        group = torch.from_numpy(np.repeat(np.arange(groups.stop - groups.start), self.groups.arm_group_sizes(arm)))
        keep = self._available(rows)
        rows, group = rows[keep], group.to(self.device)[keep]
        available = torch.bincount(group, minlength=groups.stop - groups.start).cpu().numpy()
        quotas = task_quotas(available, *self._round_size(rows, num_arms), uniform)
        excluded = np.floor(config.exclude_top * available + 1e-9).astype(np.int64)
        utility = self.utility(rows)
        noise = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        if config.choose != "topk":
            noise = self._uniform(STREAM_ROWS, number, rows)
            noise = gumbel(noise) if config.choose == "softmax" else noise
        chosen = rank(
            utility, noise, group, torch.from_numpy(quotas).to(self.device), torch.from_numpy(excluded).to(self.device),
            choose=config.choose, temperature=config.temperature,
        )  # fmt: skip
        task = torch.from_numpy(self.groups.task[groups]).to(self.device)[group]
        return Candidates(rows, task, self.table.uses[rows].long(), utility, noise, chosen)

    def _round_size(self, rows: Tensor, num_arms: int) -> tuple[float, int | None]:
        """Share taken of each task, and the cap on the arm's rows, for a round over the available `rows`."""
        config = self.config
        rate, cap = config.rate, None
        if config.round_tokens is not None:
            assert self.pool.num_tokens is not None  # checked in __init__
            mean = float(np.mean(self.pool.num_tokens[rows.cpu().numpy()]))
            rate, cap = 1.0, max(1, round(config.round_tokens / num_arms / max(mean, 1.0)))
        if config.min_rounds:
            per_round = max(1, self.budget // config.min_rounds // num_arms)
            cap = per_round if cap is None else min(cap, per_round)
        return rate, cap

    def _cut_to_budget(self, candidates: list[Candidates]) -> tuple[Tensor, Tensor]:
        """The chosen rows and their utility; rows that are new beyond the budget are cut by utility, lowest first."""
        rows = torch.cat([c.row[c.chosen] for c in candidates])
        utility = torch.cat([c.utility[c.chosen] for c in candidates])
        rows, order = rows.sort()  # ties go to the lower row, whatever its task
        utility = utility[order]
        new = self.table.uses[rows] == 0
        left = self.budget - self.num_used
        if int(new.sum()) > left:
            order = torch.argsort(torch.where(new, utility, torch.inf), descending=True, stable=True)
            kept = order[: int((~new).sum()) + left].sort().values
            rows, utility = rows[kept], utility[kept]
        return rows, utility

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on identically, between rounds or inside one.

        Returns:
            Nested dicts of tensors, numbers, strings and lists; "open" is the round that is open, or None.
        """
        return {
            "version": STATE_VERSION,
            "pool": self.pool.fingerprint,
            "num_rounds": self.num_rounds,
            "num_used": self.num_used,
            "first_visits": list(self._first_visits),
            "table": self.table.state_dict(),
            "clocks": self.clocks.state_dict(),
            "estimator": self.estimator.state_dict(),
            "bandit": self.bandit.state_dict(),
            "open": self._open_state(),
            "history": {
                "round": torch.tensor([n for n, rows, _ in self.history for _ in rows], dtype=torch.int64),
                "row": torch.cat([torch.zeros(0, dtype=torch.int64), *(rows for _, rows, _ in self.history)]),
                "utility": torch.cat([torch.zeros(0), *(utility for _, _, utility in self.history)]),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()` into an engine over the same pool and configuration.

        Raises:
            ValueError: another version, another pool, or arrays of another size.
        """
        if state["version"] != STATE_VERSION:
            raise ValueError(f"LeadEngine: state `version` must be {STATE_VERSION}, got {state['version']}")
        if state["pool"] != self.pool.fingerprint:
            raise ValueError(f"LeadEngine: state `pool` must be {self.pool.fingerprint}, got {state['pool']}")
        self.table.load_state_dict(state["table"])
        self.clocks.load_state_dict(state["clocks"])
        self.estimator.load_state_dict(state["estimator"])
        self.bandit.load_state_dict(state["bandit"])
        self.num_rounds, self.num_used = int(state["num_rounds"]), int(state["num_used"])
        self._first_visits = list(state["first_visits"])
        self._load_open(state["open"])
        rounds, rows, utility = (state["history"][k] for k in ("round", "row", "utility"))
        self.history = [(n, rows[rounds == n], utility[rounds == n]) for n in rounds.unique().tolist()]

    # The open round.

    @property
    def open_round(self) -> Round | None:
        """The round that was begun and not ended; None between rounds."""
        return self._round

    def _open_state(self) -> dict[str, Any] | None:
        if (rnd := self._round) is None:
            return None
        state: dict[str, Any] = {
            "arms": rnd.arms, "rows": rnd.rows, "utility": rnd.utility, "task_uniforms": rnd.task_uniforms,
            "probs": rnd.draw.probs, "all_probs": rnd.draw.all_probs, "uniforms": rnd.draw.uniforms,
            "forced": rnd.draw.forced, "mask": self._mask, "first_step": self._first_step,
            "candidates": {str(arm): dict(vars(c)) for arm, c in zip(rnd.arms, rnd.candidates, strict=True)},
        }  # fmt: skip
        return state if self._begin_weights is None else state | {"begin_weights": self._begin_weights}

    def _load_open(self, state: dict[str, Any] | None) -> None:
        self._round = None
        if state is None:
            return
        draw = Draw(state["arms"], state["probs"], state["all_probs"].clone(), state["uniforms"], state["forced"])
        candidates = [
            Candidates(**{k: v.to(self.device) for k, v in state["candidates"][str(arm)].items()}) for arm in draw.arms
        ]
        rows, utility = state["rows"].clone(), state["utility"].clone()
        self._round = Round(self.num_rounds, draw.arms, rows, utility, draw, state["task_uniforms"], candidates)
        self._rows, self._begin_idu = rows.to(self.device), utility.to(self.device)
        self._mask, self._first_step = state["mask"].clone(), state["first_step"]
        begin = state.get("begin_weights")
        self._begin_weights = None if begin is None else begin.clone()

    def selected(self) -> list[dict[str, Any]]:
        """Each chosen row once: {"row", "id", "rounds": [...], "utility": [at each choice]}, in order of first choice."""
        chosen: dict[int, dict[str, Any]] = {}
        for number, rows, utility in self.history:
            for row, value in zip(rows.tolist(), utility.tolist(), strict=True):
                entry = chosen.setdefault(row, {"id": self.pool.id(row), "row": row, "rounds": [], "utility": []})
                entry["rounds"].append(number)
                entry["utility"].append(value)
        return list(chosen.values())

    def export(self, path: str | Path) -> None:
        """Writes the chosen subset as JSONL: the rows' messages where the pool has text, with rounds and utilities."""
        entries = self.selected()
        if self.pool.has_text:
            # Not "utility": the file is a pool again, and there the name is a row's one first utility.
            extra = [{"rounds": e["rounds"], "utility_at_choice": e["utility"]} for e in entries]
            self.pool.export_jsonl([e["row"] for e in entries], path, extra=extra)
            return
        write_jsonl(path, entries)
