"""What a round and its steps are measured by: a line of rounds.jsonl, and metrics under stable names for trackers."""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lead_fast.optimization import StepResult
from lead_fast.rounds import Round, RoundReport

#: parts of a round's seconds that training takes; evaluation, audit and checkpoints come beside them
TRAINING_PARTS = ("select", "data", "step", "estimate")


def round_record(
    rnd: Round, report: RoundReport, trained: Sequence[tuple[float, StepResult]], seconds: dict[str, float]
) -> dict[str, Any]:
    """One line of rounds.jsonl. Log weights are those after the round's update, probabilities those of its draw.

    Args:
        trained: learning rate and result of each optimizer step.
        seconds: wall-clock seconds by part.
    """
    items = [result.num_items for _, result in trained]
    finite = [result for _, result in trained if math.isfinite(float(result.loss))]
    loss = sum(float(r.loss) * r.num_items for r in finite) / sum(r.num_items for r in finite) if finite else math.nan
    rewards = [reward if math.isfinite(reward) else None for reward in report.rewards]
    tokens = sum(result.num_tokens for _, result in trained)
    spent = max(1e-9, sum(seconds.get(part, 0.0) for part in TRAINING_PARTS))
    return {
        "round": rnd.number,
        "arm": rnd.arm,
        "arms": rnd.arms,
        "forced": report.forced,
        "uniform": report.uniforms,
        "task_uniforms": rnd.task_uniforms,
        "probs": report.probs.tolist(),
        "log_weights": report.log_weights.tolist(),
        "reward": rewards[0],
        "rewards": rewards,
        "scaled_rewards": report.scaled_rewards,
        "samples": len(rnd),
        "rows": rnd.rows.tolist(),
        "tokens": tokens,
        "supervised_tokens": sum(items),
        "steps": len(trained),
        "learning_rates": [lr for lr, _ in trained],
        "step_items": items,
        "step_tokens": [result.num_tokens for _, result in trained],
        "step_losses": [_finite(result.loss) for _, result in trained],
        "step_grad_norms": [_finite(result.grad_norm) for _, result in trained],
        "mean_loss": loss if math.isfinite(loss) else None,
        "mean_sample_loss": report.mean_loss if math.isfinite(report.mean_loss) else None,
        "quarantined": report.num_quarantined,
        "quarantined_rows": report.quarantined,
        "calibration": report.calibration,
        "seconds": seconds,
        "performance": {
            "tokens_per_second": round(tokens / spent, 1) if spent else None,
            "estimation_share": round((seconds.get("estimate", 0.0) + seconds.get("select", 0.0)) / spent, 6)
            if spent
            else None,
            "step_seconds": [round(result.seconds, 6) for _, result in trained],
            "peak_mib": peak_mib(),
        },
    }


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def peak_mib() -> float:
    """Most memory that this process has held so far, MiB: of its GPU where it has one, else resident."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)


def tracked(record: dict[str, Any], first_step: int) -> Iterator[tuple[int, dict[str, float]]]:
    """A round's metrics for a tracker: (optimizer step, {name: value}), a line a step, and with the last one the round's.

    Args:
        record: of the round.
        first_step: number of its first optimizer step, from 1.
    """
    lines: list[dict[str, Any]] = [
        {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": lr, "train/tokens": tokens,
         "train/supervised_tokens": items, "train/step_seconds": seconds}
        for loss, norm, lr, tokens, items, seconds in zip(
            record["step_losses"], record["step_grad_norms"], record["learning_rates"], record["step_tokens"],
            record["step_items"], record["performance"]["step_seconds"], strict=True,
        )
    ]  # fmt: skip
    whole = {
        "lead/round": record["round"], "lead/arm": record["arm"], "lead/reward": record["reward"],
        "lead/scaled_reward": record["scaled_rewards"][0], "lead/mean_loss": record["mean_sample_loss"],
        "lead/samples": record["samples"], "lead/quarantined": record["quarantined"], "lead/steps": record["steps"],
        "lead/tokens": record["tokens"], "lead/supervised_tokens": record["supervised_tokens"],
        "lead/rows_used": record["rows_used"], "lead/progress": record["progress"],
    }  # fmt: skip
    whole |= {f"lead/prob_{arm}": prob for arm, prob in enumerate(record["probs"])}
    whole |= {f"lead/calibration_{k}": v for k, v in record["calibration"].items() if isinstance(v, int | float)}
    whole |= {f"lead/seconds_{part}": value for part, value in record["seconds"].items()}
    performance = {k: v for k, v in record["performance"].items() if k != "step_seconds"}
    lines[-1] |= whole | {f"lead/{name}": value for name, value in performance.items()}
    for number, line in enumerate(lines):
        yield first_step + number, {name: value for name, value in line.items() if value is not None}


def write_candidates(rnd: Round, folder: Path) -> None:
    """Writes a round's candidates as Parquet: row, task, uses, utility, the choice's noise, and whether it was chosen."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lead_fast.files import atomic_path

    tables = [
        pa.table({
            "arm": pa.array([arm] * len(c.row), pa.int16()),
            "row": c.row.cpu().numpy(),
            "task": c.task.cpu().numpy(),
            "uses": c.uses.cpu().numpy(),
            "utility": c.utility.cpu().numpy(),
            "noise": c.noise.cpu().numpy(),
            "chosen": c.chosen.cpu().numpy(),
        })
        for arm, c in zip(rnd.arms, rnd.candidates, strict=True)
    ]  # fmt: skip
    with atomic_path(folder / f"round-{rnd.number:05d}.parquet", durable=True) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary)
