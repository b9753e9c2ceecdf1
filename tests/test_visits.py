"""Shadows watch what the estimator in charge watches and change nothing; visits hold each prediction beside its truth."""

import math

import numpy as np
import pytest
import torch
from test_engine_from_spec import Script, make_pool, rows_of, run_script, samples

import lead_fast as lf
from lead_fast.estimators import GradNorm

OPTIONS = {"budget": 1.0, "max_uses": 3, "rate": 0.1, "min_rounds": 15}
SHADOWS = ["none", "historical", "grad_norm"]


def make(shadows=(), record=False, **options):
    pool, utility = make_pool()
    engine, script = lf.LeadEngine(pool, lf.LeadConfig(**OPTIONS | options)), Script(utility)
    engine.shadow(shadows)
    engine.record_visits = record
    engine.track(script.weights)
    return engine, script


def described(engine, name):
    estimator = engine.estimators[name]
    return estimator.describe(estimator.snapshot(engine.clocks))


def test_shadows_and_records_change_no_choice():
    plain, watched = run_script(*make(), 25), run_script(*make(SHADOWS, record=True), 25)
    assert len(plain) == 25 and repr(watched) == repr(plain)  # as text: a NaN reward equals itself


@pytest.mark.parametrize("name", SHADOWS)
def test_a_shadow_predicts_what_it_would_in_charge(name):
    # Neither a uniform bandit nor a random choice looks at a prediction, so both engines train on the same rows.
    blind = {"bandit": "uniform", "choose": "random", "exclude_top": 0.0}
    (alone, one), (watched, two) = make(estimator=name, **blind), make([name], estimator="first_seen", **blind)
    everything = torch.arange(len(alone.pool))
    for _ in range(25):
        first, second = run_script(alone, one, 1), run_script(watched, two, 1)
        assert first[0][:3] == second[0][:3]
        assert torch.equal(alone.predicted_loss(everything), watched.predicted_loss(everything, name))
        assert described(alone, name) == described(watched, name)
    changed = alone.predicted_loss(everything) != watched.predicted_loss(everything)
    assert changed.any() == (name != "none")


@lf.register_estimator
class FirstSeen(lf.LossChangeEstimator):
    """`none` under another name, so that `none` can be its shadow."""

    name = "first_seen"


def test_visits_are_what_was_predicted_and_what_came():
    engine, script = make(SHADOWS, record=True)
    last = np.zeros(len(engine.pool), int)
    barred, revisits = set(), 0
    while (rnd := engine.begin_round()) is not None:
        expected = []
        for step in script.round(rnd.number, rnd.rows.tolist()):
            for batch in step.batches:
                counts = {}  # of a row that occurs twice in a micro-batch the last finite loss counts
                for row, loss, tokens, _ in batch:
                    if row >= 0 and tokens and math.isfinite(loss) and row not in barred:
                        counts[row] = loss
                rows = torch.tensor([row for i, (row, *_) in enumerate(batch) if row in counts
                                     and row not in [b[0] for b in batch[i + 1 :]]], dtype=torch.int64)  # fmt: skip
                predicted = {name: engine.predicted_loss(rows, name).tolist() for name in SHADOWS}
                for i, row in enumerate(rows.tolist()):
                    expected.append((row, int(engine.pool.arm[row]), last[row], counts[row],
                                     *(predicted[name][i] for name in SHADOWS)))  # fmt: skip
                    revisits += int(last[row] > 0)
                barred |= {row for row, loss, tokens, _ in batch if row >= 0 and tokens and not math.isfinite(loss)}
                engine.observe(rows_of(batch), samples(batch))
                last[rows] = rnd.number
            script.move_weights(rnd.number, step.lr)
            engine.step(lr=step.lr, num_items=step.num_items)
        visits = engine.end_round().visits
        got = list(zip(*(visits[name].tolist() for name in ("row", "arm", "seen_round", "observed")),
                       *(visits[f"predicted.{name}"].tolist() for name in SHADOWS), strict=True))  # fmt: skip
        uncut = [tuple(entry[:4]) + tuple(max(loss, 0.0) for loss in entry[4:]) for entry in got]
        assert uncut == [pytest.approx(entry) for entry in expected], rnd.number
        assert visits["seen_loss"].tolist() == visits["predicted.none"].tolist()
    assert revisits > 100 and barred


