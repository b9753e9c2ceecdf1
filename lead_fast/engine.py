"""`LeadEngine`: rounds of selection around any training loop (section 7).

begin_round  draw an arm, choose rows in its tasks, return them        (one copy to the host)
observe      per micro-batch: the loss's own statistics into the table (no sync)
step         per optimizer step: its learning rate and supervised tokens advance the clocks
end_round    loss change, utility, reward, bandit, calibration; the report is read lazily
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import lead_fast.first_order  # noqa: F401  registers an estimator by name
from lead_fast.bandit import Bandit
from lead_fast.config import LeadConfig
from lead_fast.device import copy_to_device, copy_to_host, to_device, to_fp32
from lead_fast.estimators import keeps_grad_norm
from lead_fast.files import write_jsonl
from lead_fast.pool import Pool
from lead_fast.ranks import Observation, Shards, observations_of
from lead_fast.reference_state import CHOOSE, STREAM_ARM, STREAM_FIRST, STREAM_ROWS, STREAM_TASKS
from lead_fast.rng import philox_uniform
from lead_fast.rounds import OpenRound, Round, RoundReport, SampleStatistics
from lead_fast.selection import Candidates, Groups, arranged, candidate_positions, rows_aside
from lead_fast.utility import (
    Clocks,
    LossChangeEstimator,
    UtilityTable,
    WeightChange,
    end_round,
    estimator_class,
    has_own_drop,
    show,
    utility,
)
from lead_fast.visits import begin_record

logger = logging.getLogger(__name__)

STATE_VERSION = 6


class LeadEngine:
    """LEAD around any training loop.

    Args:
        pool: rows with `arm` and `utility` (first utility); `task` and `difficulty` where known. The engine holds arrays
            only, never text.
        config: how to choose.
        device: where the table lives: the training device; None is the CPU.
        group: the processes that train together, each on its own share of a round's rows; None is this process alone.
            All must make the same calls; the shares are merged when the round ends.

    Attributes:
        record_candidates: rounds carry their candidates. Waits for the device once a round.
        record_visits: reports carry each observation beside its predictions.

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

    def __init__(
        self, pool: Pool, config: LeadConfig, device: torch.device | str | None = None, *, group: ProcessGroup | None = None
    ) -> None:
        self.pool, self.config = pool, config.resolve()
        self.device = torch.device(device or "cpu")
        for name in ("arm", "utility"):
            if getattr(pool, name) is None:
                raise ValueError(f"LeadEngine: `pool.{name}` must be set (see `lead-fast prepare`), got None")
        arm = np.asarray(pool.arm)
        task = np.zeros(len(arm), np.int32) if pool.task is None else np.asarray(pool.task)
        self.num_arms = int(arm.max()) + 1 if len(arm) else 0
        aside = rows_aside(np.asarray(pool.aside), pool.difficulty, str(self.config.hard_rows))
        self.groups = Groups(arm, task, aside, self.num_arms, self.device)
        if not self.groups.num_choosable:
            raise ValueError(f"LeadEngine: `pool` must have a row that may be chosen, got {len(pool)} rows, all set aside")
        first_utility = np.asarray(pool.utility, np.float32)
        if not np.isfinite(first_utility).all():
            raise ValueError("LeadEngine: `pool.utility` must be finite, got NaN or inf")
        self._num_tokens: Tensor | None = None
        if self.config.round_tokens is not None:
            if pool.num_tokens is None:
                raise ValueError("LeadEngine: `round_tokens` needs `pool.num_tokens`, got None")
            by_row = torch.from_numpy(np.asarray(pool.num_tokens).astype(np.int32))
            self._num_tokens = by_row.to(self.device)[self.groups.rows]
        self.table = UtilityTable(torch.from_numpy(first_utility), self.groups)
        self.clocks = Clocks(self.num_arms, self.device)
        self.estimator = self._make_estimator(self.config.estimator)
        self.estimators = {self.config.estimator: self.estimator}  # and shadows, which watch only
        self.bandit = Bandit(self.num_arms, self.config.bandit, self.config.gamma, self.config.share, self.device)
        self.budget = min(self.config.budget_rows(len(pool)), self.groups.num_choosable)
        self.num_rounds, self.num_used = 0, 0
        self.record_candidates, self.record_visits = False, False
        self.history: list[tuple[int, Tensor, Tensor]] = []  # (round, rows, utility at choice) of every round
        self._shards = None if group is None else Shards(group)
        self._draws = torch.arange(max(1, self.config.arms_per_round), device=self.device)
        self._round: Round | None = None
        self._weights: WeightChange | None = None
        sizes = self.groups.arm_sizes
        empty = [k for k, n in enumerate(sizes) if n == 0]
        if empty:
            logger.warning("arms without a row that may be chosen: %s; they are never drawn", empty)
        order = philox_uniform(self.config.seed, STREAM_FIRST, 0, torch.arange(self.num_arms)).argsort()
        self._first_visits = [int(k) for k in order if sizes[int(k)]] if self.config.visit_all_first else []

    # What the training loop calls.

    def track(self, weights: Iterable[Tensor]) -> None:
        """Hands over the trained parameters to estimators that follow their change (`historical`); once, before round 1."""
        if any(estimator.needs_weights for estimator in self.estimators.values()):
            self._weights = WeightChange(weights, seed=self.config.seed)

    def shadow(self, names: Iterable[str]) -> None:
        """Adds estimators that watch the same table and never influence a choice; before `track` and round 1.

        Args:
            names: registered estimators; the one that chooses and those that watch already are passed over.

        Raises:
            ValueError: no estimator has such a name. RuntimeError: a round was begun.
        """
        if self.num_rounds:
            raise RuntimeError(f"LeadEngine.shadow: must be called before round 1, got round {self.num_rounds}")
        for name in names:
            shadow = self._make_estimator(name)
            self.estimators.setdefault(name, shadow)

    @property
    def open_round(self) -> Round | None:
        """The round that was begun and not ended; None between rounds."""
        return self._round

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
        following = [name for name, estimator in self.estimators.items() if estimator.needs_weights]
        if following and self._weights is None:
            raise RuntimeError(f"LeadEngine.begin_round: estimator {following[0]!r} needs track(parameters) before round 1")
        while self.num_used < self.budget:
            forced = self._first_visits.pop(0) if self._first_visits else None
            if self._choose(self.num_rounds + 1, forced):
                return self._round
            if forced is None:
                break  # a drawn arm always has rows: none is left at all
        return None

    def observe(self, rows: Tensor, samples: SampleStatistics) -> None:
        """Takes one micro-batch's statistics, before the optimizer step it belongs to.

        Args:
            rows: int64 [S], row numbers of the pool in the order of the micro-batch's samples; -1 for a sample that is
                no row of the pool.
            samples: fp32 [S] each, from `linear_cross_entropy(...).samples` with stats="all".

        Raises:
            ValueError: wrong dtype or shape, or, on a CPU, a row number out of range; on a GPU its entry is ignored and
                counted. RuntimeError: no round is open.
        """
        self._open("observe")
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"LeadEngine.observe: `rows` must be an int64 tensor [S], got {got}")
        if samples is None:
            raise ValueError("LeadEngine.observe: `samples` must be those of a loss with stats='all', got None")
        loss, num_tokens, grad_norm_sq = samples.loss, samples.num_tokens, samples.grad_norm_sq
        if loss.shape != rows.shape:
            raise ValueError(f"LeadEngine.observe: `samples` must have {len(rows)} entries, one a row, got {list(loss.shape)}")
        rows = to_device(rows, self.device)
        loss, num_tokens, grad_norm_sq = (to_fp32(t, self.device) for t in (loss, num_tokens, grad_norm_sq))
        observation = Observation(self.clocks.num_steps, rows, loss, num_tokens, grad_norm_sq)
        if self._shards is not None:
            self._shards.add(observation)
            return
        self._take(observation)

    def step(self, *, lr: float, num_items: float | Tensor) -> None:
        """Advances the clocks after an optimizer step.

        Args:
            lr: the learning rate that the step used.
            num_items: supervised tokens of the whole step, over all micro-batches and ranks; number or 0-d tensor.

        Raises:
            ValueError: a number that is negative or not finite (a tensor is not looked at). RuntimeError: no round is open.
        """
        self._open("step")
        for name, value in (("lr", lr), ("num_items", num_items)):
            if not isinstance(value, Tensor) and not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"LeadEngine.step: `{name}` must be a finite number >= 0, got {value!r}")
        self.clocks.step(lr, num_items, self._at.arms)

    def end_round(self) -> RoundReport:
        """Closes the round: loss change and utility of its rows, the arms' rewards, the bandit, the calibration."""
        rnd, table, clocks = self._open("end_round"), self.table, self.clocks
        rows, begin_idu, arms, arm_probs, mask, first_step, begin_weights, visits = self._at
        if self._shards is not None:
            for observation in self._shards.merge(self.device):
                self._take(observation)
        change = None
        if self._weights is not None and begin_weights is not None:
            change = (now := self._weights.snapshot()) - begin_weights.to(now.device)
        for estimator in self.estimators.values():
            estimator.end_round(clocks, arms, first_step, change)
        rewards, summary, quarantined = end_round(
            table, clocks, self.estimator, rows, begin_idu, arms, self.config.smoothing,
            fall_of_utility=self.config.reward == "idu",
        )  # fmt: skip
        scaled = self.bandit.update(mask, arms, arm_probs, rewards)
        for estimator in self.estimators.values():
            estimator.calibrate(clocks)
        self._round = None
        return RoundReport(
            rnd, rewards=rewards, scaled=scaled, log_weights=self.bandit.log_w, summary=summary,
            quarantined=quarantined, estimator=self.estimator, snapshot=self.estimator.snapshot(clocks),
            visits=visits if self.record_visits else None, paired=self._paired,
        )  # fmt: skip

    def utility(self, rows: Tensor) -> Tensor:
        """IDU of `rows` (int64 [R]) now, fp32 [R] on the engine's device."""
        return utility(self.table, self.clocks, self.estimator, to_device(rows, self.device), self.config.smoothing)[0]

    def predicted_loss(self, rows: Tensor, estimator: str | None = None) -> Tensor:
        """Loss of `rows` (int64 [R]) now by the main estimator or by one that shadows it, without a forward pass: fp32 [R].

        Raises:
            ValueError: no estimator of that name watches.
        """
        name = self.config.estimator if estimator is None else estimator
        if name not in self.estimators:
            known = ", ".join(self.estimators)
            raise ValueError(f"LeadEngine.predicted_loss: `estimator` must be one of {known}, got {name!r}")
        return utility(self.table, self.clocks, self.estimators[name], to_device(rows, self.device), self.config.smoothing)[1]

    # How a round is made.

    def _open(self, call: str) -> Round:
        if self._round is None:
            raise RuntimeError(f"LeadEngine.{call}: no round is open; call begin_round first")
        return self._round

    def _make_estimator(self, name: str) -> LossChangeEstimator:
        return estimator_class(name)(self.num_arms, self.config.adam_beta1, self.device)

    @cached_property
    def _hooked(self) -> list[LossChangeEstimator]:
        """Estimators with a `pair` of their own."""
        return [e for e in self.estimators.values() if type(e).pair is not LossChangeEstimator.pair]

    @cached_property
    def _paired(self) -> str | None:
        """The estimator whose drops `observe` itself records."""
        return next((name for name, estimator in self.estimators.items() if keeps_grad_norm(estimator)), None)

    @cached_property
    def _others(self) -> dict[str, LossChangeEstimator]:
        return {name: estimator for name, estimator in self.estimators.items() if name != self._paired}

    @cached_property
    def _pair_state(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states = [state for e in self.estimators.values() if (state := e.pair_state()) is not None]
        if len(states) > 1:
            raise ValueError(f"LeadEngine: one estimator may have a pair_state, got {len(states)} of {list(self.estimators)}")
        return states[0] if states else (None, None, None)

    def _take(self, observation: Observation) -> None:
        """Lets hooks see an observation, and then the table take it, at the step it was made."""
        table, clocks = self.table, self.clocks
        step, rows, loss, num_tokens, grad_norm_sq = observation
        now, steps = None, clocks.num_steps
        if step != steps:  # of a round that went on since
            now, clocks.num_steps = torch.full((1,), step, device=self.device), step
        # Recorded first: a hook may learn from what is then no prediction any more.
        record = begin_record(table, clocks, self._others, rows) if self.record_visits else None
        if self._hooked:
            show(self._hooked, table, clocks, rows, loss, num_tokens)
        try:
            torch.ops.lead_fast.observe(
                rows, loss, num_tokens, grad_norm_sq, now, table.position, table.arm, table.values, table.seen, table.flags,
                table.left, clocks.counters, clocks.clock, clocks.unit, *self._pair_state, self.config.adam_beta1,
                self.config.max_uses, self.groups.num_choosable, None if record is None else record["before"],
            )  # fmt: skip
        except RuntimeError as error:  # what compiled kernels raise for a row number out of range
            raise ValueError(f"LeadEngine.{error}") from error
        finally:
            clocks.num_steps = steps
        if record is not None:
            self._at.visits.append(record)

    @property
    def _shadows(self) -> dict[str, LossChangeEstimator]:
        return {name: e for name, e in self.estimators.items() if e is not self.estimator}

    def _choose(self, number: int, forced: int | None) -> bool:
        """Opens round `number` on the arm `forced`, or on arms drawn now; False where that gives no row."""
        config, table = self.config, self.table
        mask = table.left > 0
        num_draws = config.arms_per_round
        if num_draws > 1:
            num_draws = max(1, min(num_draws, int(mask.sum())))  # how many arms share a round decides its size
        uniforms = philox_uniform(config.seed, STREAM_ARM, number, self._draws[:num_draws])
        if forced is None:
            arms, arm_probs, probs = self.bandit.draw(mask, uniforms)
        else:
            # A visit that was not drawn: probability 1 for the update, the bandit's own in the log.
            arms, probs = torch.full((1,), forced, device=self.device), self.bandit.probs(mask)
            arm_probs, num_draws = torch.ones(1, dtype=torch.float64, device=self.device), 1
        rate, cap, token_budget = self._round_size(num_draws)
        capacity = self.groups.most_chosen(rate, cap)
        candidates = [self._candidates(arm, number) for arm in arms.tolist() if arm >= 0] if self.record_candidates else []
        own_drop = has_own_drop(self.estimator)
        given = to_fp32(self.utility(table.rows.long()), self.device) if own_drop else None
        coefficients = self.estimator.coefficients(self.clocks)
        assert config.choose is not None and config.exclude_top is not None  # resolved in __init__
        chosen = [
            torch.ops.lead_fast.rank(
                arms[i : i + 1], self.groups.offsets, self.groups.arm_groups, table.rows, table.values, table.seen,
                table.flags, coefficients, self.estimator.by_round, given, self._num_tokens, config.smoothing, rate, cap,
                token_budget, config.exclude_top, CHOOSE[config.choose], config.temperature, config.seed, number,
                config.max_uses, int(self.groups.arm_sizes.max()), capacity,
            )
            for i in range(num_draws)
        ]  # fmt: skip
        host = copy_to_host(arms, probs, uniforms, *(column for columns in chosen for column in columns))
        drawn = [i for i, arm in enumerate(host[0].tolist()) if arm >= 0]
        columns = [host[3 + 3 * i : 6 + 3 * i] for i in drawn]
        if not any(len(rows) and int(rows[0]) >= 0 for rows, _, _ in columns):
            return False
        if candidates:
            taken = {row for rows, _, _ in columns for row in rows.tolist()}
            candidates = [c.marked(taken) for c in candidates]
        rows, idu, num_new = arranged(columns, self.budget - self.num_used, config.seed, number)
        tasks = philox_uniform(config.seed, STREAM_TASKS, number, host[0])

        self.num_used += num_new
        self.num_rounds = number
        self._round = Round(
            number=number, arms=[int(host[0][i]) for i in drawn], rows=rows, utility=idu, probs=host[1],
            uniforms=[] if forced is not None else [float(host[2][i]) for i in drawn], forced=forced is not None,
            task_uniforms=[float(tasks[i]) for i in drawn], candidates=candidates,
        )  # fmt: skip
        on_device, begin_idu = copy_to_device([rows, idu], self.device)
        begin_weights = None if self._weights is None else self._weights.snapshot()
        self._at = OpenRound(on_device, begin_idu, arms, arm_probs, mask, self.clocks.num_steps, begin_weights, [])
        table.choose(on_device, config.max_uses)
        self.history.append((number, rows, idu))
        return True

    def _round_size(self, num_arms: int) -> tuple[float, int, float]:
        """Of a round over `num_arms` arms: share taken of each task, cap on an arm's rows (-1: none), an arm's tokens (0: by
        share)."""
        config = self.config
        rate, cap, tokens = config.rate, -1, 0.0
        if config.min_rounds:
            cap = max(1, self.budget // config.min_rounds // num_arms)
        if config.round_tokens is not None:
            # A row has at least one token, so this bounds the rows.
            rate, tokens = 1.0, config.round_tokens / num_arms
            most = max(1, round(tokens))
            cap = most if cap < 0 else min(cap, most)
        return rate, cap, tokens

    def _candidates(self, arm: int, number: int) -> Candidates:
        config = self.config
        at, task, uses = candidate_positions(self.groups, self.table.flags, arm, config.max_uses)
        rows = self.table.rows[at].long()
        noise = torch.zeros(len(rows), dtype=torch.float64)
        if config.choose != "topk":
            noise = philox_uniform(config.seed, STREAM_ROWS, number, rows.cpu())
            noise = -torch.log(-torch.log(noise)) if config.choose == "softmax" else noise
        none = torch.zeros(len(rows), dtype=torch.bool)
        return Candidates(rows.cpu(), task, uses.cpu(), self.utility(rows).cpu(), noise, none)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on identically, between rounds or inside one.

        Returns:
            Nested dicts of tensors, numbers, strings and lists; "open" is the round that is open, or None. Of several
            processes, all must call it inside a round, and each gets the whole.
        """
        open_round: dict[str, Any] | None = None
        if self._round is not None:
            open_round = {"round": self._round.state_dict(), "device": self._at.state_dict(), "shards": {}}
            if self._shards is not None:
                open_round["shards"] = self._shards.state_dict(self.device)
        return {
            "version": STATE_VERSION,
            "pool": self.pool.fingerprint,
            "positions": self.groups.digest,
            "estimators": list(self.estimators),
            "num_rounds": self.num_rounds,
            "num_used": self.num_used,
            "first_visits": list(self._first_visits),
            "table": self.table.state_dict(),
            "clocks": self.clocks.state_dict(),
            "estimator": self.estimator.state_dict(),
            "shadows": {name: shadow.state_dict() for name, shadow in self._shadows.items()},
            "bandit": self.bandit.state_dict(),
            "open": open_round,
            "history": {
                "round": torch.tensor([n for n, rows, _ in self.history for _ in rows], dtype=torch.int64),
                "row": torch.cat([torch.zeros(0, dtype=torch.int64), *(rows for _, rows, _ in self.history)]),
                "utility": torch.cat([torch.zeros(0), *(values for _, _, values in self.history)]),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()` into an engine over the same pool and configuration.

        Raises:
            ValueError: another version, another pool or other arms of it, or other estimators; nothing has changed then.
        """
        # Of one pool in one order, all arrays have one size.
        for name, expected in (
            ("version", STATE_VERSION), ("pool", self.pool.fingerprint), ("positions", self.groups.digest),
            ("estimators", list(self.estimators)),
        ):  # fmt: skip
            if (got := state.get(name)) != expected:
                also = {
                    "positions": ": the pool's arms, tasks or rows set aside have changed",
                    "estimators": ": who watches stays (with --audit-every, `historical` does where weights are whole)",
                }.get(name, "")
                raise ValueError(f"LeadEngine: state `{name}` must be {expected}, got {got}{also}")
        self.table.load_state_dict(state["table"])
        self.clocks.load_state_dict(state["clocks"])
        self.estimator.load_state_dict(state["estimator"])
        for name, shadow in self._shadows.items():
            shadow.load_state_dict(state["shadows"][name])
        self.bandit.load_state_dict(state["bandit"])
        self.num_rounds, self.num_used = int(state["num_rounds"]), int(state["num_used"])
        self._first_visits = list(state["first_visits"])
        self._round = None
        if state["open"] is not None:
            self._round = Round.from_state(state["open"]["round"])
            self._at = OpenRound.from_state(state["open"]["device"], self.device)
            shards = state["open"]["shards"]
            if self._shards is not None:
                self._shards.load_state_dict(shards, self.device)
            else:
                for observation in observations_of(shards, self.device):
                    self._take(observation)
        rounds, rows, values = (state["history"][k] for k in ("round", "row", "utility"))
        self.history = [(n, rows[rounds == n], values[rounds == n]) for n in rounds.unique().tolist()]

    def selected(self) -> list[dict[str, Any]]:
        """Each chosen row once: {"row", "id", "rounds": [...], "utility": [at each choice]}, in order of first choice."""
        chosen: dict[int, dict[str, Any]] = {}
        for number, rows, values in self.history:
            for row, value in zip(rows.tolist(), values.tolist(), strict=True):
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
