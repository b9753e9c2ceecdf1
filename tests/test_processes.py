"""Several processes train as one: the same choices, the same weights; one that dies loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from same_run import METHODS, PREPARE, assert_same_training, finished, rounds_of, wait_for_rounds

from lead_fast.checkpoint import Checkpoints
from lead_fast.pool import Pool

AUDIT = ["--audit-every", "4", "--audit-rows", "12"]


def statuses(ranks):
    return [rank.wait() for rank in ranks]


def finished_ranks(ranks):
    assert statuses(ranks) == [0] * len(ranks), "\n".join(rank.log.read_text() for rank in ranks)


def options_of(reference, method):
    """The command line of a method without its accumulation."""
    options, _ = reference(method)
    if "--accumulation" in options:
        at = options.index("--accumulation")
        options = options[:at] + options[at + 2 :]
    return options


@pytest.fixture(scope="module")
def one_process(runs, reference, tmp_path_factory):
    """A function: the run of one process that accumulates over two micro-batches, made once a method."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def run(method):
        if method not in made:
            made[method] = folder / method
            options = [*options_of(reference, method), "--accumulation", "2", *AUDIT]
            finished(runs.start([*options, "--out", str(made[method])]))
        return made[method]

    return run


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_that_accumulates_over_two_micro_batches(method, runs, reference, one_process, tmp_path):
    expected = one_process(method)
    ranks = runs.start_ranks([*options_of(reference, method), *AUDIT, "--out", str(tmp_path / "run")])
    finished_ranks(ranks)
    assert_same_training(tmp_path / "run", expected)
    assert json.loads(ranks[0].log.read_text().splitlines()[-1])["rounds"] > 8
    assert ranks[1].log.read_text() == ""  # one process speaks


def test_three_processes_learn_what_one_learns(runs, reference, tmp_path):
    """Steps of one to three micro-batches over three processes: some have nothing to do at the end of a step."""
    options = options_of(reference, "lora")
    one, three = tmp_path / "one", tmp_path / "three"
    finished(runs.start([*options, "--accumulation", "3", "--out", str(one)]))
    finished_ranks(runs.start_ranks([*options, "--out", str(three)], world=3))
    expected, got = rounds_of(one), rounds_of(three)
    assert [r["rows"] for r in got] == [r["rows"] for r in expected] and len(expected) >= 8
    for name in ("step_losses", "step_grad_norms", "mean_sample_loss"):  # a third is no power of 2: the last bits differ
        np.testing.assert_allclose(
            np.hstack([r[name] for r in got]), np.hstack([r[name] for r in expected]), rtol=1e-4, err_msg=name
        )
    assert [r["step_items"] for r in got] == [r["step_items"] for r in expected]


def test_a_process_that_dies_ends_the_run_and_leaves_a_checkpoint(runs, reference, one_process, tmp_path):
    options, out = [*options_of(reference, "lora"), *AUDIT], tmp_path / "run"
    # Killed while the first process stands in the middle of a checkpoint, and waits for it ever after.
    ranks = runs.start_ranks([*options, "--out", str(out)], faults={0: {"hold": ["rename", ".writing", 4]}})
    assert ranks[0].wait_until_held()
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert ranks[1].wait() == -signal.SIGKILL
    assert ranks[0].kill() == -signal.SIGKILL
    before = [path.name for path in Checkpoints(out / "checkpoints").paths()]
    assert len(before) == 2
    assert Checkpoints(out / "checkpoints").load().state["run"]["open"] is not None  # in the middle of a round

    command = [*options, "--out", str(out), "--resume"]
    ranks = runs.start_ranks(command)
    wait_for_rounds(ranks[0], out, 6)
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert statuses(ranks) == [1, -signal.SIGKILL]
    log = ranks[0].log.read_text()
    assert "another process of the run has ended or cannot be reached" in log and "Traceback" not in log
    newest = Checkpoints(out / "checkpoints").load()
    assert newest.path.name > before[-1]
    assert f"the last checkpoint is {newest.path.name}; go on with: lead-fast train --resume --out {out}" in log

    finished_ranks(runs.start_ranks(command))
    assert_same_training(out, one_process("lora"))


