"""How far predicted losses were from true ones: `lf.audit(run)`, `lead-fast audit RUN`.

Two kinds of truth. A visit is free: a row is trained on again, and its loss stands beside what was predicted for it; but
visited rows are chosen rows. A re-scoring is an extra forward over random rows after a round (`--audit-every`): trained
ones, and ones that training never touched, whose predicted loss moves all the same. The two are never mixed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lead_fast.config import read_yaml
from lead_fast.files import atomic_path, read_jsonl
from lead_fast.visits import PREDICTED

AUDIT_FOLDER = "audit"
SOURCES = ("rescored", "visits")
STAGES = ("early", "middle", "late")  # thirds of the run's rounds
_INTEGERS, _LOSSES = ("round", "row", "arm", "seen_round"), ("seen_loss", "observed")

# A predicted change is a difference of two fp32 losses: equal changes differ by their rounding, up to this many nats.
_CHANGE_GRID = 1e-5
_TOP_SHARE, _ROWS_FOR_TOP, _ROWS_FOR_RANKS, _ROWS_WITHIN_ROUND = 0.1, 10, 3, 8


@dataclass(frozen=True)
class Records:
    """Predicted losses beside true ones, NumPy arrays [n].

    Attributes:
        columns: int64 round (of the truth), row, arm, seen_round (when last trained on, 0: never); fp64 seen_loss (when
            last seen, or the first utility) and observed, in nats per supervised token.
        predicted: fp64, by estimator; not cut at 0, so that predicted minus seen_loss is the change that it foresaw.
    """

    columns: dict[str, np.ndarray]
    predicted: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["round"])

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def where(self, mask: np.ndarray) -> Records:
        """The entries where `mask`, bool [n], is True."""
        return Records({k: v[mask] for k, v in self.columns.items()}, {k: v[mask] for k, v in self.predicted.items()})


def write_records(folder: Path, source: str, number: int, columns: dict[str, Any]) -> None:
    """Writes the records of round `number` as Parquet: all columns of `Records` but the round, and predicted.NAME; [n] each."""
    columns = {"round": np.full(len(columns["row"]), number, np.int32), **columns}
    with atomic_path(folder / f"{source}-{number:05d}.parquet") as temporary:
        pq.write_table(pa.table({name: np.asarray(column) for name, column in columns.items()}), temporary)


def read_records(folder: Path, source: str) -> Records | None:
    """All records of a source in an audit's folder; None when it has no file."""
    files = sorted(folder.glob(f"{source}-*.parquet"))
    if not files:
        return None
    table = pa.concat_tables([pq.read_table(file) for file in files])
    names = [name for name in table.column_names if name.startswith(PREDICTED)]
    columns = {name: table[name].to_numpy().astype(np.int64) for name in _INTEGERS}
    columns |= {name: table[name].to_numpy().astype(np.float64) for name in _LOSSES}
    predicted = {name.removeprefix(PREDICTED): table[name].to_numpy().astype(np.float64) for name in names}
    records = Records(columns, predicted)
    return records.where(np.isfinite(records["observed"]))


# Statistics.


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, fp64 [n]; ties share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2.0)[inverse]


