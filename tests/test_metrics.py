"""Metrics under stable names: a line a round, and what trackers get of it."""

from __future__ import annotations

import json

import pytest
from same_run import PREPARE, finished

from lead_fast.files import read_jsonl
from lead_fast.metrics import TRAINING_PARTS, tracked

STEP = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "train/supervised_tokens", "train/step_seconds"}
ROUND = {"lead/round", "lead/arm", "lead/reward", "lead/scaled_reward", "lead/mean_loss", "lead/samples", "lead/quarantined",
         "lead/steps", "lead/tokens", "lead/supervised_tokens", "lead/rows_used", "lead/progress", "lead/prob_0",
         "lead/calibration_c", "lead/seconds_step",
         "lead/seconds_estimate", "lead/tokens_per_second", "lead/estimation_share", "lead/peak_mib"}  # fmt: skip


@pytest.fixture(scope="module")
def run(reference):
    _, out = reference("lora")
    return read_jsonl(out / "rounds.jsonl"), json.loads((out / "summary.json").read_text()), out


def test_every_step_and_round_is_measured(run):
    rounds, summary, _ = run
    for record in rounds:
        steps = record["steps"]
        assert steps > 0
        for name in ("step_losses", "step_grad_norms", "step_tokens", "step_items", "learning_rates"):
            assert len(record[name]) == steps, name
        assert sum(record["step_tokens"]) == record["tokens"] and sum(record["step_items"]) == record["supervised_tokens"]
        mean = (
            sum(x * n for x, n in zip(record["step_losses"], record["step_items"], strict=True)) / record["supervised_tokens"]
        )
        assert mean == pytest.approx(record["mean_loss"])
        assert all(norm > 0.0 for norm in record["step_grad_norms"])
        performance, spent = record["performance"], sum(record["seconds"].get(part, 0.0) for part in TRAINING_PARTS)
        assert performance["tokens_per_second"] == pytest.approx(record["tokens"] / spent, rel=1e-3)
        assert 0.0 < performance["estimation_share"] < 1.0
        assert 0.0 < sum(performance["step_seconds"]) < sum(record["seconds"].values())
        assert 10.0 < performance["peak_mib"] < 1e6
    assert summary["tokens_per_second"] > 0.0 and 0.0 < summary["estimation_share"] < 1.0
    assert summary["peak_mib"] >= rounds[-1]["performance"]["peak_mib"]


def test_trackers_get_stable_names(run):
    record = run[0][-1]
    lines = list(tracked(record, 11))
    assert [step for step, _ in lines] == list(range(11, 11 + record["steps"]))
    for _, values in lines[:-1]:
        assert values.keys() == STEP
    assert lines[-1][1].keys() >= STEP | ROUND
    assert all(isinstance(value, int | float) for _, values in lines for value in values.values())
    # What was not finite or not there is left out.
    holes = record | {"reward": None, "step_losses": [None] * record["steps"]}
    assert not {"lead/reward", "train/loss"} & list(tracked(holes, 1))[-1][1].keys()


def test_the_report_shows_steps_and_time(run):
    text = (run[2] / "report.html").read_text()
    for part in ("gradient norm", "learning rate", "share of the time", "tokens per second", "observing, clocks"):
        assert part in text, part


def test_a_tracker_gets_the_run(runs, reference, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options, expected = reference("lora")
    out = tmp_path / "run"
    finished(runs.start([*options, "--out", str(out), "--report-to", "tensorboard"]))
    assert (out / "selected.jsonl").read_bytes() == (expected / "selected.jsonl").read_bytes()
    records = read_jsonl(out / "rounds.jsonl")
    events = EventAccumulator(str(out / "trackers" / "lead-fast"))
    events.Reload()
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([loss for record in records for loss in record["step_losses"]], rel=1e-6)
    assert [event.value for event in events.Scalars("lead/arm")] == [record["arm"] for record in records]


def test_a_resumed_run_goes_on_in_its_tracker(runs, reference, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options, _ = reference("lora")
    out = tmp_path / "run"
    command = [*options, "--out", str(out), "--report-to", "tensorboard"]
    run = runs.start(command, hold=["rename", ".writing", 9])
    assert run.wait_until_held()
    run.kill()
    finished(runs.start([*command, "--resume"]))
    events = EventAccumulator(str(out / "trackers" / "lead-fast"))
    events.Reload()
    steps = [event.step for event in events.Scalars("train/loss")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == sum(r["steps"] for r in read_jsonl(out / "rounds.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"), [("nothing", "report_to: expected some of "), ("comet_ml", "report_to: comet_ml is not installed")]
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_done(name, message, runs, reference, tmp_path):
    reference("lora")
    pool, out = reference.folder / "pool.jsonl", tmp_path / "run"
    run = runs.start(["train", "--pool", str(pool), *PREPARE, "--out", str(out), "--report-to", name])
    assert run.wait() == 1
    assert message in run.log.read_text() and "Traceback" not in run.log.read_text()
    assert not out.exists()
