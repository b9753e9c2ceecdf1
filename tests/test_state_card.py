"""The operators of the engine's state on a real card: the same bits on every run, no waiting for the host, CUDA graphs, sizes.
What they compute is held by test_state_cuda.py."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from cuda_machine import Arguments, moved, outputs
from rank_cases import rank_arguments
from state_cases import CASES, State, make_case
from torch import Tensor

from lead_fast.reference_state import CHOOSE, QUARANTINED, ROUND, USES
from lead_fast.state import SCHEMAS

pytestmark = pytest.mark.cuda


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def call(operator: str, arguments: Arguments) -> list[Tensor]:
    """Results, and then the tensors among the arguments, which some operators move."""
    result = outputs(getattr(torch.ops.lead_fast, operator)(*arguments))
    return [*result, *(a for a in arguments if isinstance(a, Tensor))]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [t.flatten().view(torch.uint8) if t.numel() else t for t in tensors]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(bits(left), bits(right), strict=True))


@pytest.mark.parametrize("operator", SCHEMAS)
def test_the_cuda_kernel_is_the_library_s(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lead_fast::{operator}", "CUDA")


@pytest.mark.parametrize("case", CASES)
def test_every_run_gives_the_same_bits_without_the_host(case):
    operator, arguments = make_case(case)
    runs = [moved(arguments, "cuda") for _ in range(4)]
    first = call(operator, runs[0])
    with no_synchronisation():
        again = [call(operator, run) for run in runs[1:]]
    for result in again:
        assert_same_bits(first, result)


def ranked(arguments: Arguments) -> list[Tensor]:
    """Ranks on the card, twice to the same bits, and holds the result against the kernel of the CPU."""
    on_card = moved(arguments, "cuda")
    first = torch.ops.lead_fast.rank(*on_card)
    with no_synchronisation():
        second = torch.ops.lead_fast.rank(*on_card)
    assert_same_bits(list(first), list(second))
    expected = torch.ops.lead_fast.rank(*arguments)
    assert all(torch.equal(ours.cpu(), host) for ours, host in zip(first, expected, strict=True))
    return expected


@pytest.mark.parametrize("choose", CHOOSE)
def test_ranking_a_large_arm(choose):
    """1.4 million rows in 50 tasks, many of them equal in utility."""

    def values(g: np.random.Generator, n: int) -> np.ndarray:
        return g.gamma(3.0, 1.0, n).round(4)

    sizes = [28_000] * 49 + [28_123]
    rows, *_ = ranked(rank_arguments(sizes, values=values, choose=choose, rate=0.015, exclude_top=0.2, capacity=25_000))
    assert (rows >= 0).sum() > 15_000


def test_ranking_one_large_task():
    ranked(rank_arguments([1_400_000], rate=0.01, exclude_top=0.1, capacity=14_000))


def test_more_tasks_than_blocks():
    ranked(rank_arguments([3] * 9000, rate=0.4, cap=5000, capacity=5000))


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of what `run` launches, after one call that counts for nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def test_a_graph_of_observe_step_and_utility():
    """One captured graph serves the micro-batches of a round; the CPU does the same one by one."""
    host = State()
    rows = torch.arange(len(host.table.rows))
    coefficients = host.estimator.coefficients(host.clocks)
    observe = moved(host.observe(24, seed=30), "cuda")
    position, arm, values, seen, *_ = observe[5:]
    counters, clock, unit = observe[11:14]
    step = (*moved(host.step([0])[:2], "cuda"), torch.tensor([0, 3, -1], device="cuda"), clock, counters, unit)
    look = (rows.cuda(), position, arm, values, seen, coefficients.cuda(), False, 0.1)
    out: list[Tensor] = []

    def run() -> None:
        torch.ops.lead_fast.observe(*observe)
        torch.ops.lead_fast.step(*step)
        out[:] = torch.ops.lead_fast.utility(*look)

    state = [a for a in observe[5:] if isinstance(a, Tensor)]
    before = [a.clone() for a in state]
    graph = captured(run)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    for number in range(4):
        batch = host.observe(24, seed=30 + number)
        for static, entries in zip(observe[:4], batch[:4], strict=True):
            static.copy_(entries)
        graph.replay()
        torch.ops.lead_fast.observe(*batch)
        torch.ops.lead_fast.step(*host.step([0, 3, -1]))
        expected = torch.ops.lead_fast.utility(*host.utility(rows, coefficients=coefficients))
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=3e-7, atol=1e-7)
        for ours, theirs in zip(state, (a for a in batch[5:] if isinstance(a, Tensor)), strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("choose", CHOOSE)
def test_a_graph_of_rank_serves_every_arm(choose):
    state = State()
    static = moved(state.rank(3, choose, exclude_top=0.1), "cuda")
    out: list[Tensor] = []

    def run() -> None:
        out[:] = torch.ops.lead_fast.rank(*static)

    graph = captured(run)
    for arm in (3, 0, -1, 2, 1):
        static[0].fill_(arm)
        graph.replay()
        expected = torch.ops.lead_fast.rank(*state.rank(arm, choose, exclude_top=0.1))
        for ours, theirs in zip(out, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=3e-7, atol=1e-7)


def test_a_side_stream():
    operator, arguments = make_case("rank, softmax, top excluded")
    want = call(operator, moved(arguments, "cuda"))
    on_card = moved(arguments, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = call(operator, on_card)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(got, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", ["observe", "rank, softmax, top excluded", "update, exp3s"])
def test_a_device_that_is_not_current(case):
    operator, arguments = make_case(case)
    want = call(operator, moved(arguments, "cuda:0"))
    with torch.cuda.device(0):
        got = call(operator, moved(arguments, "cuda:1"))
    assert_same_bits([t.cpu() for t in got], [t.cpu() for t in want])


def test_tables_beyond_2_to_the_31_entries():
    """A pool of 600 million rows whose only arm is its last 1000 positions: every row of the table starts beyond 2^31 bytes."""
    n, arm_rows = 600_000_000, 1000
    if torch.cuda.mem_get_info()[0] < 26 << 30:
        pytest.skip("needs 26 GiB of free device memory")
    first = n - arm_rows

    def on_card(size: int, *, start: int) -> dict[str, Tensor]:
        """A table of `size` rows, the arm's first at position `start`."""
        g = torch.Generator(device="cuda").manual_seed(3)
        arm = slice(start, start + arm_rows)
        values = torch.zeros(4, size + 1, device="cuda")
        values[:, arm] = torch.rand(4, arm_rows, device="cuda", generator=g)
        seen = torch.zeros(2, size + 1, dtype=torch.int32, device="cuda")
        seen[:, arm] = torch.randint(0, 9, (2, arm_rows), dtype=torch.int32, device="cuda", generator=g)
        flags = torch.zeros(2, size + 1, dtype=torch.uint8, device="cuda")
        flags[USES, arm] = torch.randint(0, 4, (arm_rows,), dtype=torch.uint8, device="cuda", generator=g)
        flags[QUARANTINED, start] = 1
        position = torch.arange(size, dtype=torch.int32, device="cuda")
        return {"rows": position, "position": position, "arm": torch.zeros(size, dtype=torch.int16, device="cuda"),
                "values": values, "seen": seen, "flags": flags}  # fmt: skip

    def run(table: dict[str, Tensor], start: int) -> list[Tensor]:
        generator = torch.Generator(device="cuda").manual_seed(4)
        rows = torch.arange(1, arm_rows, 7, device="cuda") + start
        loss = torch.rand(len(rows), device="cuda", generator=generator)
        tokens = torch.ones_like(loss)
        coefficients = torch.rand(2, 1, 9, dtype=torch.float64, device="cuda", generator=generator)
        clock = torch.zeros(9, 4, dtype=torch.float64, device="cuda")
        left, counters = torch.tensor([999], device="cuda"), torch.tensor([8, 2, 0, 0], device="cuda")
        unit = torch.ones(2, dtype=torch.float64, device="cuda")
        torch.ops.lead_fast.observe(rows, loss, tokens, tokens, None, table["position"], table["arm"], table["values"],
                                    table["seen"], table["flags"], left, counters, clock, unit, None, None, None, 0.9, 3,
                                    start + arm_rows)  # fmt: skip
        utility = torch.ops.lead_fast.utility(rows, table["position"], table["arm"], table["values"], table["seen"],
                                              coefficients, False, 0.1)  # fmt: skip
        offsets = torch.tensor([start, start + 600, start + arm_rows], device="cuda")
        chosen = torch.ops.lead_fast.rank(torch.tensor([0], device="cuda"), offsets, torch.tensor([0, 2], device="cuda"),
                                          table["rows"], table["values"], table["seen"], table["flags"], coefficients, False,
                                          None, None, 0.1, 0.1, -1, 0.0, 0.1, CHOOSE["topk"], 1.0, 5, 3, 3, arm_rows,
                                          200)  # fmt: skip
        assert (table["seen"][ROUND, rows] == 3).all()
        return [*utility, torch.where(chosen[0] >= 0, chosen[0] - start, -1), *chosen[1:]]

    large = run(on_card(n, start=first), first)
    assert_same_bits(large, run(on_card(arm_rows, start=0), 0))
