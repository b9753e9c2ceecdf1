"""The published LEAD loop (HKUSTDial/LEAD, `src/online/run_lead.py`) on this project's engine, in its own vocabulary.

A copy of that loop keeps its model, tokenization, optimizer and schedule. Its bandit, its per-task filter over the pool and
its `acc_loss` array become calls of `OfficialLead`:

| published | here |
|---|---|
| `task_exp3s = EXP3S(...)`, `acc_loss = np.array(...)` | `lead = OfficialLead.open(path, beta=args.beta, b=args.b, ...)` |
| `task_exp3s.select_arm()` | `lead.select_arm()`, None when the run is complete |
| `for task_id in task_dict[...]: lm_datasets["train"].filter(...)` | `lead.select_samples()`: `dataset_id`s to train on |
| `entropy_loss = cross_entropy(logit, labels)` | `lead.sample_losses(logits, labels)` |
| `acc_loss[...] = entropy_loss.item() - ...` | `lead.observe(dataset_ids, losses, num_tokens)` |
| after `optimizer.step()`: - | `lead.step(lr, num_items)` |
| `task_exp3s.update(current_task, reward)` | `lead.update()` |

Where the published code and the paper disagree the paper is followed; `Compat` turns each of the code's ways on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lead_fast.config import LeadConfig
from lead_fast.engine import LeadEngine
from lead_fast.files import write_jsonl
from lead_fast.ops import SampleStats
from lead_fast.packing import IGNORE_INDEX
from lead_fast.pool import Pool
from lead_fast.rounds import RoundReport


@dataclass(frozen=True, kw_only=True)
class Compat:
    """What the published code does where the paper says otherwise, one switch each. All off: the paper.

    Not reproduced: drawing an arm that has nothing left, and the min-max scaling of rewards, which divides by zero once the
    reward is always 0; what NumPy draws without a seed.
    """

    zero_reward: bool = False
    """Code: the reward is never accumulated, so it is 0 and the bandit stays uniform. Paper: mean fall of the utility."""

    no_loss_change: bool = False
    """Code: the cosine is taken between two norms, so it is 1 and the change of the loss is 0. Paper: between the vectors."""

    unshifted_loss: bool = False
    """Code: the utility's loss scores each token with the logits that have seen it. Paper: the training loss, shifted."""

    no_smoothing: bool = False
    """Code: b is read and not used, so utilities have no history. Paper: exponential smoothing with b."""

    skip_small_tasks: bool = False
    """Code: a task gives int(rate * rows) rows, so one below 1 / rate rows gives none. Paper: a share of each task. Here such
    tasks (by the rows they begin with) are never chosen; larger ones still round up."""

    count_repeats: bool = False
    """Code: every selection counts toward the budget, and the last round is not cut. Paper: distinct rows."""


