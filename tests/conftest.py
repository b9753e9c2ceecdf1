"""What tests share: a fixed seed, a reason where a CUDA device is missing, runs in processes that may be killed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from forked_runs import Runs
from same_run import References

# Files that take long for few tests: begun first, so that no worker waits for another at the end.
_LONG = frozenset({
    "test_interpreter.py", "test_build.py", "test_processes.py", "test_sharded.py", "test_kill.py", "test_stop.py",
    "test_host_processes.py", "test_host_sharded.py", "test_lead_trainer.py", "test_examples.py", "test_real_data.py",
})  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)
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


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all runs of a file: their model is pretrained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEAD_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
