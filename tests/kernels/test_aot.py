"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, spills nothing and fits its card."""

from __future__ import annotations

import os
import re

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

import aot  # noqa: E402


@pytest.fixture(scope="module")
def usages():
    return aot.measure()


def test_nothing_is_spilled(usages):
    assert {case: usage.spilled for case, usage in usages.items() if usage.spilled > 0} == {}


def test_every_kernel_fits_its_card(usages):
    too_large = {
        case: usage
        for case, usage in usages.items()
        if usage.registers * 32 * usage.num_warps > aot.REGISTERS or usage.shared > aot.SHARED_LIMIT[case[2]]
    }
    assert too_large == {}


def test_committed_table(usages):
    """Exact for the triton version that wrote it; another version may allocate registers differently."""
    version, rows = aot.committed()
    assert rows.keys() == usages.keys(), "run `python tests/kernels/aot.py`"
    if version == triton.__version__:
        assert rows == usages, "run `python tests/kernels/aot.py`"
    assert all(usage.spilled == 0 for usage in rows.values())


@pytest.mark.parametrize("card", aot.CARDS)
def test_logits_move_16_bytes_at_a_time(card):
    """Also where V is no multiple of anything: the rows are padded. One narrow load is that of the target."""
    for case in aot.cases(card):
        if case.kernel.__name__ == "_logit_rows_kernel":
            ptx = aot.compile_for(case, card).asm["ptx"]
            scalars = re.findall(r"(?:ld|st)\.global\.b(16|32) ", ptx)
            assert len(scalars) <= 1 + 4, f"{case.variant}: the target, and nll and ||delta||^2 twice"
            assert "ld.global.v4.b32" in ptx, case.variant


@pytest.mark.parametrize("card, instruction", [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma")])
def test_products_of_16_bit_floats_run_on_tensor_cores(card, instruction):
    for case in aot.cases(card):
        if case.kernel.__name__ in ("_sample_gram_kernel", "_sample_outer_kernel") and case.variant != "fp32":
            assert instruction in aot.compile_for(case, card).asm["ptx"], case