class OfficialLead:
    """The published loop's selection: select an arm, select its samples, tell their losses, update.

    Args:
        pool: of `Pool.from_official`, or any with arm, task and utility.
        dataset_ids: [N] distinct integers, the loop's names of the rows; None is 0..N-1.
        sample_rate: share of each task's rows chosen in a round.
        selected_top_number: rows to use, the budget.
        beta: the bandit's exploration, as the published script calls it.
        b: smoothing.
        max_uses: rounds that a row may be chosen in.
        seed: of the engine's random numbers.
        compat: which of the published code's ways to take; None is the paper.
        device: where the engine's table lives; None is the CPU.

    Attributes:
        dataset_ids: int64 [N].
        engine: what decides. pool: with what the switches set aside. num_selected: rows chosen so far, repeats counted.

    Raises:
        ValueError: a wrong argument, or no row that may be chosen.
    """

    def __init__(
        self, pool: Pool, dataset_ids: Sequence[int] | None = None, *, sample_rate: float = 0.015,
        selected_top_number: int = 15000, beta: float = 0.1, b: float = 0.1, max_uses: int = 4, seed: int = 42,
        compat: Compat | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        self.compat = compat = compat or Compat()
        try:
            ids = np.arange(len(pool)) if dataset_ids is None else np.asarray(dataset_ids, np.int64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"OfficialLead: `dataset_ids` must be {len(pool)} distinct integers, got others: {error}"
            ) from error
        if ids.shape != (len(pool),) or len(np.unique(ids)) != len(ids):
            raise ValueError(f"OfficialLead: `dataset_ids` must be {len(pool)} distinct integers, got {len(np.unique(ids))}")
        self.dataset_ids, self._row_of = ids, {int(name): row for row, name in enumerate(ids)}
        self.num_selected, self.selected_top_number = 0, selected_top_number
        self.pool = _without_small_tasks(pool, sample_rate) if compat.skip_small_tasks else pool
        # Repeats are counted here, and the engine then cuts no round.
        budget = len(pool) if compat.count_repeats else int(selected_top_number)
        config = LeadConfig(
            preset="paper", budget=budget, rate=sample_rate, gamma=beta, max_uses=max_uses, seed=seed,
            smoothing=0.0 if compat.no_smoothing else b, bandit="uniform" if compat.zero_reward else "exp3",
            estimator="none" if compat.no_loss_change else "historical",
        )  # fmt: skip
        self.engine = LeadEngine(self.pool, config, device)
        self._rows: Tensor | None = None

    @classmethod
    def open(cls, path: str | Path, **options: Any) -> OfficialLead:
        """From the published pool file as it is, .jsonl or .jsonl.gz; `options` as the class takes them.

        Raises:
            PoolError: names file, line and field. ValueError: `dataset_id`s that are not distinct.
        """
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            rows = (json.loads(line) for line in file if line.strip())
            ids = [row.get("dataset_id", number) for number, row in enumerate(rows)]
        return cls(Pool.from_official(path), ids, **options)

    def track(self, parameters: Iterable[Tensor]) -> None:
        """Hands over the trained parameters, before the first arm: the change of the loss is read off their change."""
        self.engine.track(parameters)

    def select_arm(self) -> int | None:
        """Draws an arm and ranks its tasks; None when the budget is used or no row is left.

        Raises:
            RuntimeError: the arm before was not updated, or `track` was not called.
        """
        if self.compat.count_repeats and self.num_selected >= self.selected_top_number:
            return None
        rnd = self.engine.begin_round()
        if rnd is None:
            return None
        self._rows = rnd.rows
        self.num_selected += len(rnd)
        return rnd.arm

    def select_samples(self) -> list[int]:
        """`dataset_id`s of the arm's chosen rows: train once on each, in this order.

        Raises:
            RuntimeError: no arm was selected.
        """
        if self._rows is None:
            raise RuntimeError("OfficialLead.select_samples: select_arm must come first")
        return self.dataset_ids[self._rows.numpy()].tolist()

    def sample_losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample's mean nll per supervised token, without gradient, and its number of supervised tokens.

        Args:
            logits: [B, L, V], any floating dtype; the fp32 copy is one sample at a time.
            labels: int64 [B, L], -100 where unsupervised, as the host model takes them (not shifted).

        Returns:
            fp32 [B] each; a sample without supervised tokens has 0.
        """
        if not self.compat.unshifted_loss:
            logits, labels = logits[:, :-1], labels[:, 1:]
        num_tokens = (labels != IGNORE_INDEX).sum(1).float()
        sums = [
            F.cross_entropy(sample.detach().float(), target, ignore_index=IGNORE_INDEX, reduction="sum")
            for sample, target in zip(logits, labels, strict=True)
        ]
        return torch.stack(sums) / num_tokens.clamp_min(1.0), num_tokens

    def observe(self, dataset_ids: Tensor | Sequence[int], losses: Tensor, num_tokens: Tensor) -> None:
        """Takes the losses of one batch, before its optimizer step.

        Args:
            dataset_ids: int64 [B], as the batch carries them.
            losses, num_tokens: [B] each, from `sample_losses`.

        Raises:
            ValueError: an id that is not in the pool. RuntimeError: no arm was selected.
        """
        names = dataset_ids.tolist() if isinstance(dataset_ids, Tensor) else list(dataset_ids)
        if unknown := [name for name in names if name not in self._row_of]:
            raise ValueError(f"OfficialLead.observe: `dataset_ids` must be of the pool, got {unknown[:5]}")
        rows = torch.tensor([self._row_of[name] for name in names], dtype=torch.int64)
        losses, none = losses.detach().reshape(-1).float(), torch.zeros_like(losses, dtype=torch.float32).reshape(-1)
        self.engine.observe(rows, SampleStats(losses, num_tokens.reshape(-1).float(), none, none, none))

    def step(self, lr: float, num_items: float | Tensor = 1) -> None:
        """After each optimizer step: the learning rate it used and its supervised tokens."""
        self.engine.step(lr=lr, num_items=num_items)

    def update(self) -> RoundReport:
        """Closes the round: utilities of its rows, the arm's reward, the bandit."""
        self._rows = None
        return self.engine.end_round()

    def export(self, path: str | Path) -> None:
        """Writes the chosen rows as JSONL: `dataset_id`, rounds, utility at each choice, and messages where there is text."""
        chosen = [entry | {"dataset_id": int(self.dataset_ids[entry["row"]])} for entry in self.engine.selected()]
        if not self.pool.has_text:
            return write_jsonl(path, chosen)
        names = {"dataset_id": "dataset_id", "rounds": "rounds", "utility": "utility_at_choice"}
        extra = [{name: entry[key] for key, name in names.items()} for entry in chosen]
        self.pool.export_jsonl([entry["row"] for entry in chosen], path, extra=extra)


def _without_small_tasks(pool: Pool, rate: float) -> Pool:
    """The pool with the tasks aside that give int(rate * rows) = 0 rows."""
    if pool.arm is None or pool.task is None:
        raise ValueError("OfficialLead: `pool` must have arm and task for compat.skip_small_tasks, got none")
    group = np.unique(np.stack([pool.arm.astype(np.int64), pool.task.astype(np.int64)]), axis=1, return_inverse=True)[1]
    group = group.reshape(-1)
    sizes = np.bincount(group[~pool.aside], minlength=int(group.max()) + 1)
    return pool.with_arrays(aside=pool.aside | (np.floor(rate * sizes + 1e-9) < 1)[group])
