"""A round that is open, saved as the engine's state before it and what the engine was told since.

`LeadEngine.state_dict` works between rounds; with one that works inside them this module goes.
"""

from __future__ import annotations

from typing import Any

import torch

from lead_fast.engine import LeadEngine
from lead_fast.ops import SampleStats
from lead_fast.rounds import Round

_STATISTICS = ("loss", "num_tokens", "grad_norm_sq")


class Replay:
    """Made before `begin_round`; told everything the engine is told until `end_round`.

    Attributes:
        before: the engine's state before the round.
    """

    def __init__(self, engine: LeadEngine) -> None:
        self.engine, self.before = engine, engine.state_dict()
        self._rows: torch.Tensor | None = None
        self._begin_weights: torch.Tensor | None = None
        self._calls: list[dict[str, Any]] = []

    def began(self, rnd: Round) -> None:
        """After `begin_round`: keeps its rows, and what it took from the weights."""
        self._rows, self._begin_weights = rnd.rows, self.engine._at.begin_weights

    def observed(self, rows: torch.Tensor, samples: SampleStats) -> None:
        self._calls.append({"rows": rows} | {name: getattr(samples, name).clone() for name in _STATISTICS})

    def stepped(self, lr: float, num_items: int) -> None:
        self._calls.append({"lr": lr, "num_items": num_items})

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows, "begin_weights": self._begin_weights, "calls": list(self._calls)}

    def run(self, state: dict[str, Any]) -> Round:
        """Opens the round again, on an engine that stands before it, and tells it what it was told.

        Raises:
            ValueError: the engine chose other rows.
        """
        rnd = self.engine.begin_round()
        if rnd is None or not torch.equal(rnd.rows, state["rows"]):
            raise ValueError("resume: the engine must choose the rows of the open round again, got others")
        if state["begin_weights"] is not None:
            # The weights have moved on since the round began.
            begin = state["begin_weights"].to(self.engine.device)
            self.engine._at = self.engine._at._replace(begin_weights=begin)
        self.began(rnd)
        for call in state["calls"]:
            if "lr" in call:
                self.engine.step(lr=call["lr"], num_items=call["num_items"])
                self.stepped(call["lr"], call["num_items"])
            else:
                unused = torch.zeros_like(call["loss"])
                samples = SampleStats(call["loss"], call["num_tokens"], unused, unused, call["grad_norm_sq"])
                self.engine.observe(call["rows"], samples)
                self.observed(call["rows"], samples)
        return rnd
