"""Small runs that others are compared with, file by file and bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from forked_runs import Run, Runs

from lead_fast.demo_pool import demo_rows
from lead_fast.files import read_jsonl, write_jsonl

PREPARE = ["--model-config", "tiny", "--pretrain-epochs", "1", "--max-length", "128", "--step-tokens", "256",
           "--num-arms", "3", "--tasks-per-arm", "2", "--warmup-share", "0.1"]  # fmt: skip
# Rounds of several optimizer steps each, and a checkpoint at every step boundary.
TRAIN = ["--max-length", "128", "--step-tokens", "64", "--budget", "24", "--min-rounds", "8", "--checkpoint-minutes", "1e-9"]
METHODS = {
    "lora": ["--log-utilities", "--eval-every", "5"],
    "historical": ["--estimator", "historical", "--accumulation", "2", "--checkpoint-minutes", "0", "--checkpoint-rounds", "1"],
    "full": ["--tuning", "full", "--preset", "paper", "--min-rounds", "8"],
}


class References:
    """Runs that nothing interrupts, one a method, each made once.

    Args:
        runs: makes them.
        folder: gets pools, prepared pools and runs.
    """

    def __init__(self, runs: Runs, folder: Path) -> None:
        self.runs, self.folder = runs, folder
        self._options: dict[str, list[str]] = {}
        write_jsonl(folder / "pool.jsonl", demo_rows(200, seed=1))
        write_jsonl(folder / "heldout.jsonl", demo_rows(20, seed=2, noisy=0.0, duplicates=0.0))

    def __call__(self, method: str) -> tuple[list[str], Path]:
        """The command line of a method but for --out, and the folder of its run."""
        out = self.folder / f"reference-{method}"
        if method not in self._options:
            prepared = str(self.folder / f"prepared-{method}")
            tuning = ["--tuning", "full"] if method == "full" else []
            finished(
                self.runs.start(["prepare", "--pool", str(self.folder / "pool.jsonl"), "--out", prepared, *PREPARE, *tuning])
            )
            heldout = str(self.folder / "heldout.jsonl")
            options = ["train", "--pool", prepared, "--heldout", heldout, *TRAIN, *METHODS[method]]
            finished(self.runs.start([*options, "--out", str(out)]))
            self._options[method] = options
        return self._options[method], out


def finished(run: Run) -> None:
    """Waits for the end of a run, which must be a good one."""
    status = run.wait()
    assert status == 0, run.log.read_text()


def wait_for_rounds(run: Run, out: Path, number: int) -> None:
    """Returns when rounds.jsonl has so many lines."""
    path = out / "rounds.jsonl"
    run.wait_until(lambda: path.exists() and path.read_bytes().count(b"\n") >= number)


def rounds_of(out: Path) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl but for what was timed."""
    return [{k: v for k, v in line.items() if k not in ("seconds", "performance")} for line in read_jsonl(out / "rounds.jsonl")]


def assert_same_training(out: Path, reference: Path) -> None:
    """What was chosen, logged, re-scored and learned is the same, bit for bit, but for what was timed."""
    assert (out / "selected.jsonl").read_bytes() == (reference / "selected.jsonl").read_bytes()
    assert rounds_of(out) == rounds_of(reference)
    weights = [path.name for path in (reference / "model").glob("*.safetensors")]
    assert weights
    for name in weights:
        assert (out / "model" / name).read_bytes() == (reference / "model" / name).read_bytes(), name
    for kind in ("utilities", "audit"):
        names = [sorted(path.name for path in folder.glob(f"{kind}/*.parquet")) for folder in (out, reference)]
        assert names[0] == names[1]
        for name in names[0]:
            assert pq.read_table(out / kind / name).equals(pq.read_table(reference / kind / name)), name
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (out, reference))
    for timed in (
        "out",
        "model",
        "processes",
        "seconds",
        "seconds_by_part",
        "tokens_per_second",
        "estimation_share",
        "peak_mib",
    ):
        del one[timed], two[timed]
    assert one == two


def assert_same_run(out: Path, reference: Path) -> None:
    """Everything that two runs wrote is the same, but for what was timed; nothing half written is left of either."""
    assert_same_training(out, reference)
    # The last checkpoint is of the same step, and holds the same tensors.
    one, two = (max(folder.glob("checkpoints/step-*[0-9]")) for folder in (out, reference))
    assert one.name == two.name
    for path in two.glob("*.safetensors"):
        assert (one / path.name).read_bytes() == path.read_bytes(), path.name
    assert not [*out.rglob(".*.tmp"), *out.rglob(".step-*")]