def test_another_number_of_processes_goes_on_in_the_middle_of_a_round(runs, reference, one_process, tmp_path):
    options, out = [*options_of(reference, "lora"), *AUDIT], tmp_path / "run"
    ranks = runs.start_ranks([*options, "--out", str(out)], faults={0: {"hold": ["rename", ".writing", 4]}})
    assert ranks[0].wait_until_held()
    assert [rank.kill() for rank in reversed(ranks)] == [-signal.SIGKILL] * 2  # the first stands still and notices nothing
    inside = Checkpoints(out / "checkpoints").load().state
    assert inside["run"]["open"] is not None and len(inside["engine"]["open"]["shards"]) == 2
    finished_ranks(runs.start_ranks([*options, "--out", str(out), "--resume"], world=3))
    expected, got = rounds_of(one_process("lora")), rounds_of(out)
    assert [r["rows"] for r in got] == [r["rows"] for r in expected]
    assert [r["visits"]["count"] for r in got] == [r["visits"]["count"] for r in expected]
    np.testing.assert_allclose(
        np.hstack([r["step_losses"] for r in got]), np.hstack([r["step_losses"] for r in expected]), rtol=1e-4
    )


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(runs, reference, one_process, tmp_path):
    options, out = [*options_of(reference, "lora"), *AUDIT], tmp_path / "run"
    command = [*options, "--out", str(out), "--resume"]
    never = ["--checkpoint-minutes", "0", "--checkpoint-rounds", "0"]
    ranks = runs.start_ranks([*command, *never])
    wait_for_rounds(ranks[0], out, 2)
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert statuses(ranks) == [143, 143]
    log = ranks[0].log.read_text()
    assert re.search(r"interrupted; the last checkpoint is step-\d+; go on with", log) and "Traceback" not in log
    assert len(Checkpoints(out / "checkpoints").paths()) == 1
    finished_ranks(runs.start_ranks(command))
    assert_same_training(out, one_process("lora"))


def test_a_first_process_that_is_slow_still_writes_before_all_end(runs, reference, tmp_path):
    """As under torchrun, which sends SIGTERM to the others as soon as one has ended."""
    options, out = [*options_of(reference, "lora"), *AUDIT], tmp_path / "run"
    never = ["--checkpoint-minutes", "0", "--checkpoint-rounds", "0"]
    ranks = runs.start_ranks([*options, *never, "--out", str(out)], faults={0: {"slow": 0.3}})
    wait_for_rounds(ranks[0], out, 2)
    for rank in ranks:
        os.kill(rank.pid, signal.SIGTERM)
    ranks[0].wait_until(lambda: "SIGTERM" in ranks[0].log.read_text())
    os.kill(ranks[0].pid, signal.SIGTERM)  # no second request
    assert ranks[1].wait() == 143
    (path,) = Checkpoints(out / "checkpoints").paths()  # there when the first of them ends
    assert ranks[0].wait() == 143
    assert f"the last checkpoint is {path.name}" in ranks[0].log.read_text()
    assert "checkpoint is step" not in ranks[1].log.read_text()


def test_what_the_first_process_refuses_ends_all_with_its_words(runs, reference, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "file").touch()
    ranks = runs.start_ranks([*options_of(reference, "lora"), "--out", str(out)])
    assert statuses(ranks) == [1, 1]
    assert "is not empty; name another folder" in ranks[0].log.read_text()
    assert ranks[1].log.read_text() == ""


def test_torchrun_from_a_raw_pool(runs, reference, tmp_path):
    """By the launcher itself; the processes share warm-up and scoring, and find what one process finds."""
    reference("lora")
    options = ["train", "--pool", str(reference.folder / "pool.jsonl"), *PREPARE, "--budget", "20", "--min-rounds", "5"]
    one, two = tmp_path / "one", tmp_path / "two"
    finished(runs.start([*options, "--accumulation", "2", "--out", str(one)]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lead_fast"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LEAD_FAST_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*torchrun, *options, "--out", str(two)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 20
    expected, got = (Pool.load(folder / "prepared" / "pool") for folder in (one, two))
    np.testing.assert_allclose(got.utility, expected.utility, rtol=1e-4)
    np.testing.assert_allclose(got.difficulty, expected.difficulty, rtol=1e-3)
    assert np.array_equal(got.num_tokens, expected.num_tokens)
    assert not [*two.rglob(".*.tmp")]
