"""How far predicted losses are from true ones on a real pool: audited trainings of a small model, LoRA and full tuning.

    python benchmarks/audit.py --pool pool.jsonl.gz --work WORK

`--pool` is a raw pool, of which a fifth first pretrains the small model, or a folder of `lead-fast prepare`, whose base model
and rows are taken. A random part of those rows is prepared once for each tuning, and trained on once for each seed. What is
in WORK already is not done again. Writes OUT.md and OUT.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import machine

import lead_fast as lf
from lead_fast.audit import TITLES
from lead_fast.config import LeadConfig, PrepareConfig, TrainConfig
from lead_fast.files import write_json, write_text
from lead_fast.offline.prepare import PREPARED_FILE, load_prepared, prepare
from lead_fast.run import run_train

logger = logging.getLogger("audit")

ESTIMATORS = ("none", "historical", "grad_norm")
_LEARNING_RATE, _WARMUP_ROWS, _SUBSET_SEED = 1e-3, 200, 0
_STATISTICS = ("mae", "bias", "spearman_change", "spearman_change_within")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", required=True, help="a raw pool, or a folder of lead-fast prepare")
    parser.add_argument("--work", required=True, type=Path, help="folder for the runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "audit_cpu", help="results, no suffix")
    parser.add_argument("--tuning", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=2000, help="rows of the pool that take part (0: all)")
    parser.add_argument("--budget", type=float, default=0.5, help="share of them that a run may use")
    parser.add_argument("--min-rounds", type=int, default=150)
    parser.add_argument("--audit-every", type=int, default=10)
    parser.add_argument("--audit-rows", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=_LEARNING_RATE)
    return parser.parse_args()


def rows_and_base(args: argparse.Namespace) -> tuple[Path, str]:
    """The rows that take part, as a file, and the base model, which has not seen them."""
    if (Path(args.pool) / PREPARED_FILE).exists():
        source = load_prepared(Path(args.pool))
    else:
        config = PrepareConfig(model_config="small", pool=args.pool, learning_rate=args.learning_rate)
        source = prepare(lf.Pool.open(args.pool), config, LeadConfig(), args.work / "base")
    path = args.work / f"rows-{args.rows}.jsonl"
    if not path.exists():
        order = np.random.default_rng(_SUBSET_SEED).permutation(len(source.pool))
        source.pool.export_jsonl(np.sort(order[: args.rows or None]), path)
    return path, source.base


def train(args: argparse.Namespace, rows: Path, base: str, tuning: str, seed: int) -> Path:
    """The folder of one audited training."""
    common = {"tuning": tuning, "learning_rate": args.learning_rate}
    prepared = args.work / f"prepared-{tuning}-{args.rows}"
    if not (prepared / PREPARED_FILE).exists():
        pool = lf.Pool.open(rows)
        prepare(
            pool, PrepareConfig(model=base, warmup_share=min(0.5, _WARMUP_ROWS / len(pool)), **common), LeadConfig(), prepared
        )
    name = f"{tuning}-{args.rows}-{args.budget:g}-{args.min_rounds}-{args.learning_rate:g}-{args.audit_every}-{args.audit_rows}"
    run = args.work / f"{name}-seed{seed}"
    if not (run / "summary.json").exists():
        config = TrainConfig(pool=str(prepared), out=str(run), resume=run.exists(), audit_every=args.audit_every,
                             audit_rows=args.audit_rows, audit_estimators=",".join(ESTIMATORS), **common)  # fmt: skip
        start = time.perf_counter()
        run_train(config, LeadConfig(seed=seed, budget=args.budget, min_rounds=args.min_rounds))
        logger.info("%s, seed %d: %.0f seconds", tuning, seed, time.perf_counter() - start)
    return run


def read(run: Path, tuning: str, seed: int) -> dict[str, Any]:
    """What one run showed."""
    report, summary = lf.audit(run), json.loads((run / "summary.json").read_text())
    last = json.loads((run / "rounds.jsonl").read_text().splitlines()[-1])
    names = ("rounds", "rows", "pool", "optimizer_steps", "trained_tokens", "audit_tokens", "seconds_by_part", "warnings")
    return {
        "tuning": tuning, "seed": seed, "calibration": last["calibration"], "errors": report.errors,
        **{name: summary[name] for name in names},
    }  # fmt: skip


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each tuning, kind of rows and estimator the mean over seeds, and the lowest and highest seed."""
    found = []
    for tuning in dict.fromkeys(run["tuning"] for run in runs):
        for source, rows in TITLES:
            for estimator in ESTIMATORS:
                wanted = {"source": source, "rows": rows, "estimator": estimator, "slice": "all"}
                entries = [e for run in runs if run["tuning"] == tuning for e in run["errors"] if wanted.items() <= e.items()]
                entry: dict[str, Any] = {"tuning": tuning, **wanted, "n": sum(e["n"] for e in entries)}
                for name in _STATISTICS:
                    values = [e[name] for e in entries if e[name] is not None]
                    entry[name] = None if not values else [statistics.mean(values), min(values), max(values)]
                found.append(entry)
    return found


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """For each tuning and kind of rows, whether grad_norm has the lowest MAE and the highest rank correlation of change."""
    lines = []
    for tuning, source, kind in dict.fromkeys((r["tuning"], r["source"], r["rows"]) for r in rows):
        by = {r["estimator"]: r for r in rows if (r["tuning"], r["source"], r["rows"]) == (tuning, source, kind)}
        if any(r["mae"] is None for r in by.values()):
            continue
        ours = by.pop("grad_norm")
        mae = all(ours["mae"][0] < other["mae"][0] for other in by.values())
        ranks = [(r["spearman_change"] or [0.0])[0] for r in (ours, *by.values())]
        words = f"MAE {'lowest' if mae else '**not lowest**'}, "
        words += f"rank of change {'highest' if ranks[0] > max(ranks[1:]) else '**not highest**'}"
        lines.append(f"- {tuning}, {TITLES[source, kind].lower()}: `grad_norm` {words}")
    return lines


