"""Runs of the command line in processes that may be killed: one interpreter imports everything, each run is a fork of it.

As a script it is that interpreter: a line of JSON on stdin starts a run (see `Runs.start`) and is answered with {"pid"}; the
pid of a run is answered with {"status"} when it has ended. A fork costs milliseconds where a new interpreter costs
seconds of imports. Faults come from outside the package: calls of `os` are wrapped, limits of the process are set.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Run:
    """A run that was started.

    Attributes:
        log: its stdout and stderr.
        held: exists when the run has reached the call it is held at.
    """

    def __init__(self, runs: Runs, log: Path, pid: int) -> None:
        self._runs, self.log, self.pid, self.held = runs, log, pid, log.with_suffix(".held")

    def wait(self) -> int:
        """The exit status; minus the signal's number of a killed process."""
        return self._runs.ask({"wait": self.pid})["status"]

    def kill(self) -> int:
        """SIGKILL; the exit status of a run that had ended before."""
        os.kill(self.pid, signal.SIGKILL)  # until it was waited for, its number is not given to another process
        return self.wait()

    def wait_until_held(self) -> bool:
        """True when it stands at the call; False when it ended without reaching it."""
        self.wait_until(lambda: self.held.exists() or not _alive(self.pid))
        return self.held.exists()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Looks again and again; a run that ends before, or does not come so far, fails the test with its log."""
        deadline = time.monotonic() + seconds
        while True:
            ended = not _alive(self.pid)  # asked first: what it did last counts
            if condition():
                return
            assert not ended and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)


class Runs:
    """The interpreter that forks.

    Args:
        folder: gets the logs.
        environment: of the runs, beside this process's own.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    def start(self, argv: Sequence[str], **faults: Any) -> Run:
        """Starts `lead-fast ARGV`.

        Args:
            hold: [name, part, number]: from the call of os.NAME with that number (1, 2, ...) on, among those whose path holds
                `part`, the process stands still until it is killed.
            slow: seconds that each call of os.fsync takes longer that touches a checkpoint being written.
            file_limit: bytes that a file may have (RLIMIT_FSIZE).
            folder: to run in.
            environment: variables of this run.
        """
        self._count += 1
        log = self.folder / f"{self._count:03d}.log"
        return Run(self, log, self.ask({"argv": list(argv), "log": str(log), **faults})["pid"])

    def start_ranks(self, argv: Sequence[str], world: int = 2, faults: dict[int, dict[str, Any]] | None = None) -> list[Run]:
        """Starts the run as `world` processes, as a launcher does; `faults` by rank, as in `start`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        return [
            self.start(argv, environment=place | {"RANK": str(r), "LOCAL_RANK": str(r)}, **(faults or {}).get(r, {}))
            for r in range(world)
        ]

    def ask(self, question: dict[str, Any]) -> dict[str, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _alive(pid: int) -> bool:
    """False for a process that has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# The interpreter that forks


def _serve() -> None:
    # What a run imports, none of which starts threads: a fork would not have them.
    import peft  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lead_fast.run  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = {"status": os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])}
        else:
            if (pid := os.fork()) == 0:
                _run(job)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def _run(job: dict[str, Any]) -> None:
    from lead_fast.cli import main

    os.environ.update(job.get("environment", {}))
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if "folder" in job:
        os.chdir(job["folder"])
    for stream in (1, 2):
        os.dup2(log, stream)
    if "hold" in job:
        name, part, number = job["hold"]
        _wrap(name, part, lambda count: _hold(job["log"]) if count == number else None)
    if "slow" in job:
        _wrap("fsync", ".writing", lambda _: time.sleep(job["slow"]))
    if "file_limit" in job:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    status = main(job["argv"])
    sys.stdout.flush()
    os._exit(status)


def _hold(log: str) -> None:
    Path(log).with_suffix(".held").touch()
    while True:
        signal.pause()


def _wrap(name: str, part: str, before: Any) -> None:
    """Calls `before(count)` ahead of each call of os.NAME on a path that holds `part`."""
    call, count = getattr(os, name), 0

    def wrapped(target: Any, *rest: Any) -> Any:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        if part in path:
            count += 1
            before(count)
        return call(target, *rest)

    setattr(os, name, wrapped)


if __name__ == "__main__":
    _serve()
