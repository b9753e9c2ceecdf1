"""When a run is saved, from where it goes on, and what a run that stops says."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch.distributed import DistError

from lead_fast.checkpoint import Checkpoint, CheckpointError, Checkpoints
from lead_fast.config import LeadConfig, TrainConfig, read_yaml, to_yaml
from lead_fast.files import is_full, os_error
from lead_fast.interrupts import Interrupted, StopSignals
from lead_fast.optimization import TrainingError
from lead_fast.trainer import TrainingRun
from lead_fast.training_state import TrainingState

logger = logging.getLogger(__name__)

CHECKPOINTS, ROUNDS_FILE, CONFIG_FILE = "checkpoints", "rounds.jsonl", "config.yaml"

# Options that change where a run reads and writes and what it logs, not what it chooses and learns. By their content the pool
# and the held-out rows must be what they were.
FREE_OPTIONS = frozenset({
    "pool", "heldout", "out", "resume", "checkpoint_rounds", "checkpoint_minutes", "eval_every", "log_utilities", "report_to",
    "on_bad_row", "trust_remote_code",
})  # fmt: skip

_LAUNCHER_GRACE = 30.0  # seconds that torchrun leaves its processes after a signal

# gloo says so in a plain RuntimeError.
_LOST_PEER = re.compile(r"gloo.*(closed by peer|reset by peer|broken pipe|refused|timed out)", re.IGNORECASE)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps the run folder for this process: two runs in one folder would overwrite each other.

    The lock ends with the process, however it ends. The folder is made where it is missing, and removed when it stays empty.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"out: another process is running in {folder}") from None
    except OSError as error:  # some network file systems lock no folders
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)
    try:
        yield
    finally:
        os.close(descriptor)
        if not any(folder.iterdir()):
            folder.rmdir()


def check_options(folder: Path, config: TrainConfig, lead: LeadConfig) -> None:
    """Refuses options that differ from those the run began with, where the result would not be that run's.

    Raises:
        ValueError: they are named, each with both values.
    """
    began, now = read_yaml(folder / CONFIG_FILE), yaml.safe_load(to_yaml(config, lead.resolve()))
    defaults = {f.name: f.default for c in (config, lead) for f in dataclasses.fields(c)}
    changed = [
        f"{name} (began with {was!r}, got {value!r})"
        for name, value in now.items()
        # A budget of 1 is one row, and one of 1.0 all of them.
        if name not in FREE_OPTIONS
        and ((was := began.get(name, defaults[name])) != value or (name == "budget" and type(was) is not type(value)))
    ]
    if changed:
        raise ValueError(
            f"resume: {', '.join(changed)}: a run goes on with the options it began with; leave them out, or start a new run"
        )


class RoundLog:
    """rounds.jsonl: a line a round, cut back to what a checkpoint knows of.

    Args:
        path: of the file; None writes nothing: another process does.
        size: its bytes that count; what follows is cut off.
    """

    def __init__(self, path: Path | None, size: int = 0) -> None:
        # Unbuffered: a line that met a full disk must not be written again when the file is closed.
        self._file = None if path is None else path.open("ab", buffering=0)
        self._digest = hashlib.sha256()
        if self._file is not None and path is not None:
            self._file.truncate(size)
            self._digest.update(path.read_bytes())

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line, and hands it to the operating system."""
        if self._file is None:
            return
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._digest.update(line)
        while line:
            line = line[self._file.write(line) :]

    def sync(self) -> dict[str, Any]:
        """Waits until the lines are on the disk; returns what `rounds_of` compares: the file's bytes and their SHA-256."""
        if self._file is None:
            return {"bytes": 0}
        os.fsync(self._file.fileno())
        return {"bytes": os.fstat(self._file.fileno()).st_size, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Checkpointer:
    """Writes checkpoints of a run: when they are due, and when it is told to stop.

    Several processes do so together, at the same optimizer step; the first one writes.

    Args:
        checkpoints: where.
        state: of what.
        config: `checkpoint_rounds` and `checkpoint_minutes`.
        log: rounds.jsonl, whose length is part of a checkpoint.
        stop: asked at every boundary.
        run: at its beginning, or as a checkpoint left it.
        start: `time.monotonic()` at which it would have begun, had it not been interrupted.
    """

    def __init__(
        self, checkpoints: Checkpoints, state: TrainingState, config: TrainConfig, log: RoundLog, stop: StopSignals,
        run: TrainingRun, start: float,
    ) -> None:  # fmt: skip
        self.checkpoints, self.state, self.config, self.log, self.stop = checkpoints, state, config, log, stop
        self.ranks = state.optimization.ranks
        self._steps, self._rounds = run.num_steps, len(run.rounds)
        self._start, self._last = start, time.monotonic()
        self._told = False

    @property
    def seconds(self) -> float:
        """Seconds that the run took, all its parts together."""
        return time.monotonic() - self._start

    def at_boundary(self, run: TrainingRun) -> None:
        """Writes a checkpoint where one is due or a stop was asked for.

        Raises:
            Interrupted: a stop was asked for, and the checkpoint is written.
        """
        rounds, minutes = self.config.checkpoint_rounds, self.config.checkpoint_minutes
        due = minutes > 0.0 and time.monotonic() - self._last >= 60.0 * minutes
        due |= rounds > 0 and run.open is None and len(run.rounds) - self._rounds >= rounds
        self._write_or_stop(run, due)

    def finish(self, run: TrainingRun) -> None:
        """Keeps the state after the last round, so that nothing is lost while the results are written."""
        self._write_or_stop(run, self.config.checkpoint_minutes > 0.0 or self.config.checkpoint_rounds > 0)

    def _write_or_stop(self, run: TrainingRun, due: bool) -> None:
        # A signal may have reached one process only, and clocks differ: all do the same.
        signum, due_somewhere = self.ranks.max_of(self.stop.requested or 0, int(due))
        if signum or due_somewhere:
            self.write(run)
        if signum:
            raise Interrupted(signum, last_checkpoint(self.checkpoints))

    def write(self, run: TrainingRun) -> None:
        """Writes a checkpoint now, unless there is one of this very place."""
        if run.num_steps > self._steps:
            begin = time.monotonic()
            state = self.state.capture(run) | {"log": self.log.sync() | {"seconds": self.seconds}}
            foreign = self._foreign(run.num_steps)
            # All wait: one that ended would have the launcher stop the one that writes.
            path = self.ranks.on_first(lambda: self.checkpoints.write(run.num_steps, state, foreign))
            seconds = time.monotonic() - begin
            logger.debug("checkpoint %s: %.2f s", path, seconds)
            if self.ranks.world > 1 and seconds > 0.5 * _LAUNCHER_GRACE and not self._told:
                self._told = True
                logger.warning(
                    "a checkpoint took %.0f s, and launchers kill processes %.0f s after Ctrl-C or SIGTERM: a stop may lose "
                    "what came since the last one (--checkpoint-minutes)", seconds, _LAUNCHER_GRACE,
                )  # fmt: skip
            self._steps, self._rounds = run.num_steps, len(run.rounds)
        self._last = time.monotonic()

    def _foreign(self, step: int) -> Path | None:
        """A folder with the part of the state that stays in another library's format, written by all processes."""
        if not self.state.optimization.is_zero:
            return None
        folder = self.checkpoints.prepare_foreign(step) if self.ranks.is_first else None
        (folder, *_) = self.ranks.gather(folder)
        self.state.capture_zero(folder)
        self.ranks.wait()
        return folder


def rounds_of(checkpoint: Checkpoint, path: Path) -> list[dict[str, Any]]:
    """The rounds that belong to a checkpoint; the file at `path` must begin with them.

    Raises:
        CheckpointError: it is shorter, or is not what it was.
    """
    log, count = checkpoint.state["log"], checkpoint.state["run"]["num_rounds"]
    size = log["bytes"]
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise CheckpointError(
            f"{path}: {checkpoint.path.name} needs its first {size} bytes, got {found}; restore the file, or begin again with "
            "--pool PREPARED in another folder"
        )
    content = b""
    if size:
        with path.open("rb") as file:
            content = file.read(size)
    if "sha256" in log and hashlib.sha256(content).hexdigest() != log["sha256"]:
        raise CheckpointError(
            f"{path}: its first {size} bytes are not those that {checkpoint.path.name} was written with; restore the file, or "
            "begin again with --pool PREPARED in another folder"
        )
    rounds = [json.loads(line) for line in content.splitlines()]
    if len(rounds) != count:
        raise CheckpointError(f"{path}: {checkpoint.path.name} needs {count} rounds, got {len(rounds)}")
    return rounds


def last_checkpoint(checkpoints: Checkpoints) -> str:
    """What a run that stops says about going on."""
    command = f"lead-fast train --resume --out {shlex.quote(str(checkpoints.folder.parent))}"
    paths = checkpoints.paths()
    if not paths:
        return f"no checkpoint was written yet; begin the rounds again with: {command}"
    return f"the last checkpoint is {paths[-1].name}; go on with: {command}"


@contextmanager
def failures_explained(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Says of an error that ends training what happened, what is left, and how to go on.

    Args:
        checkpoints: of the run; None: there are none, but the offline stages.

    Raises:
        TrainingError: in place of a full disk, a folder that cannot be written, memory that ran out, a loss or a weight that is
            not finite, another process of the run that has ended.
    """
    try:
        yield
    except CheckpointError:
        raise  # says itself what is left
    except TrainingError as error:
        if checkpoints is None or not checkpoints.paths():
            raise
        raise TrainingError(f"{error}; {last_checkpoint(checkpoints)}") from error
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        if (reason := _reason(error)) is None:
            raise
        left = "stages that are complete are kept: repeat the command with --resume"
        raise TrainingError(f"{reason}; {left if checkpoints is None else last_checkpoint(checkpoints)}") from error


def _reason(error: Exception) -> str | None:
    """What to do about a disk or a memory that is full, a folder that cannot be written, or a process that has ended; None for
    other errors."""
    code, text = os_error(error), str(error).partition("\n")[0]
    if is_full(error):
        return f"the disk is full ({text}): free some space"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"the folder cannot be written ({text})"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in text:
        return (
            f"memory ran out ({text or 'MemoryError'}): free some, or start a new run with a smaller --step-tokens or a larger "
            "--accumulation"
        )
    if isinstance(error, DistError) or _LOST_PEER.search(text):
        return f"another process of the run has ended or cannot be reached ({text})"
    return None
