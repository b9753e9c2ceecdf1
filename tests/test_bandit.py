"""The EXP3 family: probabilities, draws, updates, reward scale."""

import math

import pytest
import torch

from lead_fast.bandit import VARIANTS, Bandit, exp3_draw, exp3_probs, exp3_update


def test_probs_mix_softmax_and_exploration_over_active_arms_only():
    log_w = torch.tensor([0.0, 1.0, 50.0, -1.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True])
    probs = exp3_probs(log_w, mask, 0.1)
    w = [math.exp(0.0), math.exp(1.0), 0.0, math.exp(-1.0)]
    expected = [0.9 * x / sum(w) + (0.1 / 3 if k != 2 else 0.0) for k, x in enumerate(w)]
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float64))


def test_no_active_arm_is_an_error():
    with pytest.raises(ValueError, match="`mask` must have at least one arm"):
        exp3_probs(torch.zeros(3), torch.zeros(3, dtype=torch.bool), 0.1)


@pytest.mark.parametrize("uniform", [1e-12, 0.0999, 0.1001, 0.5, 1.0 - 1e-16])
def test_draw_inverts_the_cumulative_distribution(uniform):
    probs = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0], dtype=torch.float64)
    expected = 1 if uniform < 0.1 else 3 if uniform < 0.7 else 4
    assert exp3_draw(probs, uniform) == expected


def test_update_is_the_textbook_one_up_to_a_shift():
    mask = torch.ones(4, dtype=torch.bool)
    log_w = torch.tensor([0.0, -0.3, -0.2, -0.5], dtype=torch.float64)
    new = exp3_update(log_w, mask, 2, 0.8, 0.25, 0.1)
    expected = log_w.clone()
    expected[2] += 0.1 / 4 * 0.8 / 0.25
    torch.testing.assert_close(new - new[0], expected - expected[0])
    assert new.max() == 0.0


def test_exp3s_shares_weight_with_every_active_arm():
    mask = torch.tensor([True, True, False])
    log_w = torch.tensor([0.0, -20.0, 3.0], dtype=torch.float64)
    new = exp3_update(log_w, mask, 0, 1.0, 0.9, 0.1, variant="exp3s", share=0.01)
    old = log_w[:2].exp()
    shared = math.e * 0.01 / 2 * old.sum()
    expected = torch.stack([old[0] * math.exp(0.05 / 0.9) + shared, old[1] + shared]).log()
    torch.testing.assert_close((new[1] - new[0]), expected[1] - expected[0])


def test_exp3_ix_only_lowers_the_drawn_arm():
    new = exp3_update(torch.zeros(3), torch.ones(3, dtype=torch.bool), 1, -1.0, 0.5, 0.3, variant="exp3_ix")
    torch.testing.assert_close(new, torch.tensor([0.0, -0.1 / (0.5 + 0.05), 0.0], dtype=torch.float64))


@pytest.mark.parametrize("variant", ["exp3", "exp3_ix", "exp3s"])
def test_many_updates_at_the_bounds_stay_finite(variant):
    bandit = Bandit(5, variant, gamma=0.1)
    mask = torch.ones(5, dtype=torch.bool)
    for n in range(3000):
        bandit.log_w = exp3_update(
            bandit.log_w, mask, n % 2, 1.0 if n % 2 else -1.0, 0.02, 0.1, variant=variant, share=bandit.share
        )
    probs = bandit.probs(mask)
    assert torch.isfinite(probs).all() and float(probs.sum()) == pytest.approx(1.0)
    if variant != "exp3_ix":
        assert float(probs.min()) >= 0.1 / 5 - 1e-12


def _scaled(scale, *rewards):
    return torch.ops.lead_fast.scale_rewards(scale, torch.tensor(rewards, dtype=torch.float64)).tolist()