def _run_words(run: dict[str, Any]) -> str:
    c = run["calibration"]
    warnings = "; ".join(w["text"] for w in run["warnings"])
    return (
        f"{run['rounds']} rounds, {run['rows']} of {run['pool']} rows, {run['optimizer_steps']} steps, {c['pairs']} pairs "
        f"({c['revisit_pairs']} revisits), prior in use for {', '.join(c['prior']) or 'nothing'}; "
        f"warnings: {warnings or 'none'}"
    )


def cell(value: list[float] | None, digits: int) -> str:
    return "-" if value is None else f"{value[0]:.{digits}f} ({value[1]:.{digits}f} to {value[2]:.{digits}f})"


def markdown(args: argparse.Namespace, runs: list[dict[str, Any]], rows: list[dict[str, Any]], where: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Predicted losses against true ones, small model, real pool", "",
        ", ".join(f"{name}: {value}" for name, value in where.items()), "",
        f"`python benchmarks/audit.py --pool POOL --work WORK --tuning {' '.join(args.tuning)} "
        f"--seeds {' '.join(map(str, args.seeds))} --rows {args.rows} --budget {args.budget:g} "
        f"--min-rounds {args.min_rounds} --audit-every {args.audit_every} --audit-rows {args.audit_rows} "
        f"--learning-rate {args.learning_rate:g}`", "",
        "Truth: an extra forward over random trained and random untouched rows after every "
        f"{args.audit_every}th round (re-scored), and the loss that a row shows when it is trained on (visits). `grad_norm` "
        "chose, the others watched the same training. Mean over seeds (lowest to highest seed); losses in nats per supervised "
        "token; rank of change: Spearman of predicted against true change since last seen, within rounds: the same inside each "
        "round, averaged. An estimator that predicts one value for all has rank 0.", "",
    ]  # fmt: skip
    for tuning in dict.fromkeys(r["tuning"] for r in rows):
        ours = [run for run in runs if run["tuning"] == tuning]
        lines += [f"## {tuning}", ""]
        lines += [f"- seed {run['seed']}: {_run_words(run)}" for run in ours]
        lines += ["", "| rows | estimator | n | MAE | bias | rank of change | within rounds |", "|---|---|---|---|---|---|---|"]
        for r in rows:
            if r["tuning"] == tuning and r["n"]:
                lines.append(f"| {TITLES[r['source'], r['rows']]} | {r['estimator']} | {r['n']:,} | {cell(r['mae'], 4)} | "
                             f"{cell(r['bias'], 4)} | {cell(r['spearman_change'], 3)} | "
                             f"{cell(r['spearman_change_within'], 3)} |")  # fmt: skip
        lines.append("")
    return "\n".join([*lines, "## Where it holds", "", *verdicts(rows), ""])


def main() -> int:
    args = options()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    args.work.mkdir(parents=True, exist_ok=True)
    rows, base = rows_and_base(args)
    folders = [(tuning, seed, train(args, rows, base, tuning, seed)) for tuning in args.tuning for seed in args.seeds]
    runs = [read(run, tuning, seed) for tuning, seed, run in folders]
    summary, where = table(runs), machine()
    write_text(args.out.with_suffix(".md"), markdown(args, runs, summary, where))
    write_json(args.out.with_suffix(".json"), {"machine": where, "table": summary, "runs": runs})
    print(json.dumps({"results": str(args.out.with_suffix(".md")), "verdicts": verdicts(summary)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
