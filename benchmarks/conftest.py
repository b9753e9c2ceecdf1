"""What every benchmark shares: pytest-benchmark's report names the machine, and every run has the same inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interleaved import machine


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(machine())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
