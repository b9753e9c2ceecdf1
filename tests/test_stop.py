"""Runs that are told to stop, or cannot go on: a clear message, the last good checkpoint intact, the same run in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from same_run import PREPARE, assert_same_run, finished, wait_for_rounds

from lead_fast.checkpoint import Checkpoints
from lead_fast.cli import main
from lead_fast.loading import build_model, save_model
from lead_fast.offline.pretrain import train_tokenizer
from lead_fast.optimization import Optimization
from lead_fast.resume import locked
from lead_fast.run import RunFolderError, claim_folder

CHECKPOINT_BYTES = 7_300_000  # about; of the run used here


def checkpoints_of(out):
    """The steps of the checkpoints, of which the newest must be good."""
    checkpoints = Checkpoints(out / "checkpoints")
    assert checkpoints.load().path == checkpoints.paths()[-1]
    return [path.name for path in checkpoints.paths()]


@pytest.fixture
def interrupted(runs, reference, tmp_path):
    """The command line and the folder of a run that stands still, killed before the rename of its ninth checkpoint."""
    options, _ = reference("lora")
    out = tmp_path / "run"
    run = runs.start([*options, "--out", str(out)], hold=["rename", ".writing", 9])
    assert run.wait_until_held() and run.kill() == -signal.SIGKILL
    return [*options, "--out", str(out), "--resume"], out


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_at_the_next_step(signum, status, runs, reference, tmp_path):
    options, expected = reference("lora")
    out = tmp_path / "run"
    never = ["--checkpoint-minutes", "0", "--checkpoint-rounds", "0"]
    run = runs.start([*options, *never, "--out", str(out)])
    wait_for_rounds(run, out, 3)
    os.kill(run.pid, signum)
    assert run.wait() == status
    log = run.log.read_text()
    (name,) = checkpoints_of(out)
    assert f"interrupted; the last checkpoint is {name}; go on with: lead-fast train --resume --out {out}" in log
    assert "Traceback" not in log and '"rounds"' not in log
    finished(runs.start(["train", "--resume", "--out", str(out), "--checkpoint-minutes", "1e-9"]))
    assert_same_run(out, expected)


def test_a_second_signal_stops_at_once(runs, reference, tmp_path):
    options, _ = reference("lora")
    out = tmp_path / "run"
    run = runs.start([*options, "--out", str(out)], hold=["fsync", ".writing", 22])
    assert run.wait_until_held()
    before = checkpoints_of(out)
    os.kill(run.pid, signal.SIGTERM)
    run.wait_until(lambda: "SIGTERM" in run.log.read_text())
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 143
    assert checkpoints_of(out) == before and not list(out.glob("checkpoints/.*"))


def test_sigterm_ends_the_preparation_cleanly(reference, tmp_path):
    """By a process of its own, as a scheduler starts and stops it."""
    command = [sys.executable, "-m", "lead_fast.cli", "train", "--pool", str(reference.folder / "pool.jsonl")]
    if not (reference.folder / "pool.jsonl").exists():
        reference("lora")
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run"), "--model-config", "tiny", "--pretrain-epochs", "500"],
        env=os.environ | {"LEAD_FAST_CACHE": str(tmp_path / "cache")}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    seen = ""
    while "pretraining" not in seen:
        character = process.stderr.read(1)
        assert character, seen  # it ended before
        seen += character
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "interrupted; finished stages are kept; go on with --resume" in error and "Traceback" not in error
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_file_that_outgrows_its_limit(runs, reference, interrupted):
    """RLIMIT_FSIZE: the process cannot write the optimizer's file whole."""
    command, out = interrupted
    before = checkpoints_of(out)
    run = runs.start(command, file_limit=CHECKPOINT_BYTES // 2)
    assert run.wait() == 1
    log = run.log.read_text()
    assert "the disk is full" in log and "free some space" in log and f"the last checkpoint is {before[-1]}" in log
    assert "Traceback" not in log and "Exception ignored" not in log
    assert checkpoints_of(out) == before and not list(out.glob("checkpoints/.*"))
    finished(runs.start(command))
    assert_same_run(out, reference("lora")[1])


@pytest.mark.parametrize(
    ("limit", "message"),
    [(20_000, "the disk of the cache {cache} is full ("), (400_000, "the disk is full (")],
    ids=["the cache", "a stage"],
)
def test_a_preparation_that_finds_no_room(limit, message, runs, reference, tmp_path, small_model):
    pool, cache = reference.folder / "pool.jsonl", tmp_path / "cache"
    options = ["prepare", "--pool", str(pool), "--model", str(small_model), "--out", str(tmp_path / "out"), *PREPARE[4:]]
    run = runs.start(options, file_limit=limit, environment={"LEAD_FAST_CACHE": str(cache)})
    assert run.wait() == 1
    log = run.log.read_text()
    assert message.format(cache=cache) in log and "free some space" in log and "Traceback" not in log
    assert not list(tmp_path.rglob("*.tmp"))
    again = ["--resume"] if "repeat the command with --resume" in log else []
    finished(runs.start([*options, *again], environment={"LEAD_FAST_CACHE": str(cache)}))


@pytest.fixture
def small_model(tmp_path):
    tokenizer = train_tokenizer(["some words to learn from, 1 2 3. " * 9], 400)
    save_model(build_model("tiny", tokenizer, seed=0, device=torch.device("cpu")), tokenizer, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def small_disk(tmp_path):
    """A function: mounts a file system of so many bytes, or changes the options of the one mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options):
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not mount a file system: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_and_a_read_only_one(runs, reference, small_disk):
    options, expected = reference("lora")
    # Two checkpoints have room, the third has not.
    out = small_disk(f"size={CHECKPOINT_BYTES * 5 // 2}") / "run"
    run = runs.start([*options, "--out", str(out)])
    assert run.wait() == 1
    before, log = checkpoints_of(out), run.log.read_text()
    assert len(before) == 2 and not list(out.glob("checkpoints/.*"))
    assert "the disk is full ([Errno 28] No space left on device" in log and f"the last checkpoint is {before[-1]}" in log
    assert f"go on with: lead-fast train --resume --out {out}" in log
    assert "Traceback" not in log and "Exception ignored" not in log

    small_disk("ro")
    run = runs.start([*options, "--out", str(out), "--resume"])
    assert run.wait() == 1
    assert "the folder cannot be written ([Errno 30] Read-only file system" in run.log.read_text()
    assert checkpoints_of(out) == before

    small_disk("rw,size=64m")
    finished(runs.start([*options, "--out", str(out), "--resume"]))
    assert_same_run(out, expected)


def test_a_disk_that_is_full_to_the_last_byte(runs, reference, small_disk):
    """Not even a line of rounds.jsonl finds room."""
    options, expected = reference("lora")
    disk = small_disk("size=4m")
    out = disk / "run"
    never = ["--checkpoint-minutes", "0"]
    run = runs.start([*options, *never, "--out", str(out)])
    wait_for_rounds(run, out, 2)
    with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
    assert run.wait() == 1
    log = run.log.read_text()
    assert "the disk is full ([Errno 28]" in log and "no checkpoint was written yet" in log
    assert "Traceback" not in log and "Exception ignored" not in log
    (disk / "filler").unlink()
    small_disk("size=64m")
    finished(runs.start([*options, "--out", str(out), "--resume"]))
    assert_same_run(out, expected)


def test_a_file_in_the_way(runs, reference, tmp_path):
    options, expected = reference("lora")
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(expected / "config.yaml", out)
    (out / "checkpoints").write_text("mine")
    run = runs.start([*options, "--out", str(out), "--resume"])
    assert run.wait() == 1
    log = run.log.read_text()
    assert f"the folder cannot be written ([Errno 17] File exists: '{out / 'checkpoints'}')" in log and "Traceback" not in log
    assert (out / "checkpoints").read_text() == "mine"


def test_a_folder_without_permission(runs, reference, interrupted):
    command, out = interrupted
    before = checkpoints_of(out)
    (out / "checkpoints").chmod(0o500)
    if os.access(out / "checkpoints", os.W_OK):
        pytest.skip("root writes where permissions forbid it; a read-only disk is tried instead")
    run = runs.start(command)
    assert run.wait() == 1
    assert "the folder cannot be written ([Errno 13] Permission denied" in run.log.read_text()
    (out / "checkpoints").chmod(0o700)
    assert checkpoints_of(out) == before
    finished(runs.start(command))
    assert_same_run(out, reference("lora")[1])


def not_finite(optimization, *arguments):
    with torch.no_grad():
        for parameter in optimization.bare.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    return Optimization.whole_step(optimization, *arguments)


def too_much_memory(optimization, *arguments):
    torch.empty(2**50)


def too_much_cuda_memory(optimization, *arguments):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total capacity of 3 GiB")


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (not_finite, "holds NaN or infinity, so none was written; lower --learning-rate"),
        (too_much_memory, "memory ran out ("),
        (too_much_cuda_memory, "memory ran out (CUDA out of memory. Tried to allocate 20.00 GiB.): free some"),
    ],
)
def test_a_step_that_fails_leaves_the_last_good_checkpoint(step, message, reference, interrupted, monkeypatch, capfd):
    command, out = interrupted
    before = checkpoints_of(out)
    with monkeypatch.context() as patch:
        patch.setattr(Optimization, "whole_step", Optimization.step, raising=False)
        patch.setattr(Optimization, "step", step)
        assert main(command) == 1
    error = capfd.readouterr().err
    assert message in error and f"the last checkpoint is {before[-1]}; go on with: lead-fast train --resume" in error
    assert checkpoints_of(out) == before
    assert main(command) == 0
    assert_same_run(out, reference("lora")[1])


def test_a_loss_that_is_not_finite(runs, reference, tmp_path):
    """A whole round without a finite loss: a learning rate that no model survives."""
    options, _ = reference("lora")
    out = tmp_path / "run"
    run = runs.start([*options, "--out", str(out), "--learning-rate", "1e30"])
    assert run.wait() == 1
    log = run.log.read_text()
    assert "the loss is not finite" in log and "lower --learning-rate" in log and "the last checkpoint is" in log
    assert "Traceback" not in log
    checkpoints_of(out)


def test_a_damaged_checkpoint_is_named_and_the_one_before_gives_the_same_run(runs, reference, interrupted):
    command, out = interrupted
    older, newest = checkpoints_of(out)
    path = out / "checkpoints" / newest / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    run = runs.start(command)
    finished(run)
    log = run.log.read_text()
    assert f"checkpoint {path.parent} is damaged and not used: {path}: expected sha256" in log
    assert f"going on from {out / 'checkpoints' / older}" in log
    assert (out / "checkpoints" / f"{newest}.damaged").is_dir()
    assert_same_run(out, reference("lora")[1])


def test_no_usable_checkpoint_ends_the_run(runs, interrupted):
    command, out = interrupted
    for name in checkpoints_of(out):
        (out / "checkpoints" / name / "state.json").unlink()
    run = runs.start(command)
    assert run.wait() == 1
    log = run.log.read_text()
    assert "no checkpoint is usable; remove the folder to begin the rounds again" in log and "go on with" not in log


def test_what_a_checkpoint_needs_of_rounds_jsonl_is_missed(runs, interrupted):
    command, out = interrupted
    (out / "rounds.jsonl").write_bytes((out / "rounds.jsonl").read_bytes()[:100])
    run = runs.start(command)
    assert run.wait() == 1
    assert "rounds.jsonl: step-" in run.log.read_text() and "got 100" in run.log.read_text()


def test_rounds_jsonl_must_be_what_a_checkpoint_was_written_with(runs, interrupted):
    command, out = interrupted
    path = out / "rounds.jsonl"
    content = path.read_bytes()
    for damaged in (content[:50] + b"?" * 10 + content[60:], content.replace(b'"round": 1', b'"round": 9', 1)):
        path.write_bytes(damaged)
        run = runs.start(command)
        assert run.wait() == 1
        log = run.log.read_text()
        assert f"{path}: its first" in log and "are not those that step-" in log and "Traceback" not in log
    path.write_bytes(content)
    finished(runs.start(command))


def test_changed_options_are_refused_by_name(runs, interrupted):
    command, out = interrupted
    before = checkpoints_of(out)
    began = yaml.safe_load((out / "config.yaml").read_text())
    run = runs.start([*command, "--learning-rate", "0.5", "--gamma", "0.2", "--eval-every", "1"])
    assert run.wait() == 1
    log = run.log.read_text()
    assert "resume: learning_rate (began with None, got 0.5), gamma (began with 0.1, got 0.2): a run goes on" in log
    assert checkpoints_of(out) == before and yaml.safe_load((out / "config.yaml").read_text()) == began


def test_a_run_that_began_its_rounds_keeps_its_options_without_a_checkpoint_too(interrupted, capfd):
    command, out = interrupted
    shutil.rmtree(out / "checkpoints")
    files = {path: path.read_bytes() for path in (out / "config.yaml", out / "rounds.jsonl")}
    assert main([*command, "--gamma", "0.2"]) == 1
    assert "resume: gamma (began with 0.1, got 0.2)" in capfd.readouterr().err
    assert all(path.read_bytes() == content for path, content in files.items())


def test_rows_that_are_refused_leave_the_run_its_own(interrupted, tmp_path, capfd):
    command, out = interrupted
    began = (out / "config.yaml").read_bytes()
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    assert main([*command, "--heldout", str(tmp_path / "held.jsonl")]) == 1
    error = capfd.readouterr().err
    assert "resume: the held-out rows must be those the run began with" in error and f"in {tmp_path / 'held.jsonl'}" in error
    assert (out / "config.yaml").read_bytes() == began


def test_a_folder_that_is_no_run_is_not_resumed_into(reference, tmp_path, capfd):
    """A run removes what it does not know, and replaces its model."""
    options, _ = reference("lora")
    for name in ("model/weights.safetensors", "audit/thesis.txt", "utilities/notes.txt", "rounds.jsonl"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("precious")
    assert main([*options, "--out", str(tmp_path / "mine"), "--resume"]) == 1
    assert "is not empty and holds no config.yaml of a run: there is nothing to resume" in capfd.readouterr().err
    assert sorted(p.read_text() for p in (tmp_path / "mine").rglob("*") if p.is_file()) == ["precious"] * 4


def test_what_a_run_was_killed_while_writing_is_no_folder_of_others(tmp_path):
    (tmp_path / ".config.yaml.0123abcd.tmp").write_text("a part")
    assert claim_folder(str(tmp_path), resume=True) == tmp_path
    with pytest.raises(RunFolderError, match="is not empty; name another folder"):
        claim_folder(str(tmp_path), resume=False)
    (tmp_path / "notes.tmp").write_text("mine")
    with pytest.raises(RunFolderError, match=r"holds no config\.yaml of a run"):
        claim_folder(str(tmp_path), resume=True)


def test_a_checkpoint_whose_rounds_are_gone_is_passed_over(runs, reference, tmp_path, caplog):
    options, expected = reference("lora")
    command = [*options, "--out", str(out := tmp_path / "run"), "--checkpoint-minutes", "0", "--checkpoint-rounds", "1"]
    run = runs.start(command, hold=["rename", ".writing", 4])
    assert run.wait_until_held() and run.kill() == -signal.SIGKILL
    before, newest = Checkpoints(out / "checkpoints").paths()
    needed = [json.loads((path / "state.json").read_text())["log"]["bytes"] for path in (before, newest)]
    assert 0 < needed[0] < needed[1]
    os.truncate(out / "rounds.jsonl", needed[1] - 1)
    assert main([*command, "--resume"]) == 0
    assert f"{newest.name} needs its first {needed[1]} bytes, got {needed[1] - 1}" in caplog.text
    assert_same_run(out, expected)


def test_one_process_at_a_time(runs, interrupted):
    command, out = interrupted
    with locked(out):
        run = runs.start(command)
        assert run.wait() == 1
        assert f"another process is running in {out}" in run.log.read_text()


def test_a_finished_run_says_so(runs, reference, monkeypatch):
    _, out = reference("lora")
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run = runs.start(["train", "--resume", "--out", str(out)])
    assert run.wait() == 0
    log = run.log.read_text()
    assert "the run is finished, there is nothing to resume" in log and '"rows": 24' in log
    assert files == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_resume_in_the_run_folder(reference, interrupted, monkeypatch):
    _, out = interrupted
    (out / "utilities" / "round-00099.parquet").write_bytes(b"of a round beyond the checkpoint")
    monkeypatch.chdir(out)
    assert main(["train", "--resume"]) == 0
    assert_same_run(out, reference("lora")[1])


def test_rounds_do_not_depend_on_which_stages_ran_before(reference, tmp_path):
    """A run that is killed before its first checkpoint begins its rounds again, with the stages that it had finished."""
    reference("lora")
    model, out, again = (tmp_path / name for name in ("model", "run", "again"))
    shutil.copytree(reference.folder / "prepared-lora" / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.3}))  # so that steps draw
    options = ["--pool", str(reference.folder / "pool.jsonl"), "--model", str(model), "--max-length", "128", "--budget", "8"]
    options += ["--min-rounds", "3", "--warmup-share", "0.1", "--num-arms", "2", "--tasks-per-arm", "2"]
    assert main(["train", *options, "--out", str(out)]) == 0
    shutil.copytree(out / "prepared", again / "prepared")
    shutil.copy(out / "config.yaml", again)
    assert main(["train", *options, "--out", str(again), "--resume"]) == 0
    assert_same_run(again, out)


def test_a_run_resumes_within_its_folder_whatever_paths_it_was_given(runs, reference, tmp_path, monkeypatch):
    options, expected = reference("lora")
    relative = [os.path.relpath(option, tmp_path) if option.startswith(str(reference.folder)) else option for option in options]
    environment = {"LEAD_FAST_CACHE": str(tmp_path / "cache")}
    run = runs.start([*relative, "--out", "run"], folder=str(tmp_path), environment=environment)
    run.wait_until(lambda: any((tmp_path / "run").glob("checkpoints/step-*")))
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait() == 143
    finished(runs.start(["train", "--resume"], folder=str(tmp_path / "run"), environment=environment))
    assert_same_run(tmp_path / "run", expected)


def test_a_finished_run_refuses_other_options_too(reference, tmp_path, capfd):
    options, out = reference("lora")
    assert main([*options, "--out", str(out), "--resume"]) == 0
    assert main([*options, "--out", str(out), "--resume", "--budget", "25"]) == 1
    assert "resume: budget (began with 24, got 25)" in capfd.readouterr().err


def test_resuming_where_no_run_is_says_so(tmp_path, capfd):
    assert main(["train", "--resume", "--out", str(tmp_path / "nothere")]) == 1
    assert "resume: expected the folder of a run" in capfd.readouterr().err
