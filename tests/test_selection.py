"""Grouping, quotas and the choice within tasks."""

import numpy as np
import pytest
import torch

from lead_fast.selection import Groups, gumbel, rank, task_quotas

CPU = torch.device("cpu")


def test_groups_are_sorted_by_arm_task_row_and_leave_out_rows_set_aside():
    arm = np.array([1, 0, 1, 0, 0, 2], np.int16)
    task = np.array([5, 1, 4, 0, 1, 7], np.int32)
    aside = np.array([False, False, False, False, True, False])
    groups = Groups(arm, task, aside, 4, CPU)
    assert groups.rows.tolist() == [3, 1, 2, 0, 5]
    assert groups.arm_rows(0).tolist() == [3, 1]
    assert groups.arm_rows(1).tolist() == [2, 0]
    assert groups.arm_rows(3).tolist() == []
    assert groups.task.tolist() == [0, 1, 4, 5, 7]
    assert groups.arm_group_sizes(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("available", "rate", "expected"),
    [
        ([200, 67, 66, 1, 0], 0.015, [3, 2, 1, 1, 0]),  # 0.015 * 200 is 3 but for rounding; never less than one row
        ([1000], 0.3, [300]),
        ([3, 3], 1.0, [3, 3]),
    ],
)
def test_quotas_round_up_and_take_at_least_one(available, rate, expected):
    assert task_quotas(np.array(available), rate, None, 0.5).tolist() == expected


def test_capped_quotas_have_the_exact_total_and_are_fair_over_rounds():
    available = np.array([100, 50, 10, 0, 40])
    wanted = task_quotas(available, 0.1, None, 0.5)
    totals = np.zeros(5)
    uniforms = (np.arange(400) + 0.5) / 400
    for uniform in uniforms:
        quotas = task_quotas(available, 0.1, 7, float(uniform))
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


@pytest.mark.parametrize("choose", ["topk", "softmax", "random"])
@pytest.mark.parametrize("seed", range(5))
def test_rank_agrees_with_sorting_each_task(choose, seed):
    g = np.random.default_rng(seed)
    group = np.sort(g.integers(0, 6, 80))
    group = np.unique(group, return_inverse=True)[1]
    count = np.bincount(group)
    utility = g.integers(0, 5, 80).astype(np.float32)  # many ties
    noise = g.random(80) if choose == "random" else g.gumbel(size=80) if choose == "softmax" else np.zeros(80)
    excluded = (0.3 * count).astype(np.int64)
    quotas = np.minimum(g.integers(0, 5, len(count)), count - excluded)
    key = utility / 0.7 + noise if choose == "softmax" else noise if choose == "random" else utility
    got = rank(
        torch.from_numpy(utility), torch.from_numpy(noise), torch.from_numpy(group), torch.from_numpy(quotas),
        torch.from_numpy(excluded), choose=choose, temperature=0.7,
    )  # fmt: skip
    assert got.tolist() == _brute_force(utility, key, group, quotas, excluded).tolist()


def test_gumbel_top_1_draws_from_the_softmax():
    uniform = torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    utility = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    drawn = (utility + gumbel(uniform)).argmax(1).bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn.double(), torch.softmax(utility, 0), atol=0.012, rtol=0)
