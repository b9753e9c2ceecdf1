"""The core of the state: `_C` on NumPy arrays and the CPU's torch operators, bit for bit, against plain Python row by row."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lead_fast import extension

if not all(extension.available()[name] for name in ("_C", "_ops_cpu")):
    pytest.skip("installed without the compiled extension", allow_module_level=True)

from state_core_cases import State, check, copies, f32, run_core

from lead_fast import _C

examples = settings(deadline=None, max_examples=60)
states = st.builds(
    State, st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 3), num_tasks=st.integers(1, 3), steps=st.integers(2, 9)
)


@examples
@given(state=states, size=st.integers(0, 40), pairs=st.booleans(), max_uses=st.integers(1, 5), earlier=st.booleans())
def test_observe(state, size, pairs, max_uses, earlier):
    check("observe", state.observe(size, now=1 if earlier else None, pairs=pairs, max_uses=max_uses))


@examples
@given(state=states, lr=st.floats(0, 2), drawn=st.lists(st.integers(-1, 0), max_size=4))
def test_step(state, lr, drawn):
    where = [np.array(drawn, np.int64), state.clock, state.counters, state.unit]
    check("step_by_numbers", copies([lr, 12.0, *where]))
    check("step", [np.array(lr), np.array(12.0), *where])


@examples
@given(state=states, beta1=st.sampled_from([0.0, 0.9, 0.999]))
def test_coefficients(state, beta1):
    for now in (0, int(state.counters[0])):
        check("grad_norm_coefficients", [state.clock, state.counters, state.unit, state.fit, beta1, now])


@examples
@given(state=states, by_round=st.booleans(), smoothing=st.sampled_from([0.0, 0.1, 1.0]), size=st.integers(0, 30))
def test_utility(state, by_round, smoothing, size):
    rows = state.g.integers(0, state.num_rows, size)
    check("utility", [rows, state.position, state.arm, state.values, state.seen, state.coefficients, by_round, smoothing])


def test_utility_of_rows_seen_where_there_are_no_coefficients():
    state = State(0)
    for n in (0, 1):
        table = (state.position, state.arm, state.values, state.seen)
        check("utility", [np.arange(12), *table, np.ascontiguousarray(state.coefficients[:, :, :n]), False, 0.1])
        state.coefficients = np.ascontiguousarray(state.coefficients[:, :, :n])
        check("rank", state.rank())


@examples
@given(state=states, pairs=st.sampled_from([(0, 0), (14, 15), (15, 40), (40, 40)]), silent=st.booleans())
def test_calibrate(state, pairs, silent):
    state.totals[:2] = pairs
    if silent:  # a first feature that was always 0 teaches nothing
        state.pairs[:, :, [0, 1, 2, 3, 6, 9]] = 0
    check("calibrate", [state.pairs, state.totals, state.fit, 10.0, 15.0])


@examples
@given(
    state=states,
    arm=st.integers(-1, 0),
    choose=st.integers(0, 2),
    rate=st.sampled_from([0.0, 0.015, 0.25, 1.0]),
    cap=st.sampled_from([-1, 0, 1, 3]),
    exclude_top=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    token_budget=st.sampled_from([0.0, 10.0, 1e30]),
    max_uses=st.sampled_from([0, 2, 4, 300]),
    given_utility=st.booleans(),
    by_round=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_rank(state, arm, given_utility, token_budget, **options):
    if given_utility:
        options["utility"] = (state.g.integers(-2, 3, state.num_rows) / 2).astype(f32)
    if token_budget:
        options |= {"num_tokens": state.rows, "token_budget": token_budget}
    check("rank", state.rank(arm, **options))


LARGE = {"num_rows": 60_000, "num_arms": 2, "num_tasks": 4}  # tasks of about 7,500 rows: past every threshold of the core


@pytest.mark.parametrize("choose", [0, 1, 2])
@pytest.mark.parametrize(("exclude_top", "smooth"), [(0.0, True), (0.25, True), (0.25, False)])
def test_rank_of_an_arm_of_many_rows(choose, exclude_top, smooth):
    state = State(5, **LARGE)
    if smooth:  # else utilities have few values, each of thousands of rows
        state.values[:] = state.g.lognormal(0, 0.5, state.values.shape)
    check("rank", state.rank(1, choose=choose, exclude_top=exclude_top, rate=0.015))


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_softmax_choice_is_exact_where_noise_or_utility_rules(temperature):
    state = State(6, num_rows=20_000, num_arms=1, num_tasks=1)
    state.values[:] = state.g.normal(1.0, 0.3, state.values.shape)
    check("rank", state.rank(choose=1, rate=0.05, temperature=temperature))


@pytest.mark.parametrize("decoy", [-100.0, 100.0])
def test_choice_is_exact_where_the_rows_looked_at_first_deceive(decoy):
    state = State(8, **LARGE)
    utility = state.g.random(state.num_rows).astype(f32)
    for begin, end in pairwise(state.group_offsets):  # a threshold is looked for among every 32nd row of a task
        utility[begin + 16 : end : 32] = decoy
    for choose in (0, 1):
        check("rank", state.rank(0, utility=utility, choose=choose, rate=0.2, exclude_top=0.1))


@pytest.mark.parametrize("shift", range(9))
@pytest.mark.parametrize("size", [7, 16])  # in the loops of every machine, and in those of vectors of eight
def test_utilities_of_any_kind_have_one_order(size, shift):
    state = State(1, num_rows=size, num_arms=1, num_tasks=1)
    state.flags[:] = 0
    state.group_offsets, state.arm_groups = np.array([0, size]), np.array([0, 1])
    kinds = np.array([np.nan, -0.0, 0.0, np.inf, -np.inf, 1e-45, -1e-45, -np.nan, 2.0], f32)
    levels = np.array([0, 3, 3, 6, 1, 4, 2, 0, 5])  # both zeros are one number, and a NaN is below every other
    utility, levels = (np.resize(np.roll(column, shift), size) for column in (kinds, levels))
    order = sorted(range(size), key=lambda place: (-levels[place], place))
    for count in range(1, size + 1):
        (rows, *_), _ = run_core("rank", state.rank(utility=utility, rate=count / size))
        assert rows[:count].tolist() == state.rows[sorted(order[:count])].tolist() and (rows[count:] == -1).all()


def large_digest() -> str:
    """Of everything that has a loop for this machine's vectors."""
    results = hashlib.sha256()
    for choose in (0, 1, 2):
        for utility in (None, np.random.default_rng(3).normal(0, 1, LARGE["num_rows"]).astype(f32)):
            arguments = State(9, **LARGE).rank(1, choose=choose, utility=utility, exclude_top=0.1, rate=0.2)
            for column in _C.rank(*arguments):
                results.update(column.tobytes())
    return results.hexdigest()


