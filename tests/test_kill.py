"""Runs killed by SIGKILL and resumed give what the run that was not killed gives, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
import time
from dataclasses import dataclass

import pytest
from same_run import METHODS, assert_same_run, finished, rounds_of

FSYNCS = 7  # of one checkpoint before its rename: six files and their folder


@dataclass
class Kills:
    """How the kills of a test went: all of them, and those between a checkpoint's first byte and its rename."""

    total: int = 0
    in_window: int = 0


def writing(out):
    """True when a checkpoint was being written: its first byte is on the way, its name is not there yet."""
    return any(file.stat().st_size for file in out.glob("checkpoints/.step-*.writing/*"))


def kill_until_finished(runs, options, out, faults, kills):
    """Starts or resumes the run into `out` again and again, each time with the next fault, and then without.

    Args:
        faults: {"hold": ...}: killed where it stands still; {"after": seconds}: killed then.
    """
    command = [*options, "--out", str(out), "--resume"]
    for fault in faults:
        run = runs.start(command, **fault)
        if "after" in fault:
            time.sleep(fault["after"])
        elif not run.wait_until_held():
            finished(run)
            return
        status = run.kill()
        if status == 0:
            return
        assert status == -signal.SIGKILL, run.log.read_text()
        kills.total += 1
        kills.in_window += writing(out)
    finished(runs.start(command))


def test_a_run_killed_three_times_is_the_run_that_was_not_killed(runs, reference, tmp_path):
    options, expected = reference("lora")
    kills = Kills()
    # In the first file of the checkpoint after the third round, whose line then stands beyond the last checkpoint; before the
    # rename of a later one; and before the first byte of one.
    after_round = sum(line["steps"] for line in rounds_of(expected)[:3])
    faults = [
        {"hold": ["fsync", ".writing", 1 + (after_round - 1) * FSYNCS]},
        {"hold": ["rename", ".writing", 5]},
        {"hold": ["fsync", "rounds.jsonl", 7]},
    ]
    kill_until_finished(runs, options, tmp_path / "run", faults, kills)
    assert kills.total == 3 and kills.in_window == 2
    assert_same_run(tmp_path / "run", expected)


def seeded_faults(r, number):
    """Half of the kills inside a checkpoint: held at a random call, or slowed so that a random moment falls in files half
    written; the others at any moment of a run."""
    for _ in range(number):
        checkpoint = r.randint(0, 12)
        yield r.choice([
            {"hold": ["fsync", ".writing", checkpoint * FSYNCS + r.randint(1, FSYNCS)]},
            {"hold": ["rename", ".writing", 1 + checkpoint]},
            {"after": r.uniform(0.0, 3.0)},
            {"after": r.uniform(0.5, 3.0), "slow": 0.02},
        ])  # fmt: skip


@pytest.mark.kill
@pytest.mark.timeout(1800)
def test_fifty_kills(runs, reference, tmp_path, capsys):
    r = random.Random(2026)
    kills, chains = Kills(), {method: 0 for method in METHODS}
    while kills.total < 50 or kills.in_window < 20:
        method = min(chains, key=lambda name: chains[name])
        options, expected = reference(method)
        out = tmp_path / f"run-{method}"
        kill_until_finished(runs, options, out, seeded_faults(r, 6), kills)
        assert_same_run(out, expected)
        shutil.rmtree(out)
        chains[method] += 1
    with capsys.disabled():
        print(f"\n{kills.total} kills, {kills.in_window} of them between a checkpoint's first byte and its rename; "
              f"runs resumed to the end: {chains}; all as the run that was not killed")  # fmt: skip
