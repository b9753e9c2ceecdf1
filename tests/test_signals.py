"""Failure signatures: each is planted in made-up training and seen, none is seen in healthy or short training."""

import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import lead_fast as lf
from lead_fast.signals import CHECKS, Signals, badly_calibrated, paired, visit_errors
from lead_fast.smoothing import SmoothingMemory

NUM_ARMS = 5


def train(num_rounds, seed=0, *, silent=0, quality=lambda share: 0.8, worth=lambda arm, share: 0.02 * arm, bias=0.0, fall=0.1,
          visits=8, noise=0.1, rows=400, signals=None, **config):  # fmt: skip
    """Made-up training that `Signals` watches; `share` is the share of the rounds that are over.

    Each visit's loss has fallen by about `fall` since the last, of which the estimator foresees the share `quality` (plus
    `bias`); each arm's reward is its `worth`, both fading as training goes on. Rewards are 0 for the first `silent` rounds,
    as they are until an estimator is calibrated.
    """
    g = np.random.default_rng(seed)
    engine = SimpleNamespace(config=lf.LeadConfig(**config).resolve(), record_visits=False)
    signals = signals or Signals(engine)
    loss, last, notes = g.gamma(4.0, 0.5, rows) + 1.0, np.zeros(rows, int), []
    for number in range(1, num_rounds + 1):
        share = (number - 1) / num_rounds
        fade = math.exp(-2.0 * share)
        chosen = g.choice(rows, visits, replace=False)
        common = g.normal(scale=0.02)  # visits of a round share some noise
        drop = fall * fade * g.gamma(4.0, 0.25, visits)
        observed = np.maximum(loss[chosen] - drop + noise * fade * g.normal(size=visits) + common * fade, 0.0)
        columns = {
            "row": chosen, "arm": chosen % NUM_ARMS, "seen_round": last[chosen], "seen_loss": loss[chosen],
            "observed": observed, f"predicted.{signals.config.estimator}": loss[chosen] - quality(share) * drop + bias,
        }  # fmt: skip
        loss[chosen], last[chosen] = observed, number
        arm = int(g.integers(NUM_ARMS))
        reward = fade * (0.1 + worth(arm, share) + 0.02 * g.normal()) * (number > silent)
        report = SimpleNamespace(visits={k: torch.from_numpy(v) for k, v in columns.items()}, arms=[arm], rewards=[reward],
                                 probs=torch.full((NUM_ARMS,), 1.0 / NUM_ARMS, dtype=torch.float64),
                                 calibration={"estimator": signals.config.estimator, "c": 0.25})  # fmt: skip
        notes.append(signals.after_round(SimpleNamespace(number=number), report))
    json.dumps(notes, allow_nan=False)
    return [warning for note in notes for warning in note["warnings"]], signals, notes


def kinds(found):
    return [warning["kind"] for warning in found]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "healthy",
    [{}, {"estimator": "none"}, {"fall": 0.0}, {"quality": lambda share: 0.0}, {"smoothing": 0.0}, {"bandit": "exp3s"}],
)
def test_healthy_training_is_silent(healthy, seed):
    assert kinds(train(200, seed, **healthy)[0]) == []


