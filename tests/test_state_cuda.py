"""The operators of the engine's state for CUDA, against their PyTorch twins: where no card is, by running their source on the
CPU thread by thread; on a card as they are."""

from typing import Any

import numpy as np
import pytest
import torch
from cuda_machine import ORDERS, Arguments, Machine, moved, outputs
from rank_cases import RANKS, rank_arguments
from state_cases import CASES, NUM_ARMS, NUM_ROWS, State, make_case
from torch import Tensor

from lead_fast import extension
from lead_fast import reference_state as reference
from lead_fast.reference_state import ERRORS, OUT_OF_RANGE
from lead_fast.rng import philox_uniform_reference

CARD = pytest.param("card", marks=pytest.mark.cuda)


@pytest.fixture(params=[*ORDERS, CARD])
def machine(request) -> Machine:
    if request.param != "card" and not extension.available()["_ops_cpu"]:
        pytest.skip("lead-fast was built without its extension: no compiler is assumed")
    return Machine(request.param)


def assert_same(got: list[Any], expected: list[Any]) -> None:
    # exp, pow and log of two libraries differ in the last bits, and sums in their order.
    for left, right in zip(got, expected, strict=True):
        if not isinstance(left, Tensor):
            assert left == right
        elif left.dtype == torch.float64:
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-12, equal_nan=True)
        elif left.dtype == torch.float32:
            torch.testing.assert_close(left, right, rtol=3e-7, atol=1e-7, equal_nan=True)
        else:
            assert torch.equal(left, right)


def check(machine: Machine, operator: str, arguments: Arguments) -> list[Tensor]:
    got, after = machine.run(operator, arguments)
    twins = moved(arguments, "cpu")
    expected = outputs(getattr(reference, operator)(*twins))
    assert_same([*got, *after], [*expected, *twins])
    return got


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_does_what_its_twin_does(machine, case):
    check(machine, *make_case(case, seed=1))


def test_uniform_numbers(machine):
    counters = torch.tensor([0, 1, -1, 2**40, 7]).repeat(100)
    (got,), _ = machine.run("philox_uniform", (-3, 2, 2**32 - 1, counters))
    assert torch.equal(got, philox_uniform_reference(-3, 2, 2**32 - 1, counters))


# observe


def test_rows_out_of_range_are_ignored_and_counted(machine):
    arguments = list(State().observe(40))
    expected, twins = machine.run("observe", tuple(arguments))
    bad = torch.tensor([NUM_ROWS, -2, 2**40, -(2**40)])
    extra = {0: bad, 1: torch.full((4,), torch.nan), 2: torch.ones(4), 3: torch.ones(4)}
    for place, entries in extra.items():
        arguments[place] = torch.cat([entries, arguments[place]])
    got, after = machine.run("observe", tuple(arguments))
    twins[11][OUT_OF_RANGE] += 4
    assert_same([*got, *after[4:]], [*expected, *twins[4:]])


def test_the_spare_column_stays_as_it_is(machine):
    arguments = State().observe(40)
    for table, value in zip(arguments[7:10], (torch.nan, -7, 255), strict=True):
        table[:, NUM_ROWS] = value
    _, after = machine.run("observe", arguments)
    assert after[7][:, NUM_ROWS].isnan().all()
    assert (after[8][:, NUM_ROWS] == -7).all() and (after[9][:, NUM_ROWS] == 255).all()


def test_many_samples_of_few_rows(machine):
    """More samples than threads: every row occurs often, with good and bad losses."""
    arguments = list(State().observe(1300, seed=2))
    arguments[0] = arguments[0] % 12
    check(machine, "observe", tuple(arguments))


def test_micro_batches_and_steps_of_a_round(machine):
    ours, twins = State(), State()
    for number in range(4):
        batch = [ours.observe(24, seed=20 + number), twins.observe(24, seed=20 + number)]
        _, after = machine.run("observe", batch[0])
        reference.observe(*batch[1])
        for tensor, moved_tensor in zip(batch[0], after, strict=True):
            if isinstance(tensor, Tensor):
                tensor.copy_(moved_tensor)
        assert_same(list(batch[0]), list(batch[1]))
        for state in (ours, twins):
            reference.step(*state.step([number % 3, 3]))


# utility, calibrate


