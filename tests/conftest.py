"""What tests share: a fixed seed, a reason where a CUDA device is missing, runs in processes that may be killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from forked_runs import Runs
from same_run import References


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    # DeepSpeed, where it is installed, else warns that it has found no GPU.
    runs = Runs(folder / "logs", LEAD_FAST_CACHE=str(folder / "cache"), DS_ACCELERATOR="cpu")
    yield runs
    runs.close()


@pytest.fixture(scope="session")
def reference(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(runs, tmp_path_factory.mktemp("reference"))
