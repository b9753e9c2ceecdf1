"""LEAD's rounds as the stream of micro-batches that a host's training loop reads.

A round is a barrier: its micro-batches fill whole optimizer steps, and the next round is drawn only when the host asks for
a batch after the last step of this one was taken and the round was closed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from lead_fast.device import copy_to_host
from lead_fast.engine import LeadEngine
from lead_fast.ops import SampleStats
from lead_fast.packing import PackedBatch, Sample, pack, without_supervision
from lead_fast.ranks import Ranks
from lead_fast.rounds import Round

logger = logging.getLogger(__name__)

STATE_FORMAT = 2
_COUNTS = ("num_tokens", "num_items", "num_barren")
_POSITION = ("used_before", "steps_done", *_COUNTS)
_POOL_ARRAYS = ("arm", "task", "utility", "num_tokens", "aside")
_OTHER_LOSSES = 0.1  # of the mean utility: rounding and dropout are below it, another model or other masks above


@dataclass
class OpenRound:
    """The round that is being trained, and the position in it.

    Attributes:
        round: as the engine chose it.
        used_before: distinct rows used before it.
        micro_batches: rows of each micro-batch; `accumulation` of each process make an optimizer step, whose first may be
            empty.
        num_steps, steps_done: optimizer steps of the round, and those taken.
        num_tokens, num_items: tokens and supervised tokens that this process trained on.
        num_barren: its rows so far without a supervised token.
        step_tokens, step_items: tokens and supervised tokens of the step that is under way: of a checkpoint in its middle they
            are no part, since it is made again.
    """

    round: Round
    used_before: int
    micro_batches: list[list[int]]
    num_steps: int
    steps_done: int = 0
    num_tokens: int = 0
    num_items: int = 0
    num_barren: int = 0
    step_tokens: int = 0
    step_items: int = 0


class HostRounds:
    """The engine behind a host's loop: micro-batches out, statistics and steps in.

    Args:
        engine: chooses the rows.
        samples_of: tokenized samples of rows of the pool, in their order.
        batch_size: samples of a micro-batch, at most.
        accumulation: micro-batches of an optimizer step, exactly, in each process.
        ranks: the processes, to which the micro-batches of a step are dealt in turn.

    Attributes:
        open: the round that is being trained; None between rounds.
    """

    def __init__(
        self,
        engine: LeadEngine,
        samples_of: Callable[[Sequence[int]], list[Sample]],
        batch_size: int,
        accumulation: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.engine, self.samples_of, self.ranks = engine, samples_of, ranks or Ranks()
        self.batch_size, self.accumulation = batch_size, accumulation
        self.open: OpenRound | None = None
        self._untrained: list[tuple[torch.Tensor, torch.Tensor]] = []  # rows and losses before the first optimizer step

    # The stream.

    def begin(self) -> bool:
        """Draws the next round; False when the budget is used or no row is left."""
        used = self.engine.num_used
        rnd = self.engine.begin_round()
        if rnd is None:
            return False
        self.open = self._opened(rnd, used)
        return True

    def batches(self) -> Iterator[dict[str, Any]]:
        """This process's micro-batches of the open round, from its position on: fields of `PackedBatch`, on the CPU.

        One without rows has none in a process that is alone. Of several, all take part in each exchange of gradients: there it
        is a sample without supervision.
        """
        opened = self._open("batches")
        ahead = self.ranks.share(opened.micro_batches[opened.steps_done * self.step_parts :])
        samples = iter(self.samples_of([row for rows in ahead for row in rows]))
        for rows in ahead:
            if rows:
                own = [next(samples) for _ in rows]
                opened.num_barren += sum(not sample.supervised[1:].any() for sample in own)
                yield dict(vars(pack(own, rows)))
            elif self.ranks.world > 1:
                yield dict(vars(without_supervision(pack(self.samples_of([int(opened.round.rows[0])])))))
            else:
                nothing = torch.zeros(0, dtype=torch.int64)
                yield {"input_ids": nothing, "rows": nothing, "num_items": 0}

    @property
    def step_parts(self) -> int:
        """Micro-batches of an optimizer step, of all processes."""
        return self.accumulation * self.ranks.world

    def observe(self, batch: PackedBatch, samples: SampleStats) -> None:
        """Takes the statistics of one micro-batch, before the optimizer step it belongs to."""
        opened = self._open("observe")
        loss, num_tokens = samples.loss, samples.num_tokens
        if opened.num_barren:  # what nothing is to be learned of is not chosen again
            none = (num_tokens == 0) & (batch.rows >= 0)
            loss, num_tokens = loss.masked_fill(none, math.nan), num_tokens.masked_fill(none, 1.0)
        self.engine.observe(batch.rows, samples._replace(loss=loss, num_tokens=num_tokens))
        if not batch.num_items:
            return
        if self.engine.clocks.num_steps == 0:
            self._untrained.append((batch.rows, loss.clone()))
        opened.step_tokens += batch.num_tokens
        opened.step_items += batch.num_items

    def step(self, lr: float, num_items: int) -> None:
        """Takes an optimizer step: the learning rate it used, 0 where it was left out, and its supervised tokens."""
        opened = self._open("step")
        self.engine.step(lr=lr, num_items=num_items)
        opened.steps_done += 1
        opened.num_tokens += opened.step_tokens
        opened.num_items += opened.step_items
        opened.step_tokens = opened.step_items = 0

    def end(self) -> dict[str, float]:
        """Closes the round.

        Returns:
            Its metrics under stable names; those that are not finite (no reward, no loss) are left out.
        """
        opened, engine = self._open("end"), self.engine
        report = engine.end_round()
        if num_barren := self.ranks.sum_of(opened.num_barren):
            logger.warning(
                "round %d: %d of its %d rows have no supervised token: never chosen again", report.number, num_barren,
                len(opened.round),
            )  # fmt: skip
        self._compare_utilities()
        num_tokens, num_items = self.ranks.sum_of(opened.num_tokens), self.ranks.sum_of(opened.num_items)
        self.open = None
        metrics: dict[str, float] = {
            "lead/round": report.number,
            "lead/arm": report.arm,
            "lead/reward": report.reward,
            "lead/scaled_reward": report.scaled_rewards[0],
            "lead/mean_loss": report.mean_loss,
            "lead/samples": report.num_samples,
            "lead/quarantined": report.num_quarantined - num_barren,
            "lead/steps": opened.steps_done,
            "lead/tokens": num_tokens,
            "lead/supervised_tokens": num_items,
            "lead/rows_used": engine.num_used,
            "lead/progress": engine.progress,
        }
        metrics |= {f"lead/prob_{arm}": prob for arm, prob in enumerate(report.probs.tolist())}
        numbers = {name: value for name, value in report.calibration.items() if isinstance(value, int | float)}
        metrics |= {f"lead/calibration_{name}": value for name, value in numbers.items()}
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def _compare_utilities(self) -> None:
        """Warns where the losses of the model that came are not those that the pool's utilities say."""
        columns = copy_to_host(*(torch.cat(column) for column in zip(*self._untrained, strict=True)))
        self._untrained = []
        if not columns:
            return
        rows, observed = (column.numpy() for column in columns)
        said = np.asarray(self.engine.pool.utility)[rows[(seen := (rows >= 0) & np.isfinite(observed))]]
        if not len(said) or not self.ranks.is_first:
            return
        difference = float(np.abs(observed[seen] - said).mean())
        if difference > _OTHER_LOSSES * float(np.abs(said).mean()):
            logger.warning(
                "before any training, %d samples have a loss of %.3f on average, and `pool.utility` says %.3f (they differ by "
                "%.3f): was it measured with another model (the one to train is in the prepared pool's folder), other prompts "
                "or other masks?", len(said), float(observed[seen].mean()), float(said.mean()), difference,
            )  # fmt: skip

    # How far.

    @property
    def progress(self) -> float:
        """Distinct rows used over the budget, those of the open round counted step by step; in [0, 1]."""
        used = float(self.engine.num_used)
        if self.open is not None:
            used = self.open.used_before + (used - self.open.used_before) * self.open.steps_done / self.open.num_steps
        return min(1.0, used / self.engine.budget)

    def rows_per_round(self) -> int:
        """Rows that a round has, if arms are drawn alike."""
        engine, config = self.engine, self.engine.config
        sizes = engine.groups.group_sizes
        if config.round_tokens is not None:
            rows = config.round_tokens / max(1.0, float(np.mean(np.asarray(engine.pool.num_tokens))))
        else:
            quotas = np.minimum(np.maximum(np.ceil(config.rate * sizes - 1e-9), 1), sizes)
            rows = config.arms_per_round * quotas.sum() / np.count_nonzero(engine.groups.arm_sizes)
        if config.min_rounds:
            rows = min(rows, engine.budget // config.min_rounds)
        return min(max(1, round(rows)), engine.budget)

    def estimated_steps(self) -> int:
        """Optimizer steps that the budget takes, if arms are drawn alike and no row is drawn twice."""
        rows = self.rows_per_round()
        return math.ceil(self.engine.budget / rows) * self._num_steps(rows)

    def most_steps(self) -> int:
        """Optimizer steps that no run exceeds: one for each use of each row."""
        return self.engine.groups.num_choosable * self.engine.config.max_uses

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Engine and position, between rounds or inside one, at a boundary of optimizer steps; for `save_state`."""
        position = None if self.open is None else {name: getattr(self.open, name) for name in _POSITION}
        if position is not None:  # counted by each process
            position |= {name: self.ranks.sum_of(position[name]) for name in _COUNTS}
        state = {"format": STATE_FORMAT, "settings": self._settings(), "engine": self.engine.state_dict(), "position": position}
        return state | {"date": getattr(self.samples_of, "date", None)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()` into rounds made as they were made for it.

        Raises:
            ValueError: another pool, configuration or batch size.
        """
        settings = self._settings()
        if state["format"] != STATE_FORMAT:
            raise ValueError(f"resume: expected a state of format {STATE_FORMAT}, got {state['format']}")
        changed = [
            f"{name} (began with {state['settings'].get(name)!r}, got {value!r})"
            for name, value in settings.items()
            if state["settings"].get(name) != value
        ]
        if changed:
            raise ValueError(f"resume: a run goes on with the settings it began with, but {', '.join(changed)} changed")
        self.engine.load_state_dict(state["engine"])
        if state.get("date") is not None:
            self.samples_of.date = state["date"]  # pyright: ignore[reportFunctionMemberAccess]
        self.open, rnd = None, self.engine.open_round
        if rnd is not None:
            position = state["position"] if self.ranks.is_first else state["position"] | dict.fromkeys(_COUNTS, 0)
            self.open = dataclasses.replace(self._opened(rnd, 0), **position)

    def _settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.engine.pool.fingerprint.encode())
        for name in _POOL_ARRAYS:
            if (array := getattr(self.engine.pool, name)) is not None:
                digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
        own = {"pool": digest.hexdigest(), "batch_size": self.batch_size, "accumulation": self.accumulation}
        own["processes"] = self.ranks.world
        return own | dataclasses.asdict(self.engine.config)

    def _open(self, call: str) -> OpenRound:
        if self.open is None:
            raise RuntimeError(f"HostRounds.{call}: no round is open")
        return self.open

    def _opened(self, rnd: Round, used_before: int) -> OpenRound:
        rows = rnd.rows.tolist()
        num_steps = self._num_steps(len(rows))
        parts = num_steps * self.step_parts
        bounds = [len(rows) * i // parts for i in range(parts + 1)]  # even; a part that is empty is never a step's last
        micro_batches = [rows[start:end] for start, end in pairwise(bounds)]
        return OpenRound(rnd, used_before, micro_batches, num_steps)

    def _num_steps(self, num_rows: int) -> int:
        return math.ceil(num_rows / (self.batch_size * self.step_parts))