def spearman(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Spearman's rank correlation of two arrays [n], ties by average rank.

    0 where every prediction is the same, since it ranks nothing; None below 3 entries or where every truth is the same.
    """
    if len(true) < _ROWS_FOR_RANKS or np.ptp(true) == 0.0:
        return None
    if np.ptp(predicted) == 0.0:
        return 0.0
    return float(np.corrcoef(average_ranks(predicted), average_ranks(true))[0, 1])


def top_overlap(predicted: np.ndarray, true: np.ndarray, share: float = _TOP_SHARE) -> float | None:
    """Share of the entries with the highest truths that are also among the highest predictions; None below 10 entries."""
    if len(true) < _ROWS_FOR_TOP:
        return None
    count = round(share * len(true))
    highest = [set(np.argsort(-values, kind="stable")[:count].tolist()) for values in (predicted, true)]
    return len(highest[0] & highest[1]) / count


def prediction_errors(records: Records, estimator: str) -> dict[str, Any]:
    """What an estimator's predictions were worth.

    Returns:
        n; mae and bias (mean of predicted minus true) in nats; spearman_level (predicted against true loss);
        spearman_change (predicted against true change since last seen), and the same within each round, averaged by the
        number of rows, where a value common to the round counts for nothing; top_overlap (highest tenth of losses). None
        where too few entries say nothing.
    """
    uncut, true, before = records.predicted[estimator], records["observed"], records["seen_loss"]
    predicted = np.maximum(uncut, 0.0)
    if not len(records):
        return {"n": 0} | dict.fromkeys(("mae", "bias", *_RANKED))
    change, true_change = np.round((uncut - before) / _CHANGE_GRID), true - before
    within = [(int(at.sum()), spearman(change[at], true_change[at])) for at in _by_round(records["round"])]
    within = [(n, rho) for n, rho in within if rho is not None and n >= _ROWS_WITHIN_ROUND]
    return {
        "n": len(records),
        "mae": float(np.abs(predicted - true).mean()),
        "bias": float((predicted - true).mean()),
        "spearman_level": spearman(predicted, true),
        "spearman_change": spearman(change, true_change),
        "spearman_change_within": sum(n * rho for n, rho in within) / sum(n for n, _ in within) if within else None,
        "top_overlap": top_overlap(predicted, true),
    }


_RANKED = ("spearman_level", "spearman_change", "spearman_change_within", "top_overlap")


def _by_round(rounds: np.ndarray) -> Iterator[np.ndarray]:
    return (rounds == number for number in np.unique(rounds))


def stage_of(rounds: np.ndarray, num_rounds: int) -> np.ndarray:
    """Index into `STAGES` of each round 1..num_rounds, int64 [n]."""
    return (rounds - 1) * len(STAGES) // max(num_rounds, 1)


def slices(records: Records, num_rounds: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names and masks: everything, each stage of training, each arm."""
    yield "all", np.ones(len(records), bool)
    stage = stage_of(records["round"], num_rounds)
    for index, name in enumerate(STAGES):
        yield name, stage == index
    for arm in np.unique(records["arm"]):
        yield f"arm {arm}", records["arm"] == arm


def curves(records: Records, estimator: str, max_points: int = 24) -> dict[str, list[Any]]:
    """Errors over training: of each round, or of runs of rounds where there are more than `max_points`."""
    rounds = np.unique(records["round"])
    points: dict[str, list[Any]] = {"round": [], "n": [], "mae": [], "bias": [], "spearman_change": []}
    for part in np.array_split(rounds, min(max_points, len(rounds))) if len(rounds) else []:
        errors = prediction_errors(records.where(np.isin(records["round"], part)), estimator)
        points["round"].append(float(part.mean()))
        for name in ("n", "mae", "bias", "spearman_change"):
            points[name].append(errors[name])
    return points


# The audit of a run.


@dataclass(frozen=True)
class AuditReport:
    """What the audit of a run found.

    Attributes:
        run: the run's folder.
        estimator: the one that chose; `estimators` has all that were audited.
        num_rounds: rounds that the run had so far; `rescored` are those after which rows were re-scored.
        tokens, seconds: what re-scoring cost: forward tokens, wall clock.
        errors: one dict for each source ("rescored", "visits"), rows ("trained", "untouched": at visits, the row's first),
            slice ("all", "early", "middle", "late", "arm 0", ...) and estimator, with `prediction_errors`.
        curves: one dict for each source, rows and estimator, with `curves`.
        records: by source and rows, the predictions and truths themselves.
    """

    run: str
    estimator: str
    estimators: list[str]
    num_rounds: int
    rescored: list[int]
    tokens: int
    seconds: float
    errors: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    records: dict[tuple[str, str], Records] = field(repr=False)

    def find(self, source: str, rows: str, estimator: str, slice: str = "all") -> dict[str, Any]:
        """The one entry of `errors` that is asked for."""
        wanted = {"source": source, "rows": rows, "estimator": estimator, "slice": slice}
        for entry in self.errors:
            if wanted.items() <= entry.items():
                return entry
        raise KeyError(f"AuditReport.find: the audit has no {wanted}")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the records, as JSON takes it."""
        names = ("run", "estimator", "estimators", "num_rounds", "rescored", "tokens", "seconds", "errors", "curves")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        header = ("slice", "estimator", "n", "MAE", "bias", "rho loss", "rho change", "in rounds", "top 10%")
        lines = []
        for (source, rows), records in self.records.items():
            lines.append(f"\n{TITLES[source, rows]}: {len(records):,} {'rows' if source == 'rescored' else 'visits'}")
            lines.append("{:<10}{:<14}{:>8}{:>9}{:>9}{:>10}{:>12}{:>11}{:>9}".format(*header))
            for e in self.errors:
                if (e["source"], e["rows"]) == (source, rows) and not e["slice"].startswith("arm") and e["n"]:
                    ranked = [show(e[name], 3) for name in _RANKED]
                    lines.append("{:<10}{:<14}{:>8,}{:>9}{:>9}{:>10}{:>12}{:>11}{:>9}".format(
                        e["slice"], e["estimator"], e["n"], show(e["mae"]), show(e["bias"], sign=True), *ranked))  # fmt: skip
        return "\n".join(lines)


TITLES = {
    ("rescored", "trained"): "Re-scored, trained",
    ("rescored", "untouched"): "Re-scored, untouched",
    ("visits", "trained"): "Visits again",
    ("visits", "untouched"): "First visits",
}


def show(value: float | None, digits: int = 4, *, sign: bool = False) -> str:
    """A number as a table shows it, "-" where there is none."""
    return "-" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def audit(run: str | Path) -> AuditReport:
    """Reads what a run predicted and what turned out true.

    Args:
        run: folder of a run trained with `--audit-every`; one that is still training is read as far as it is.

    Raises:
        ValueError: the folder is no run, or a run that was not audited.
    """
    folder = Path(run)
    if not (folder / "config.yaml").exists():
        raise ValueError(f"audit: expected the folder of a run, got {folder}, which has no config.yaml")
    found = {source: records for source in SOURCES if (records := read_records(folder / AUDIT_FOLDER, source)) is not None}
    if not found:
        raise ValueError(f"audit: {folder} was not audited; train it with --audit-every 10 (a re-scoring every 10 rounds)")
    logged = read_jsonl(folder / "rounds.jsonl")
    num_rounds = max(int(records["round"].max(initial=1)) for records in found.values())
    parts = {}
    for source, records in found.items():
        untouched = records["seen_round"] == 0
        parts |= {(source, "trained"): records.where(~untouched), (source, "untouched"): records.where(untouched)}
    estimators = list(next(iter(found.values())).predicted)
    labelled = [({"source": source, "rows": rows}, records) for (source, rows), records in parts.items()]
    return AuditReport(
        run=str(folder),
        estimator=read_yaml(folder / "config.yaml")["estimator"],
        estimators=estimators,
        num_rounds=num_rounds,
        rescored=np.unique(found["rescored"]["round"]).tolist() if "rescored" in found else [],
        tokens=sum(r.get("audit", {}).get("tokens", 0) for r in logged),
        seconds=round(sum(r["seconds"].get("audit", 0.0) for r in logged), 3),
        errors=[label | {"slice": name, "estimator": estimator} | prediction_errors(records.where(mask), estimator)
                for label, records in labelled for name, mask in slices(records, num_rounds) for estimator in estimators],
        curves=[label | {"estimator": estimator} | curves(records, estimator)
                for label, records in labelled for estimator in estimators],
        records=parts,
    )  # fmt: skip


class _CallableModule(ModuleType):
    """Python binds an imported submodule to its name in the package, so `lf.audit` may be this module: it is called alike."""

    def __call__(self, run: str | Path) -> AuditReport:
        return audit(run)


sys.modules[__name__].__class__ = _CallableModule