PLANTED = {
    "an estimator that foresees twice the fall": ({"quality": lambda share: 2.5}, "calibration", "estimator", "none"),
    "one that is biased": ({"bias": 0.15, "fall": 0.02}, "calibration", "estimator", "none"),
    "the published one": ({"quality": lambda share: 3.0, "estimator": "historical"}, "calibration", "estimator", "grad_norm"),
    "an arm that loses its worth": ({"worth": lambda arm, share: 0.1 * (arm == 3) * (share < 0.5)}, "drift", "bandit", "exp3s"),
    "an arm that gains, under exp3s": (
        {"worth": lambda arm, share: 0.15 * (arm == 1) * (share > 0.5), "bandit": "exp3s"}, "drift", "share", 0.004,
    ),
    "much smoothing": ({"smoothing": 0.6}, "smoothing", "smoothing", 0.0),
    "an estimator that fails late": (
        {"quality": lambda share: 0.9 if share < 0.6 else 4.0, "fall": 0.2}, "late", "estimator", "none",
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_failure_is_seen_once(name, seed, caplog):
    options, kind, option, value = PLANTED[name]
    with caplog.at_level(logging.WARNING, "lead_fast.signals"):
        found, _, _ = train(200, seed, **options)
    assert kinds(found).count(kind) == 1 and set(kinds(found)) <= {kind, *(["calibration"] if kind == "late" else [])}
    warning = next(w for w in found if w["kind"] == kind)
    assert (warning["option"], warning["value"]) == (option, value)
    assert f"--{option} {value}" in warning["text"] and warning["text"].count(".") > 2, "it says what was seen, in numbers"
    assert sum(warning["text"] in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("name", PLANTED)
def test_too_few_data_say_nothing(name):
    assert train(9, **PLANTED[name][0])[0] == []
    assert train(40, visits=1, **PLANTED[name][0])[0] == []


def test_a_bias_that_hides_behind_the_noise_is_seen():
    g = np.random.default_rng(0)

    def facts(number, bias):
        noise = 0.05 * g.normal()
        again = {"count": 20, "error": 0.41, "error_unchanged": 0.40, "bias": bias + noise, "bias_unchanged": noise}
        return {"round": number, "visits": {"count": 20, "again": again}, "calibration": {}}

    config = lf.LeadConfig().resolve()
    found = badly_calibrated([facts(number, 0.12) for number in range(1, 31)], config)
    assert found is not None and "bias +0.1" in found["text"]
    assert badly_calibrated([facts(number, 0.02) for number in range(1, 31)], config) is None


def test_rewards_say_nothing_before_the_estimator_is_calibrated():
    assert [kinds(train(150, seed, silent=40)[0]) for seed in range(40)] == [[]] * 40


def test_a_uniform_bandit_does_not_care_for_worth():
    options = PLANTED["an arm that loses its worth"][0]
    assert train(200, bandit="uniform", **options)[0] == []


def test_the_late_failure_needs_a_good_start():
    always = train(200, quality=lambda share: 4.0, fall=0.2)[0]
    assert kinds(always) == ["calibration"]


def test_a_resumed_run_goes_on_where_it_stopped():
    """The records of the rounds and `state_dict` are all that the signals are made of."""
    _, whole, notes = train(60, smoothing=0.6)
    records = [facts | {"warnings": note["warnings"]} for facts, note in zip(whole.rounds, notes, strict=True)]
    engine = SimpleNamespace(config=whole.config, record_visits=False)
    again = Signals(engine)
    again.go_on(records)
    again.load_state_dict(whole.state_dict())
    assert again.warned == whole.warned == {"smoothing"} and engine.record_visits
    more = {"smoothing": 0.6, "seed": 7}
    one, two = train(20, signals=whole, **more), train(20, signals=again, **more)
    assert one[2] == two[2] and kinds(one[0]) == []


def test_smoothing_is_replayed_as_the_engine_smooths():
    """At the engine's own coefficient the memory's utilities are the engine's: with no estimator a round adds no fall."""
    from test_engine_from_spec import Script, make_pool, rows_of, samples

    pool, first = make_pool()
    engine = lf.LeadEngine(pool, lf.LeadConfig(estimator="none", budget=1.0, rate=0.1, min_rounds=15, smoothing=0.3))
    engine.record_visits, script, memory = True, Script(first), SmoothingMemory([0.3, 0.0])
    revisits = 0
    while (rnd := engine.begin_round()) is not None:
        utility = dict(zip(rnd.rows.tolist(), rnd.utility.tolist(), strict=True))
        left = set(utility)  # the script shows some rows twice: here each is seen once a round
        for step in script.round(rnd.number, rnd.rows.tolist()):
            batch = list({shown[0]: shown for shown in step.batches[-1] if shown[0] in left}.values())
            left -= {row for row, *_ in batch}
            if batch:
                engine.observe(rows_of(batch), samples(batch))
            engine.step(lr=step.lr, num_items=step.num_items)
        visits = {name: column.numpy() for name, column in engine.end_round().visits.items()}
        if not visits or not len(visits["row"]):
            continue
        revisits += int((visits["seen_round"] > 0).sum())
        expected = [
            abs(utility[row] - loss) for row, loss in zip(visits["row"].tolist(), visits["observed"].tolist(), strict=True)
        ]
        errors = visit_errors(visits, rnd.number, "none", memory)
        assert errors["count"] == len(expected)
        assert errors["smoothing"]["0.3"] == pytest.approx(np.mean(expected), rel=1e-5)
        kinds_of = [errors[kind] for kind in ("again", "first") if errors[kind]["count"]]
        assert all(kind["error"] == kind["error_unchanged"] for kind in kinds_of)
        mean = sum(kind["count"] * kind["error"] for kind in kinds_of) / errors["count"]
        assert mean == pytest.approx(errors["smoothing"]["0"], rel=1e-5)
    assert revisits > 50


def test_a_row_twice_in_a_round_counts_once():
    visits = {"row": np.array([4, 4, 9]), "seen_round": np.array([1, 7, 0]), "seen_loss": np.array([2.0, 1.0, 3.0]),
              "observed": np.array([1.0, 0.9, 2.0]), "predicted.none": np.array([2.0, 1.0, 3.0])}  # fmt: skip
    found = visit_errors(visits, 7, "none", SmoothingMemory([0.1]))
    one = {"count": 1, "error": 1.0, "bias": 1.0, "error_unchanged": 1.0, "bias_unchanged": 1.0}
    assert found == {"count": 2, "again": one, "first": one, "smoothing": {"0.1": 1.0}}
    assert visit_errors({}, 7, "none", SmoothingMemory([0.1])) == {"count": 0}


def test_the_t_is_over_rounds():
    g = np.random.default_rng(0)
    false = 0
    for _ in range(300):  # noise that all visits of a round share: rounds are the sample, however many visits they have
        count = g.integers(1, 50, 30).astype(float)
        false += abs(paired(count, g.normal(size=30))[1]) > 3.0
    assert false <= 8
    assert paired(np.ones(20), np.full(20, 0.5)) == (0.5, math.inf)


def test_every_signature_has_its_plant():
    assert {kind for _, kind, _, _ in PLANTED.values()} == set(CHECKS)