@lf.register_estimator
class Halved(GradNorm):
    """Half of what grad_norm predicts."""

    name = "halved"

    def coefficients(self, clocks):
        return 0.5 * super().coefficients(clocks)


def test_a_subclass_of_grad_norm_has_its_own_predictions_recorded():
    engine, script = make(record=True, estimator="halved")
    moved = 0
    while (rnd := engine.begin_round()) is not None:
        expected = []
        for step in script.round(rnd.number, rnd.rows.tolist()):
            for batch in step.batches:
                rows, taken = rows_of(batch), samples(batch)
                at = engine.table.position[rows.clamp_min(0)].long()
                loss = engine.table.values[0, at] - engine.estimator.drop(engine.table, engine.clocks, at)
                before = len(engine._at.visits)
                engine.observe(rows, taken)
                expected.append(loss[engine._at.visits[before]["before"][0] >= 0])
            engine.step(lr=step.lr, num_items=step.num_items)
        visits = engine.end_round().visits
        assert torch.equal(visits["predicted.halved"], torch.cat(expected))
        moved += int((visits["predicted.halved"] != visits["seen_loss"]).sum())
    assert moved > 100


@lf.register_estimator
class Forgetting(lf.LossChangeEstimator):
    """A fall that ends when the row is seen again: what `pair` hears must not reach the prediction that it is compared with."""

    name = "forgetting"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.fall = None

    def drop(self, table, clocks, at):
        return torch.full(at.shape, 0.25) if self.fall is None else self.fall[at]

    def pair(self, table, clocks, at, loss, valid):
        if self.fall is None:
            self.fall = torch.full((len(table.rows) + 1,), 0.25)
        self.fall[at] = 0.0


def test_a_prediction_is_recorded_before_its_truth_is_heard():
    engine, script = make(record=True, estimator="forgetting")
    rnd = engine.begin_round()
    step = next(iter(script.round(1, rnd.rows.tolist())))
    engine.observe(rows_of(step.batches[0]), samples(step.batches[0]))
    visits = engine.end_round().visits
    assert len(visits["row"]) and torch.allclose(visits["seen_loss"] - visits["predicted.forgetting"], torch.tensor(0.25))


def test_a_refused_observation_leaves_no_record():
    engine, script = make(record=True)
    rnd = engine.begin_round()
    step = next(iter(script.round(1, rnd.rows.tolist())))
    rows, taken = rows_of(step.batches[0]), samples(step.batches[0])
    with pytest.raises(ValueError, match="`rows` must be in"):
        engine.observe(torch.full_like(rows, len(engine.pool)), taken)
    engine.observe(rows, taken)
    visits = engine.end_round().visits
    assert set(visits["row"].tolist()) <= set(rows.tolist()) and visits["seen_loss"].isfinite().all()


def test_nothing_is_recorded_unless_asked():
    engine, script = make(SHADOWS)
    rnd = engine.begin_round()
    for step in script.round(1, rnd.rows.tolist()):
        engine.observe(rows_of(step.batches[0]), samples(step.batches[0]))
    assert engine.end_round().visits is None


def test_a_restored_engine_has_its_shadows_back():
    engine, script = make(SHADOWS)
    run_script(engine, script, 12)
    state = engine.state_dict()
    again, _ = make(SHADOWS)
    again.load_state_dict(state)
    everything = torch.arange(len(engine.pool))
    for name in SHADOWS:
        assert torch.equal(engine.predicted_loss(everything, name), again.predicted_loss(everything, name))
    with pytest.raises(ValueError, match="`estimators` must be"):
        make()[0].load_state_dict(state)


def test_misuse_is_named():
    engine, script = make()
    with pytest.raises(ValueError, match="must be one of none"):
        engine.shadow(["magic"])
    with pytest.raises(ValueError, match="must be one of grad_norm, got 'none'"):
        engine.predicted_loss(torch.arange(3), "none")
    run_script(engine, script, 1)
    with pytest.raises(RuntimeError, match="before round 1"):
        engine.shadow(["none"])
    untracked = lf.LeadEngine(make_pool()[0], lf.LeadConfig(**OPTIONS))
    untracked.shadow(["historical"])
    with pytest.raises(RuntimeError, match="'historical' needs track"):
        untracked.begin_round()
