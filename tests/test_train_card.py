"""Training on a real card: the engine's rounds wait for nothing, and whole runs take the card's attention and precision."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_state_card import no_synchronisation

import lead_fast as lf
from lead_fast.cli import main
from lead_fast.demo_pool import demo_rows
from lead_fast.files import read_jsonl, write_jsonl

pytestmark = pytest.mark.cuda
OPTIONS = [
    "--model-config", "tiny", "--pretrain-epochs", "2", "--max-length", "128", "--step-tokens", "256",
    "--budget", "24", "--min-rounds", "6", "--num-arms", "3", "--tasks-per-arm", "2", "--warmup-share", "0.1",
    "--checkpoint-rounds", "2",
]  # fmt: skip


def samples_of(count, seed):
    g = torch.Generator(device="cuda").manual_seed(seed)
    loss, grad = torch.rand(2, count, device="cuda", generator=g)
    ones = torch.ones_like(loss)
    return lf.SampleStats(loss=loss, num_tokens=9 * ones, logit_grad_sq=ones, hidden_grad_sq=ones, grad_norm_sq=grad)


def test_a_round_waits_for_the_card_at_its_choice_alone():
    g = np.random.default_rng(0)
    pool = lf.Pool.from_arrays(arm=g.integers(0, 3, 600), task=g.integers(0, 4, 600), utility=g.gamma(4.0, 0.5, 600))
    engine = lf.LeadEngine(pool, lf.LeadConfig(budget=1.0, max_uses=3, rate=0.1, min_rounds=15), "cuda")
    engine.shadow(["none"])
    engine.record_visits = True
    for number in range(1, 9):
        rows = engine.begin_round().rows.cuda()
        batches = [(part, samples_of(len(part), number)) for part in rows.split(8)]
        with no_synchronisation():
            for part, samples in batches:
                engine.observe(part, samples)
                engine.step(lr=1e-4, num_items=72)
            report = engine.end_round()
        assert report.num_samples == len(rows) == len(report.visits["row"])
        assert torch.equal(report.visits["observed"], torch.cat([samples.loss for _, samples in batches]).cpu())


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_run_takes_what_the_card_has_and_resumes(tuning, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("LEAD_FAST_CACHE", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "pool.jsonl", demo_rows(200, seed=1))
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["train", "--pool", str(tmp_path / "pool.jsonl"), "--out", str(out), "--tuning", tuning, *OPTIONS]) == 0
    assert "attention runs sample by sample" not in caplog.text
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rows"] == summary["budget"] > 4 and summary["precision"] == "bf16" and np.isfinite(summary["final_loss"])
    losses = [record["mean_loss"] for record in read_jsonl(out / "rounds.jsonl")]
    assert np.isfinite(losses).all()

    shutil.copytree(out, again)
    for path in ("summary.json", "report.html", "selected.jsonl"):
        (again / path).unlink()
    shutil.rmtree(again / "model")
    shutil.rmtree(max((again / "checkpoints").iterdir()))  # the newest: two rounds and more are made again
    options = ["--tuning", tuning, *OPTIONS]
    assert main(["train", "--pool", str(tmp_path / "pool.jsonl"), "--out", str(again), "--resume", *options]) == 0
    assert len(read_jsonl(again / "rounds.jsonl")) == len(losses)
    assert read_jsonl(again / "selected.jsonl")[: len(losses) // 2] == read_jsonl(out / "selected.jsonl")[: len(losses) // 2]
