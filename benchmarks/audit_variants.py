"""Variants of `grad_norm` that were tried and left: how its drift d, e is fitted. One audited training, all side by side.

    python benchmarks/audit_variants.py --prepared PREPARED --out RUN [--tuning lora] [--seed 0]

PREPARED is a folder of `lead-fast prepare`, for example one that benchmarks/audit.py made. What came of it is in
results/README.md. The variants have kappa 0 and no arm offsets, and nothing of them is meant to be resumed.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor

import lead_fast as lf
from lead_fast.config import LeadConfig, TrainConfig
from lead_fast.estimators import GradNorm
from lead_fast.reference_state import LOSS, OTHER_E, OWN_D, PROXY, ROUND, SLOPE_C, STEP, _since
from lead_fast.run import run_train
from lead_fast.utility import Clocks, UtilityTable


class Split(GradNorm):
    """c from revisits, after d and e were taken from first visits alone."""

    drifts = True

    def __init__(self, num_arms: int, adam_beta1: float, device: torch.device) -> None:
        super().__init__(num_arms, adam_beta1, device)
        self.drift_xx, self.drift_xy = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        self.own = torch.zeros(4, dtype=torch.float64)  # sums over revisits of x0^2, x0 y, x0 x1, x0 x2
        self.counts = torch.zeros(2)  # first visits, revisits

    def pair_state(self) -> Any:
        return None

    def pair(self, table: UtilityTable, clocks: Clocks, at: Tensor, loss: Tensor, valid: Tensor) -> None:
        keep = valid & (table.seen[STEP, at] < clocks.num_steps)
        at, loss = at[keep], loss[keep]
        step, now = table.seen[STEP, at].long(), torch.tensor(clocks.num_steps)
        rate, _, own, other = _since(step, table.arm[at].long(), now, clocks.clock, clocks.unit, self.adam_beta1)
        x, y = torch.stack([rate * table.values[PROXY, at].double(), own, other], 1), (table.values[LOSS, at] - loss).double()
        first = table.seen[ROUND, at] == 0
        self.drift_xx += x[first, 1:].T @ x[first, 1:]
        self.drift_xy += x[first, 1:].T @ y[first]
        again = x[~first]
        self.own += again[:, 0] @ torch.cat([again[:, :1], y[~first, None], again[:, 1:]], 1)
        self.counts += torch.tensor([float(first.sum()), float((~first).sum())])

    def calibrate(self, clocks: Clocks) -> None:
        drift = torch.zeros(2, dtype=torch.float64)
        if self.drifts and self.counts[0] >= self.MIN_PAIRS:
            scale = (self.drift_xx.diagonal() / self.counts[0]).sqrt().clamp_min(1e-300)
            gram = self.drift_xx / scale[:, None] / scale + self.PRIOR_PAIRS * torch.eye(2, dtype=torch.float64)
            drift = torch.linalg.solve(gram, self.drift_xy / scale) / scale
        self.fit[0, OWN_D : OTHER_E + 1] = drift
        if self.counts[1] >= self.MIN_PAIRS and self.own[0] > 0:
            prior = self.PRIOR_PAIRS * self.own[0] / self.counts[1]
            self.fit[0, SLOPE_C] = (self.own[1] - self.own[2:] @ drift) / (self.own[0] + prior)


@lf.register_estimator
class GradNormSplit(Split):
    name = "grad_norm_split"


@lf.register_estimator
class GradNormOwn(Split):
    """Without drift: a row moves by its own gradient alone."""

    name, drifts = "grad_norm_own", False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--audit-every", type=int, default=10)
    arguments = parser.parse_args()
    config = TrainConfig(
        pool=arguments.prepared, out=arguments.out, tuning=arguments.tuning, learning_rate=1e-3,
        audit_every=arguments.audit_every, audit_rows=128,
        audit_estimators="none,historical,grad_norm,grad_norm_split,grad_norm_own",
    )  # fmt: skip
    run_train(config, LeadConfig(seed=arguments.seed, budget=arguments.budget, min_rounds=150))
    for entry in lf.audit(arguments.out).errors:
        if entry["slice"] == "all":
            names = ("source", "rows", "estimator", "n", "mae", "bias", "spearman_change", "spearman_change_within")
            print(json.dumps({name: entry[name] for name in names}))


if __name__ == "__main__":
    main()