def test_vector_loops_give_the_portable_result():
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_state_core as t; print(t.large_digest())"
    )
    environment = os.environ | {"LEAD_FAST_CPU": "portable"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == large_digest()


arms_of_bandit = st.integers(1, 6).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(-50, 50), min_size=k, max_size=k).map(np.array),
        st.lists(st.booleans(), min_size=k, max_size=k).map(lambda mask: np.array(mask, bool)),
    )
)


@examples
@given(arms=arms_of_bandit, gamma=st.floats(0, 1), uniforms=st.lists(st.floats(0, 1), max_size=8))
def test_probs_and_draws(arms, gamma, uniforms):
    (probs,) = check("exp3_probs", [*arms, gamma])
    assert abs(probs.sum() - arms[1].any()) < 1e-14
    check("exp3_draw", [probs, np.array(uniforms)])


@examples
@given(arms=arms_of_bandit, variant=st.integers(0, 4), share=st.sampled_from([0.0, 0.01, 1.0]), seed=st.integers(0, 99))
def test_update(arms, variant, share, seed):
    log_w, mask = arms
    mask[0] = True
    g = np.random.default_rng(seed)
    drawn, rewards = g.integers(-1, len(mask), 6), g.choice([-1.0, -0.3, 0.0, 1.0, np.nan], 6)
    check("exp3_update", [log_w, mask, drawn, rewards, g.uniform(0.05, 1, 6), 0.1, variant, share])


