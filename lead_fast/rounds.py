"""What a round chose (`Round`), what it is told of its samples (`SampleStatistics`), what came of it (`RoundReport`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lead_fast.device import Parcel
from lead_fast.selection import Candidates
from lead_fast.utility import LossChangeEstimator
from lead_fast.visits import Record, Visits, collect


@dataclass(frozen=True)
class Round:
    """One round's choice.

    Attributes:
        number: 1, 2, ...
        arms: the arms drawn; `arm` is the first of them.
        rows: int64 [n] on the CPU, row numbers of the pool in the round's seeded shuffle: train once over them.
        utility: fp32 [n] on the CPU, IDU of those rows at choice.
        probs: fp64 [K] on the CPU, probability of each arm in the round's draw.
        uniforms: the uniform numbers that drew the arms; none for a forced visit.
        forced: the arm was not drawn but visited for the first time.
        task_uniforms: per arm, the uniform number that placed the systematic sample over its tasks.
        candidates: per arm, all rows that could be chosen, as the choice saw them; empty unless
            `LeadEngine.record_candidates`.
    """

    number: int
    arms: list[int]
    rows: Tensor
    utility: Tensor
    probs: Tensor
    uniforms: list[float]
    forced: bool
    task_uniforms: list[float]
    candidates: list[Candidates]

    @property
    def arm(self) -> int:
        return self.arms[0]

    def __len__(self) -> int:
        return len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors, numbers and lists."""
        return vars(self) | {"candidates": {str(i): dict(vars(c)) for i, c in enumerate(self.candidates)}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Round:
        """The round of a `state_dict`."""
        fields: dict[str, Any] = dict(state)
        fields["candidates"] = [Candidates(**columns) for columns in state["candidates"].values()]
        return cls(**fields)


class SampleStatistics(Protocol):
    """What `observe` reads of `linear_cross_entropy(...).samples`; fp32 [S] each."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def num_tokens(self) -> Tensor: ...
    @property
    def grad_norm_sq(self) -> Tensor: ...


class OpenRound(NamedTuple):
    """What the engine needs of the open round on its device."""

    rows: Tensor  # int64 [n]
    begin_idu: Tensor  # fp32 [n]
    arms: Tensor  # int64 [m], -1 for none
    arm_probs: Tensor  # fp64 [m], with which each was drawn
    mask: Tensor  # bool [K], the arms that could be drawn
    first_step: int
    begin_weights: Tensor | None
    visits: list[Record]  # so far, where they are recorded

    def state_dict(self) -> dict[str, Any]:
        """Nested dicts of tensors and numbers."""
        state = {name: value for name, value in self._asdict().items() if value is not None}
        return state | {"visits": {str(i): visit for i, visit in enumerate(self.visits)}}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> OpenRound:
        """The round of a `state_dict`, on a device."""
        moved: dict[str, Any] = {n: value.to(device) if isinstance(value, Tensor) else value for n, value in state.items()}
        moved["visits"] = [{n: column.to(device) for n, column in visit.items()} for visit in state["visits"].values()]
        return cls(**{"begin_weights": None, **moved})


class RoundReport:
    """What a round did. Copies of its tensors stay on the device until a property is read, which brings them all at once."""

    def __init__(self, rnd: Round, *, rewards: Tensor, scaled: Tensor, log_weights: Tensor, summary: Tensor,
                 quarantined: Tensor, estimator: LossChangeEstimator, snapshot: dict[str, Tensor],
                 visits: list[Record] | None, paired: str | None) -> None:  # fmt: skip
        self._rows, self._num_arms = rnd.rows, len(rnd.arms)
        self.number, self.arm, self.arms = rnd.number, rnd.arm, rnd.arms
        self.probs, self.uniforms, self.forced = rnd.probs, rnd.uniforms, rnd.forced
        named = {
            "rewards": rewards,
            "scaled": scaled,
            "log_weights": log_weights,
            "summary": summary,
            "quarantined": quarantined.double(),  # as all the others are
        }
        for name, value in snapshot.items():
            if not isinstance(value, Tensor):
                got = type(value).__name__
                raise TypeError(f"{type(estimator).__name__}.snapshot: `{name}` must be a tensor, got {got}")
        self._names, self._of_snapshot = list(named), list(snapshot)
        self._of_visits = None if visits is None else [list(record) for record in visits]
        tensors = [*named.values(), *snapshot.values(), *(column for record in visits or [] for column in record.values())]
        # A custom estimator may keep numbers on the CPU.
        self._parcel = Parcel([t if t.device == rewards.device else t.to(rewards.device) for t in tensors])
        self._estimator, self._paired = estimator, paired

    @cached_property
    def _host(self) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
        """What stayed on the device: the round's own by name, the estimator's snapshot, the columns of the visits."""
        values = iter(self._parcel.opened(self._parcel.buffer.cpu()))
        del self._parcel
        own, snapshot = ({name: next(values) for name in names} for names in (self._names, self._of_snapshot))
        return own, snapshot, list(values)

    @cached_property
    def rewards(self) -> list[float]:
        """Raw reward of each arm drawn; NaN where none of its rows was observed."""
        return self._host[0]["rewards"][: self._num_arms].tolist()

    @property
    def reward(self) -> float:
        """Raw reward of `arm`: mean fall of utility ("idu") or of loss ("drop") over the round's rows, in nats."""
        return self.rewards[0]

    @cached_property
    def scaled_rewards(self) -> list[float]:
        """Rewards in [-1, 1] as the bandit took them; 0 for the first rewards and where there was none."""
        return self._host[0]["scaled"][: self._num_arms].tolist()

    @cached_property
    def log_weights(self) -> Tensor:
        """The bandit's log weights after the round, fp64 [K] on the CPU."""
        return self._host[0]["log_weights"].clone()  # whoever keeps it keeps no more

    @cached_property
    def num_samples(self) -> int:
        """Rows of the round that were observed with a finite loss."""
        return int(self._host[0]["summary"][0])

    @cached_property
    def mean_loss(self) -> float:
        """Mean over those rows of their mean nll per supervised token, as observed."""
        return float(self._host[0]["summary"][1])

    @cached_property
    def quarantined(self) -> list[int]:
        """Rows of the round whose loss was not finite: never chosen again."""
        return self._rows[self._host[0]["quarantined"] > 0.0].tolist()

    @property
    def num_quarantined(self) -> int:
        """Number of those rows."""
        return len(self.quarantined)

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """What the estimator learned so far: its coefficients, the pairs they come from, what still has its prior."""
        return self._estimator.describe(self._host[1])

    @cached_property
    def visits(self) -> Visits | None:
        """Every observation of a row with a finite loss, in order; None unless `LeadEngine.record_visits` was on.

        Columns [n] on the CPU: row int64; arm int16; seen_round int32, of the row's visit before, 0 for its first;
        fp32 seen_loss, when last seen or the first utility; predicted.NAME, by each estimator, not cut at 0; observed.
        """
        if self._of_visits is None:
            return None
        columns = iter(self._host[2])
        return collect([{name: next(columns) for name in names} for names in self._of_visits], self._paired)

    def __repr__(self) -> str:
        return f"RoundReport(number={self.number}, arm={self.arm}, reward={self.reward:.4g}, num_samples={self.num_samples})"
