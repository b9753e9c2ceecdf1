"""Grouping, quotas and the choice within tasks."""

import numpy as np
import pytest
import torch

from lead_fast.reference_state import choice_key, chosen_in_groups, task_quotas
from lead_fast.selection import Groups

CPU = torch.device("cpu")


def test_groups_are_sorted_by_arm_task_row_with_rows_set_aside_last():
    arm = np.array([1, 0, 1, 0, 0, 2], np.int16)
    task = np.array([5, 1, 4, 0, 1, 7], np.int32)
    aside = np.array([False, False, False, False, True, False])
    groups = Groups(arm, task, aside, 4, CPU)
    assert groups.rows.tolist() == [3, 1, 2, 0, 5, 4]
    assert groups.position[groups.rows.long()].tolist() == list(range(6))
    assert groups.arm.tolist() == [0, 0, 1, 1, 2, 0]
    assert groups.num_choosable == 5 and groups.choosable_rows().tolist() == [3, 1, 2, 0, 5]
    assert groups.arm_rows(0).tolist() == [3, 1]
    assert groups.arm_rows(1).tolist() == [2, 0]
    assert groups.arm_rows(3).tolist() == []
    assert groups.arm_tasks(1).tolist() == [4, 5]
    assert groups.offsets.tolist() == [0, 1, 2, 3, 4, 5] and groups.arm_groups.tolist() == [0, 2, 4, 5, 5]
    assert groups.arm_sizes.tolist() == [2, 2, 1, 0]


def test_groups_of_many_tasks_are_the_same_as_those_of_few():
    g = np.random.default_rng(0)
    arm, task, aside = g.integers(0, 3, 400).astype(np.int16), g.integers(0, 9, 400), g.random(400) < 0.1
    few, many = (Groups(arm, t, aside, arms, CPU) for t, arms in ((task, 3), (task * 10**6, 30_000)))
    assert torch.equal(few.rows, many.rows) and torch.equal(few.offsets, many.offsets)
    assert np.array_equal(few.group_task * 10**6, many.group_task)


def test_the_bound_on_a_choice_is_that_of_the_largest_arm():
    groups = Groups(np.repeat([0, 1], [10, 200]), np.repeat([0, 1, 2], [10, 100, 100]), np.zeros(210, bool), 2, CPU)
    assert groups.most_chosen(0.015, -1) == 4  # two tasks of 100 rows: 2 each
    assert [groups.most_chosen(1.0, cap) for cap in (7, 5, -1)] == [7, 5, 200]
    assert groups.most_chosen(0.3, -1) == 60


@pytest.mark.parametrize(
    ("available", "rate", "expected"),
    [
        ([200, 67, 66, 1, 0], 0.015, [3, 2, 1, 1, 0]),  # never less than one row
        ([1000], 0.3, [300]),
        ([3, 3], 1.0, [3, 3]),
    ],
)
def test_quotas_round_up_and_take_at_least_one(available, rate, expected):
    assert task_quotas(torch.tensor(available), rate, None, 0.5).tolist() == expected


def test_capped_quotas_have_the_exact_total_and_are_fair_over_rounds():
    available = torch.tensor([100, 50, 10, 0, 40])
    wanted = task_quotas(available, 0.1, None, 0.5).numpy()
    totals = np.zeros(5)
    uniforms = (np.arange(400) + 0.5) / 400
    for uniform in uniforms:
        quotas = task_quotas(available, 0.1, 7, float(uniform)).numpy()
        assert quotas.sum() == 7 and (quotas <= wanted).all() and (quotas >= 0).all()
        totals += quotas
    np.testing.assert_allclose(totals / 400, wanted * 7 / wanted.sum(), atol=0.01)


def _brute_force(utility, key, group, quotas, excluded):
    chosen = np.zeros(len(utility), bool)
    for j in range(len(quotas)):
        rows = [i for i in range(len(utility)) if group[i] == j]
        rows = sorted(rows, key=lambda i: (-utility[i], i))[excluded[j] :]
        for i in sorted(rows, key=lambda i: (-key[i], i))[: quotas[j]]:
            chosen[i] = True
    return chosen


@pytest.mark.parametrize("by_noise", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_agrees_with_sorting_each_task(by_noise, seed):
    g = np.random.default_rng(seed)
    group = np.sort(g.integers(0, 6, 80))
    group = np.unique(group, return_inverse=True)[1]
    count = np.bincount(group)
    utility = g.integers(0, 5, 80).astype(np.float32)  # many ties
    key = utility + g.gumbel(size=80) if by_noise else utility.astype(np.float64)
    excluded = (0.3 * count).astype(np.int64)
    quotas = np.minimum(g.integers(0, 5, len(count)), count - excluded)
    got = chosen_in_groups(*(torch.from_numpy(a) for a in (utility, key, group, quotas, excluded)))
    assert got.tolist() == _brute_force(utility, key, group, quotas, excluded).tolist()


def test_softmax_top_1_draws_from_the_softmax():
    utility, rows = torch.tensor([0.0, 1.0, 2.0]), torch.arange(60_000)
    key = choice_key(utility.repeat(20_000), rows, choose=1, temperature=0.5, seed=3, round=1).view(-1, 3)
    drawn = key.argmax(1).bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, torch.softmax(utility / 0.5, 0), atol=0.012, rtol=0)
