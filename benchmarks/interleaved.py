"""Interleaved measurements: every contender once a round, so that a busy machine slows all of them alike.

A ratio is the median over rounds of the ratio within a round. Memory is the growth over one call of the process's peak
resident size on the CPU, of the allocator's peak on CUDA.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
_MIB = 2**20


class CannotRunError(Exception):
    """A contender does not serve this device, dtype or option; the message says why."""


@dataclass
class Measured:
    """One contender: milliseconds of each round and MiB of peak extra memory, or why it did not run."""

    name: str
    times_ms: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    refused: str | None = None

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    def ratio_to(self, other: Measured) -> float:
        return statistics.median(a / b for a, b in zip(self.times_ms, other.times_ms, strict=True))


def interleave(contenders: dict[str, Callable[[], Call]], rounds: int, required: Collection[str] = ()) -> dict[str, Measured]:
    """Measures every contender `rounds` times, round by round, after one call each that warms up and shows memory.

    Args:
        contenders: name -> what prepares the contender and returns the measured call, or raises CannotRunError.
        rounds: measured calls of each.
        required: names whose failure ends the measurement; any other is named in the table with its error.
    """
    measured, calls = {}, {}
    for name, prepare in contenders.items():
        measured[name] = Measured(name)
        try:
            call = prepare()
            call()
            measured[name].peak_mib = peak_mib(call)
        except CannotRunError as reason:
            measured[name].refused = str(reason)
            continue
        except Exception as error:
            if name in required:
                raise
            # One peer that fails on this machine must not cost the others their numbers; the table says why.
            measured[name].refused = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        calls[name] = call
    for _ in range(rounds):
        for name, call in calls.items():
            measured[name].times_ms.append(time_ms(call))
    return measured


def time_ms(call: Call) -> float:
    _synchronize()
    start = time.perf_counter()
    call()
    _synchronize()
    return (time.perf_counter() - start) * 1e3


def peak_mib(call: Call) -> float:
    gc.collect()
    if torch.cuda.is_available():
        _synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        _synchronize()
        return (torch.cuda.max_memory_allocated() - before) / _MIB
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls left in the heap would hide this call's growth
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    before = _status_mib("VmRSS")
    call()
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def machine() -> dict[str, Any]:
    """What a reader needs to place the numbers, as it was when first asked for."""
    root = Path(__file__).resolve().parents[1]
    commit = os.environ.get("COMMIT") or _output("git", "-C", str(root), "describe", "--always")  # a copy has no repository
    if _output("git", "-C", str(root), "status", "--porcelain", "--", ".", ":!benchmarks/results"):  # what it writes itself
        commit += "-dirty"
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load average": f"{os.getloadavg()[0]:.1f}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit or "not in a repository",
    }
    if torch.cuda.is_available():
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {"gpu": torch.cuda.get_device_name(), "driver": driver, "cuda": torch.version.cuda}
    return found


def _cpu_name() -> str:
    """Name, family and model: one name serves several generations."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in known:
        return platform.machine()
    return f"{known['model name']} (family {known.get('cpu family', '?')}, model {known.get('model', '?')})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
