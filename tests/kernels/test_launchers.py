"""What the launchers really ask for is what was compiled ahead of time: a stand-in takes the driver's place.

The cases of `aot.py` are written by hand; here arguments, their specialisation and options are those of the launchers.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections import defaultdict
from functools import partial

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import aot  # noqa: E402
import lead_fast.kernels  # noqa: E402
from lead_fast.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from lead_fast.kernels.scaled_gradient import scaled_gradient  # noqa: E402
from loss_batches import make_batch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402


class StandIn:
    """As much of a driver as compilation asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # compiled kernels are kept by device: none that exists, and another one for each card

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(params=aot.CARDS)
def launches(request, monkeypatch):
    """(card, what was launched there by kernel): launchers run on CPU tensors, their kernels are compiled only."""
    compiled: dict[str, set[tuple]] = defaultdict(set)
    run = JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        assert len(grid) <= 3 and all(size > 0 for size in grid), f"{kernel.__name__}: grid {grid}"
        result = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled[kernel.__name__].add(aot.identity(result))
        return result

    monkeypatch.setattr(driver, "_active", StandIn(aot.CARDS[request.param]))
    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in pkgutil.iter_modules(lead_fast.kernels.__path__):
        module = importlib.import_module(f"lead_fast.kernels.{module.name}")
        if hasattr(module, "card"):
            monkeypatch.setattr(module, "card", lambda device: request.param)
    return request.param, compiled


@pytest.mark.parametrize("single_pass", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_table_covers_what_is_launched(launches, dtype, single_pass):
    card, compiled = launches
    capped = make_batch([64, 0, 32], 64, 320, dtype=dtype, bias=True, softcap=3.0)
    odd = make_batch([300, 1], 128, 303, dtype=dtype)
    for batch in (capped, odd):
        for stats in (0, 1, 2):
            for trained in (False, True):
                batch.run(partial(linear_cross_entropy, single_pass=single_pass), weight_grad=trained, stats=stats)
    scaled_gradient(torch.ones(64, 128, dtype=dtype), torch.ones(64), dtype)
    scaled_gradient(torch.ones(64, 128), torch.ones(()), dtype)

    row_kernels = {"_single_pass_rows_kernel", "_repair_rows_kernel", "_put_targets_kernel"}
    taken = row_kernels if single_pass and dtype != torch.float16 else {"_logit_rows_kernel"}
    others = {"_hidden_rows_kernel", "_weighted_rows_kernel", "_bias_grad_kernel", "_token_scan_kernel"}
    samples = {"_sample_tiles_kernel", "_sample_gram_kernel", "_sample_outer_kernel", "_sample_stats_kernel"}
    assert taken | others | samples | {"_scaled_gradient_kernel"} <= compiled.keys()
    table = {aot.identity(aot.compile_for(case, card)) for case in aot.cases(card)}
    assert {name: launched - table for name, launched in compiled.items() if launched - table} == {}