def test_the_kappa_of_the_lowest_error_is_in_use(machine):
    state = State()
    torch.ops.lead_fast.observe(*state.observe(64, seed=9))
    state.estimator.totals[ERRORS:] = torch.tensor([5.0, 4.0, 1.0, 2.0, 1.0])
    _, after = machine.run("calibrate", state.calibrate())
    assert torch.equal(after[2][0], after[2][3])
    assert not torch.equal(after[2], state.estimator.fit)
    check(machine, "calibrate", state.calibrate())


def test_a_row_out_of_range_has_no_utility(machine):
    arguments = State().utility(torch.tensor([5, -1, NUM_ROWS, 2**40]))
    (idu, loss), _ = machine.run("utility", arguments)
    assert idu.isnan().tolist() == loss.isnan().tolist() == [False, True, True, True]


# a round's end


def test_a_round_of_more_rows_than_threads(machine):
    state = State(num_rows=1300)
    for seed in (7, 8):
        torch.ops.lead_fast.observe(*state.observe(900, seed=seed))
    rewards, summary, quarantined = check(machine, "end_round", state.end_round(torch.randperm(1300), [3, 1, -1]))
    assert summary[0] > 600 and quarantined.any()
    assert rewards.isnan().tolist() == [False, False, True] and (rewards[:2] != 0).all()


# rank


@pytest.mark.parametrize("case", RANKS)
def test_ranks(machine, case):
    rows, *_ = check(machine, "rank", RANKS[case])
    empty = ("an arm without tasks", "no row left", "all excluded", "cap of nothing")
    assert bool((rows >= 0).any()) == (case not in empty)


def test_ranks_by_the_round_a_row_was_seen_in(machine):
    arguments = list(State().rank(3, "topk", rate=0.4))
    arguments[7:9] = torch.rand(2, NUM_ARMS, 6, dtype=torch.float64), True
    check(machine, "rank", tuple(arguments))


@pytest.mark.parametrize("machine", ["ascending", CARD], indirect=True)
def test_more_tasks_than_two_turns_of_the_plan(machine):
    rows, *_ = check(machine, "rank", rank_arguments([1] * 2060, cap=40, used_up=0.0))
    assert (rows >= 0).sum() == 40


def test_a_utility_that_is_not_a_number_comes_last(machine):
    def values(g: np.random.Generator, n: int) -> np.ndarray:
        return np.where(np.arange(n) % 2 == 0, np.nan, -g.random(n))

    arguments = rank_arguments([40], values=values, used_up=0.0, rate=0.5)
    (_, utility, _), _ = machine.run("rank", arguments)
    assert not utility[:20].isnan().any()
    everything = rank_arguments([40], values=values, used_up=0.0, rate=1.0)
    (rows, utility, _), _ = machine.run("rank", everything)
    assert (rows >= 0).sum() == 40 and utility.isnan().sum() == 20


#: an argument that only the device can read, by operator, place and value
BEYOND = [
    ("rank", 0, torch.tensor([3])),
    ("rank", 21, 10),
    ("rank", 22, 3),
    ("observe", 4, torch.tensor([65])),
    ("step", 2, torch.tensor([0, 4])),
    ("step", 3, torch.zeros(41, 7, dtype=torch.float64)),
    ("exp3_update", 2, torch.tensor([1, 4, 0, -1])),
    ("bandit_update", 5, torch.tensor([1, 4, 0, -1, 3])),
    ("mark_chosen", 0, torch.tensor([3, NUM_ROWS])),
    ("end_round", 0, torch.arange(1, NUM_ROWS + 1)),
    ("end_round", 3, torch.tensor([4])),
]


_A_CASE = {
    "exp3_update": "update, exp3",
    "bandit_update": "update of a bandit, exp3",
    "mark_chosen": "mark",
    "end_round": "end",
}


@pytest.mark.parametrize("machine", ["ascending"], indirect=True)
@pytest.mark.parametrize(("operator", "place", "value"), BEYOND)
def test_what_only_the_device_can_see_ends_the_kernel(machine, operator, place, value, capfd):
    arguments = RANKS["rows"] if operator == "rank" else make_case(_A_CASE.get(operator, operator))[1]
    changed = (*arguments[:place], value, *arguments[place + 1 :])
    with pytest.raises(RuntimeError, match="a kernel trapped"):
        machine.run(operator, changed)
    assert f"lead_fast: {operator}: " in capfd.readouterr().out
