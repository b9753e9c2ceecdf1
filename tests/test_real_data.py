"""A run over a slice of real data: six sources, real lengths; skipped where the data is not beside the repository."""

import gzip
import itertools
import json
import os
from pathlib import Path

import pytest
from recompute import read_run, recompute

from lead_fast.cli import main
from lead_fast.files import read_jsonl

DATA = Path(os.environ.get("LEAD_FAST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
pytestmark = pytest.mark.skipif(
    not (DATA / "pool.jsonl.gz").exists(), reason="the real pool is absent; set LEAD_FAST_DATA to the folder that has it"
)


def cut(name, rows, folder):
    path = folder / name.removesuffix(".gz")
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        path.write_text("".join(itertools.islice(file, rows)), encoding="utf-8")
    return path


def test_a_slice_trains_from_start_to_end_and_every_choice_can_be_recomputed(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    pool, heldout, out = cut("pool.jsonl.gz", 500, tmp_path), cut("heldout.jsonl.gz", 60, tmp_path), tmp_path / "out"
    code = main([
        "train", "--model-config", "tiny", "--pretrain-epochs", "1", "--pool", str(pool), "--heldout", str(heldout),
        "--out", str(out), "--budget", "0.05", "--max-length", "256", "--warmup-share", "0.05", "--log-utilities",
    ])  # fmt: skip
    assert code == 0
    summary = json.loads(capfd.readouterr().out.splitlines()[-1])
    full = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == round(0.05 * summary["pool"]) == 20
    assert len(full["sources"]) == 6 and sum(s["chosen"] for s in full["sources"]) == summary["rows"]
    assert len(full["evaluations"][-1]["by_source"]) >= 5
    assert {s["id"] for s in read_jsonl(out / "selected.jsonl")} <= {json.loads(x)["id"] for x in pool.open()}
    verdict = recompute(read_run(out))
    assert verdict["rounds"] == summary["rounds"] and verdict["agree"], verdict
