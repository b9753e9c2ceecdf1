"""The operators of the engine's state: each kernel of the CPU against its PyTorch twin, and torch's own checks."""

import pytest
import torch
from state_cases import CASES, NUM_ROWS, State, make_case

from lead_fast import extension
from lead_fast import reference_state as reference
from lead_fast.state import SCHEMAS

needs_library = pytest.mark.skipif(not extension.available()["_ops_cpu"], reason="lead-fast was built without _ops_cpu")


def clones(arguments):
    return tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments)


def outputs(result):
    return [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)


def test_every_operator_has_a_case():
    assert {operator for operator, _ in CASES.values()} == set(SCHEMAS)


@needs_library
@pytest.mark.parametrize("operator", SCHEMAS)
def test_the_cpu_kernel_is_the_library_s(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lead_fast::{operator}", "CPU")


@needs_library
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_does_what_its_twin_does(case, seed, threads):
    operator, arguments = make_case(case, seed)
    ours, twins = clones(arguments), clones(arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    got = getattr(torch.ops.lead_fast, operator)(*ours)
    torch.set_num_threads(before)
    expected = getattr(reference, operator)(*twins)
    # exp, pow and log of two libraries differ in the last bits, and sums in their order.
    close = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}
    for left, right in zip([*outputs(got), *ours], [*outputs(expected), *twins], strict=True):
        if not isinstance(left, torch.Tensor):
            assert left == right
        elif left.dtype == torch.float64:
            torch.testing.assert_close(left, right, **close)
        elif left.dtype == torch.float32:
            torch.testing.assert_close(left, right, rtol=3e-7, atol=1e-7, equal_nan=True)
        else:
            assert torch.equal(left, right)


@pytest.mark.parametrize("case", CASES)
def test_torch_s_own_checks_pass(case):
    operator, arguments = make_case(case)
    # The data-dependent branches of AOT tracing do not apply: nothing here is differentiated.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(getattr(torch.ops.lead_fast, operator).default, arguments, test_utils=checks)


@pytest.mark.parametrize("operator", ["observe", "step", "utility", "exp3_probs"])
def test_an_operator_compiles_into_one_graph(operator):
    case = {"exp3_probs": "probs"}.get(operator, operator)
    _, arguments = make_case(case)
    call = getattr(torch.ops.lead_fast, operator)
    compiled, eager = clones(arguments), clones(arguments)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)
    expected = call(*eager)
    for left, right in zip([*outputs(got), *compiled], [*outputs(expected), *eager], strict=True):
        if isinstance(left, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


def test_the_state_of_the_cases_has_learned_something():
    state = State()
    assert state.estimator.totals[reference.REVISITS] > 50
    assert bool(state.estimator.fit[0, reference.SLOPE_C] != 0) and bool(state.estimator.fit[0, reference.ARM_OFFSETS :].any())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_left_counts_the_rows_that_may_still_be_chosen(seed):
    state = State(seed)
    table, groups = state.table, state.groups
    open_rows = (table.flags[0, :-1] < 3) & (table.flags[1, :-1] == 0)
    open_rows[groups.num_choosable :] = False
    table.left.copy_(torch.zeros(4, dtype=torch.int64).index_add_(0, table.arm.long(), open_rows.long()))
    for number in range(10, 14):
        torch.ops.lead_fast.observe(*state.observe(60, seed=number))
        chosen = torch.ops.lead_fast.rank(*state.rank(3, "softmax", rate=0.1))[0]
        table.choose(chosen[chosen >= 0], 3)
    open_rows = (table.flags[0, :-1] < 3) & (table.flags[1, :-1] == 0)
    open_rows[groups.num_choosable :] = False
    assert table.left.tolist() == torch.zeros(4, dtype=torch.int64).index_add_(0, table.arm.long(), open_rows.long()).tolist()


def test_a_million_updates_at_the_bounds_leave_probabilities():
    mask, probs = torch.ones(5, dtype=torch.bool), torch.full((5000,), 0.02, dtype=torch.float64)
    arms = torch.arange(5000) % 2
    rewards = torch.where(arms == 0, 1.0, -1.0).double()
    for variant in (0, 1, 2):
        log_w = torch.zeros(5, dtype=torch.float64)
        for _ in range(200 if extension.available()["_ops_cpu"] else 1):
            log_w = torch.ops.lead_fast.exp3_update(log_w, mask, arms, rewards, probs, 0.1, variant, 0.01)
        after = torch.ops.lead_fast.exp3_probs(log_w, mask, 0.1)
        assert torch.isfinite(after).all() and float(after.sum()) == pytest.approx(1.0)
        assert float(after.min()) >= 0.1 / 5 - 1e-15


def test_a_row_number_out_of_range_is_refused_before_anything_moves():
    state = State()
    arguments = list(state.observe())
    before = [a.clone() for a in arguments if isinstance(a, torch.Tensor)]
    arguments[0] = arguments[0].clone()
    arguments[0][-1] = NUM_ROWS
    before[0] = arguments[0].clone()
    with pytest.raises((ValueError, RuntimeError), match="observe: `rows` must be in"):
        torch.ops.lead_fast.observe(*arguments)
    after = [a for a in arguments if isinstance(a, torch.Tensor)]
    assert all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(before, after, strict=True))


def test_a_full_clock_is_refused():
    state = State()
    arguments = list(state.step([0]))
    arguments[3] = arguments[3][:41].clone()
    with pytest.raises((ValueError, RuntimeError), match="step: `clock`"):
        torch.ops.lead_fast.step(*arguments)


def test_shares_that_are_whole_but_for_rounding_stay_whole():
    assert 0.07 * 100 > 7
    assert reference.task_quotas(torch.tensor([100]), 0.07, None, 0.5).tolist() == [7]