def test_reward_scale_is_zero_until_three_rewards_and_clips_at_two_deviations():
    scale = torch.zeros(3, dtype=torch.float64)
    assert _scaled(scale, 1.0, 2.0) == [0.0, 0.0]
    assert _scaled(scale, math.nan, 3.0) == [0.0, pytest.approx((3.0 - 2.0) / 2.0)]
    assert scale.tolist() == [3.0, 2.0, 2.0]
    assert _scaled(torch.tensor([10.0, 0.0, 9.0], dtype=torch.float64), 1e9) == [1.0]
    assert _scaled(torch.tensor([10.0, 0.0, 9.0], dtype=torch.float64), -1e9) == [-1.0]
    assert _scaled(torch.zeros(3, dtype=torch.float64), *[0.5] * 5)[-1] == 0.0


def _update(bandit, mask, arm, prob, reward):
    arms, numbers = torch.tensor([arm]), torch.tensor([prob, reward], dtype=torch.float64)
    return float(bandit.update(mask, arms, numbers[:1], numbers[1:]))


def _draw(bandit, mask, *uniforms):
    return bandit.draw(mask, torch.tensor(uniforms, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_better_arm_is_drawn_more_often(variant):
    bandit, mask = Bandit(3, variant, gamma=0.3), torch.ones(3, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.zeros(3)
    for _ in range(400):
        arms, probs, _ = _draw(bandit, mask, float(torch.rand((), generator=generator)))
        drawn[arms[0]] += 1
        noise = float(torch.rand((), generator=generator)) * 0.2
        _update(bandit, mask, int(arms[0]), float(probs[0]), (0.0, 0.3, 1.0)[int(arms[0])] + noise)
    if variant == "uniform":
        assert drawn.min() > 90
    else:
        assert int(drawn.argmax()) == 2 and drawn[2] > 180


def test_draw_of_several_arms_is_without_replacement_and_skips_retired_ones():
    bandit = Bandit(4, "exp3")
    mask = torch.tensor([True, False, True, True])
    arms, probs, _ = _draw(bandit, mask, 0.1, 0.5, 0.9, 0.99)
    assert sorted(arms.tolist()) == [-1, 0, 2, 3] and arms[3] == -1
    assert probs[:3].tolist() == pytest.approx([1.0, 1.0, 1.0])


def test_no_arm_left_draws_none_and_a_reward_that_is_not_there_changes_nothing():
    bandit, none = Bandit(3), torch.zeros(3, dtype=torch.bool)
    arms, _, probs = _draw(bandit, none, 0.5)
    assert arms.tolist() == [-1] and probs.tolist() == [0.0, 0.0, 0.0]
    before = bandit.state_dict()
    mask = torch.ones(3, dtype=torch.bool)
    assert _update(bandit, mask, 1, 0.3, math.nan) == 0.0 and _update(bandit, mask, -1, 0.3, 1.0) == 0.0
    assert all(torch.equal(before[name], value) for name, value in bandit.state_dict().items())


def test_state_round_trips():
    bandit, mask = Bandit(3), torch.ones(3, dtype=torch.bool)
    for n in range(7):
        _update(bandit, mask, n % 3, 0.3, 0.1 * n)
    other = Bandit(3)
    other.load_state_dict(bandit.state_dict())
    assert torch.equal(other.log_w, bandit.log_w)
    assert _update(other, mask, 1, 0.3, 0.7) == _update(bandit, mask, 1, 0.3, 0.7)
    with pytest.raises(ValueError, match="must have 4 arms"):
        Bandit(4).load_state_dict(bandit.state_dict())


@pytest.mark.parametrize(
    ("variant", "most"), [("exp3", 0.27), ("exp3_ix", 0.17), ("exp3s", 0.27), ("uniform", 1 / 7), ("greedy", 1.0)]
)
def test_few_rounds_cannot_move_the_bandit_far(variant, most):
    # Section 5 of the specification: P <= 0.27 after 12 maximal rewards for one of 7 arms.
    assert Bandit(7, variant).reachable(12) == pytest.approx(most, abs=0.01)