@examples
@given(rewards=st.lists(st.one_of(st.floats(-1e3, 1e3), st.just(np.nan), st.just(0.5)), max_size=12))
def test_scaled_rewards(rewards):
    check("scale_rewards", [np.zeros(3), np.array(rewards)])


@examples
@given(arms=arms_of_bandit, variant=st.integers(0, 4), uniforms=st.lists(st.floats(0, 1), max_size=8), seed=st.integers(0, 99))
def test_draws_of_a_bandit(arms, variant, uniforms, seed):
    g = np.random.default_rng(seed)
    counts = g.integers(0, 3, len(arms[1])).astype(float)
    drawn, with_probs, probs = check("bandit_draw", [arms[0], counts, counts * g.integers(-2, 3, len(counts)) / 2, arms[1],
                                                     np.array(uniforms), 0.1, variant])  # fmt: skip
    assert abs(probs.sum() - arms[1].any()) < 1e-14
    assert len(set(drawn[drawn >= 0])) == (drawn >= 0).sum() and (with_probs[drawn >= 0] > 0).all()


@examples
@given(arms=arms_of_bandit, variant=st.integers(0, 4), seed=st.integers(0, 99), size=st.integers(0, 6))
def test_rewards_of_a_bandit(arms, variant, seed, size):
    log_w, mask = arms
    mask[0] = True
    g, count = np.random.default_rng(seed), float(seed % 5)
    scale = np.array([count, 0.3, 0.5 * count * (count > 1)]) * (count > 0)
    rewards = g.choice([-1e3, -0.3, 0.0, 0.25, 1.0, np.nan], size)
    check("bandit_update", [log_w, scale, np.ones(len(mask)), np.zeros(len(mask)), mask, g.integers(-1, len(mask), size),
                            rewards, g.uniform(0.05, 1, size), 0.1, variant, 0.01])  # fmt: skip


@examples
@given(state=states, max_uses=st.integers(1, 5), share=st.floats(0, 1))
def test_marks_of_chosen_rows(state, max_uses, share):
    rows = np.flatnonzero(state.g.random(state.num_rows) < share)
    check("mark_chosen", [rows, state.position, state.arm, state.flags, state.left, max_uses])


@examples
@given(
    state=states,
    size=st.integers(0, 24),
    arms=st.lists(st.integers(-1, 0), max_size=3),
    drop=st.booleans(),
    by_round=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    fall_of_utility=st.booleans(),
)
def test_ends_of_rounds(state, size, arms, **options):
    arms = [arm if arm < 0 else state.num_arms - 1 - place % state.num_arms for place, arm in enumerate(arms)]
    check("end_round", state.end_round(size, arms, **options))


@pytest.mark.parametrize("variant", [0, 1, 2])
@pytest.mark.parametrize("reward", ["best", "worst", "alternating"])
def test_a_million_updates_at_the_bounds_stay_finite(variant, reward):
    gamma, share, mask = 0.1, 0.01, np.ones(7, bool)
    log_w, arms = np.zeros(7), np.zeros(1000, np.int64)
    rewards = {"best": np.ones(1000), "worst": -np.ones(1000), "alternating": np.resize([1.0, -1.0], 1000)}[reward]
    for _ in range(1000):
        probs = _C.exp3_probs(log_w, mask, 0.0 if variant == 1 else gamma)
        assert np.isfinite(probs).all() and abs(probs.sum() - 1.0) < 1e-12
        assert variant == 1 or probs.min() >= gamma / 7
        drawn_with = np.full(1000, max(float(probs[0]), gamma / 7))
        log_w = _C.exp3_update(log_w, mask, arms, rewards, drawn_with, gamma, variant, share)
    assert np.isfinite(log_w).all()
