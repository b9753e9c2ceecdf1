"""Ctrl-C and SIGTERM: a run stops at a place from which it can go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_REPEATED = 3.0  # seconds in which a launcher has sent a signal on


class Interrupted(KeyboardInterrupt):
    """The run was told to stop.

    Attributes:
        signum: the signal; the exit status is 128 + signum.
    """

    def __init__(self, signum: int, message: str = "finished stages are kept; go on with --resume") -> None:
        super().__init__(message)
        self.signum = signum


class StopSignals:
    """SIGINT and SIGTERM while it is entered: `Interrupted` is raised at once, or, inside `deferred`, left to the caller.

    Args:
        several: this is one of several processes. Their launcher sends each signal on, and SIGTERM when one of them has ended:
            such a repetition is no second request.

    Attributes:
        requested: the signal that came inside `deferred`; a second one raises at once there, too.
    """

    def __init__(self, *, several: bool = False) -> None:
        self.requested: int | None = None
        self._several, self._since = several, 0.0
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread alone; elsewhere the host decides what they do.
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """The caller looks at `requested` where it can stop."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, signum: int, _: FrameType | None) -> None:
        repeated = signum == signal.SIGTERM or time.monotonic() - self._since < _REPEATED
        if self._several and self.requested is not None and repeated:
            return
        if not self._deferred or self.requested is not None:
            raise Interrupted(signum)
        self.requested, self._since = signum, time.monotonic()
        # Not logged: the stream of the log may be in the middle of a line.
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: a checkpoint is written after this optimizer step; once more stops at once\n".encode())
