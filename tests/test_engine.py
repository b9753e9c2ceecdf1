"""What users add to the engine and ask of it: estimators of their own, rounds by tokens, misuse."""

import dataclasses
from io import BytesIO

import numpy as np
import pytest
import torch
from test_engine_from_spec import Script, make_pool, rows_of, run_script, same_state, samples
from torch.utils._python_dispatch import TorchDispatchMode

import lead_fast as lf
from lead_fast.estimators import GradNorm
from lead_fast.reference_state import PROXY, STEP
from lead_fast.utility import WeightChange, _mixed

OPTIONS = {"budget": 1.0, "max_uses": 3, "rate": 0.1, "min_rounds": 15}


@lf.register_estimator
class GradNormByDrop(GradNorm):
    """grad_norm once more, through the hook for anything that is not affine in a row's proxy."""

    name = "grad_norm_by_drop"

    def drop(self, table, clocks, at):
        slope, level = self.coefficients(clocks)[:, table.arm[at].long(), table.seen[STEP, at].long()]
        return (slope * table.values[PROXY, at].double() + level).float()


@lf.register_estimator
class Halving(lf.LossChangeEstimator):
    """Every loss halves by the next round: coefficients by round."""

    name = "halving"
    by_round = True

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.pairs = []

    def coefficients(self, clocks):
        level = torch.full((self.num_arms, clocks.num_rounds + 1), 0.25, dtype=torch.float64)
        return torch.stack([torch.zeros_like(level), level])

    def pair(self, table, clocks, at, loss, valid):
        self.pairs += list(zip(table.rows[at[valid]].tolist(), loss[valid].tolist(), strict=True))


def make(**options):
    pool, utility = make_pool()
    engine, script = lf.LeadEngine(pool, lf.LeadConfig(**OPTIONS | options)), Script(utility)
    engine.track(script.weights)
    return engine, script


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_an_estimator_by_drop_chooses_what_the_same_one_by_coefficients_chooses(preset):
    fast, slow = (run_script(*make(estimator=name, preset=preset), 25) for name in ("grad_norm", "grad_norm_by_drop"))
    assert [out[:3] for out in fast] == [out[:3] for out in slow] and len(fast) == 25
    np.testing.assert_allclose([out[4] for out in fast], [out[4] for out in slow], rtol=1e-5, atol=1e-7)


def test_an_estimator_of_the_user_s_sees_every_observation_and_decides_the_utilities():
    engine, _ = make(estimator="halving", smoothing=0.0)
    everything = torch.arange(len(engine.pool))
    first = torch.from_numpy(np.asarray(engine.pool.utility))
    torch.testing.assert_close(engine.utility(everything), (first - 0.25).clamp_min(0.0))
    rnd = engine.begin_round()
    shown = [(row, loss) for row, loss in zip(rnd.rows.tolist(), np.linspace(0.5, 2.0, len(rnd)).tolist(), strict=True)]
    batch = [(row, loss, 3.0, 1.0) for row, loss in shown]
    engine.observe(rows_of(batch), samples(batch))
    engine.observe(*(part(batch[:1]) for part in (rows_of, samples)))
    assert engine.estimator.pairs == [pytest.approx(pair) for pair in [*shown, shown[0]]]
    # The open round has no coefficients yet: what was just seen stands.
    torch.testing.assert_close(engine.utility(rnd.rows), torch.tensor([loss for _, loss in shown]))
    engine.step(lr=1e-3, num_items=3)
    engine.end_round()
    torch.testing.assert_close(engine.utility(rnd.rows), torch.tensor([loss - 0.25 for _, loss in shown]))


def test_rounds_by_tokens_have_the_tokens_asked_for():
    g = np.random.default_rng(0)
    tokens = g.integers(20, 200, 4000)
    pool = lf.Pool.from_arrays(
        arm=g.integers(0, 2, 4000), task=g.integers(0, 5, 4000), utility=g.gamma(4.0, 0.5, 4000)
    ).with_arrays(num_tokens=tokens)
    engine = lf.LeadEngine(pool, lf.LeadConfig(round_tokens=5000, min_rounds=0, budget=1.0))
    for _ in range(6):
        rnd = engine.begin_round()
        assert len(rnd) == round(5000 / tokens[np.asarray(pool.arm) == rnd.arm].mean()) or rnd.number > 1
        assert 3500 < tokens[rnd.rows.numpy()].sum() < 6500
        engine.end_round()
    with pytest.raises(ValueError, match=r"needs `pool\.num_tokens`"):
        lf.LeadEngine(make_pool()[0], lf.LeadConfig(round_tokens=5000))


def test_rounds_carry_their_candidates_when_asked():
    engine, _ = make(preset="paper")
    assert engine.begin_round().candidates == []
    engine.end_round()
    engine.record_candidates = True
    rnd = engine.begin_round()
    (candidates,) = rnd.candidates
    assert sorted(candidates.row[candidates.chosen].tolist()) == sorted(rnd.rows.tolist())
    assert candidates.row.tolist() == engine.groups.arm_rows(rnd.arm).tolist()  # nothing is used up yet
    torch.testing.assert_close(candidates.utility, engine.utility(candidates.row))


class Operators(TorchDispatchMode):
    """Counts what is dispatched: on a GPU about a launch each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_a_round_ends_by_a_handful_of_operators():
    engine, _ = make()
    rnd = engine.begin_round()
    assert rnd is not None
    engine.observe(rnd.rows, samples([(row, 1.5, 20, 300.0) for row in rnd.rows.tolist()]))
    engine.step(lr=1e-3, num_items=100)
    with Operators() as operators:
        report = engine.end_round()
    assert operators.count <= 12
    with Operators() as operators:
        assert engine.begin_round() is not None
    assert report.num_samples == len(rnd) and operators.count <= 32


def test_a_run_that_outgrows_the_clock_goes_on():
    engine, _ = make()
    engine.begin_round()
    for number in range(2500):
        engine.step(lr=1e-5 * (1 + number % 2), num_items=10.0)
    assert engine.clocks.num_steps == 2500 and int(engine.clocks.counters[0]) == 2500
    assert float(engine.clocks.clock[2500, 2]) == pytest.approx(2500 * 1.5e-5)
    engine.end_round()
    again = lf.LeadEngine(engine.pool, engine.config)
    again.load_state_dict(engine.state_dict())
    assert torch.equal(again.clocks.clock[:2501], engine.clocks.clock[:2501])


def test_calls_out_of_turn_and_wrong_arguments_are_named():
    engine, _ = make()
    batch = [(0, 1.0, 3.0, 1.0), (1, 1.0, 3.0, 1.0)]
    with pytest.raises(RuntimeError, match=r"LeadEngine\.observe: no round is open"):
        engine.observe(rows_of(batch), samples(batch))
    engine.begin_round()
    with pytest.raises(RuntimeError, match="round 1 must be ended first"):
        engine.begin_round()
    with pytest.raises(ValueError, match=r"`rows` must be an int64 tensor \[S\], got torch.int32 \[2\]"):
        engine.observe(rows_of(batch).int(), samples(batch))
    with pytest.raises(ValueError, match=r"`samples` must have 1 entries"):
        engine.observe(rows_of(batch[:1]), samples(batch))
    before = same_state(engine.state_dict(), engine.state_dict())
    for rows in ([0, 120], [-2, 0]):
        with pytest.raises(ValueError, match=r"observe: `rows` must be in \[-1, 120\), got"):
            engine.observe(torch.tensor(rows), samples(batch))
    assert before and int(engine.table.seen[1].sum()) == 0  # nothing was written
    for lr, num_items, name in (
        (float("nan"), 3, "lr"),
        (-1.0, 3, "lr"),
        (0.1, float("nan"), "num_items"),
        (0.1, -5, "num_items"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` must be a finite number"):
            engine.step(lr=lr, num_items=num_items)
    assert engine.clocks.num_steps == 0
    for rows, out, message in (
        (np.arange(2), samples(batch), "tensor .*, got ndarray"),
        (rows_of(batch), None, "stats='all', got None"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.observe(rows, out)


def test_a_state_of_other_arms_or_estimators_is_refused_and_changes_nothing():
    engine, _ = make()
    pool = engine.pool
    engine.begin_round()
    before = engine.state_dict()
    config = lf.LeadConfig(**OPTIONS)
    arm, task = np.asarray(pool.arm), np.asarray(pool.task)
    for changed in ({"arm": arm[::-1].copy()}, {"task": task[::-1].copy()}, {"aside": np.arange(len(arm)) < 3}):
        other = lf.LeadEngine(pool.with_arrays(**changed), config)
        kept = other.state_dict()
        with pytest.raises(ValueError, match=r"state `positions` must be .*arms, tasks or rows set aside have changed"):
            other.load_state_dict(before)
        assert same_state(other.state_dict(), kept)
    other = lf.LeadEngine(pool, dataclasses.replace(config, estimator="none"))
    with pytest.raises(ValueError, match=r"state `estimators` must be \['none'\], got \['grad_norm'\]"):
        other.load_state_dict(before)
    assert other.open_round is None


@pytest.mark.parametrize("hard_rows", ["aside", "zero"])
def test_rows_whose_prompt_does_not_help_are_chosen_where_the_configuration_says(hard_rows):
    pool, _ = make_pool()
    difficulty = np.where(np.arange(len(pool)) % 3 == 0, 1.2, 1.0).astype(np.float32)  # 1 itself is not above it
    config = lf.LeadConfig(**OPTIONS, hard_rows=hard_rows)
    engine = lf.LeadEngine(pool.with_arrays(difficulty=difficulty), config)
    chosen = []
    while (rnd := engine.begin_round()) is not None:
        chosen += rnd.rows.tolist()
        engine.end_round()
    assert (min(row % 3 for row in chosen) > 0) == (hard_rows == "aside")
    engine = lf.LeadEngine(pool.with_arrays(difficulty=difficulty + 1), config)
    assert engine.groups.num_choosable == int((~pool.aside).sum())  # there are no others


@pytest.mark.parametrize("options", [{}, {"estimator": "historical", "preset": "paper"}], ids=str)
def test_an_engine_restored_inside_a_round_goes_on_identically(options):
    engines, states = [], []
    for stops in (False, True):
        engine, script = make(**options)
        engine.record_visits = engine.record_candidates = True
        out = []
        for _ in range(12):
            rnd = engine.begin_round()
            for step in script.round(rnd.number, rnd.rows.tolist()):
                for batch in step.batches:
                    engine.observe(rows_of(batch), samples(batch))
                    if stops:
                        file = BytesIO()
                        torch.save(engine.state_dict(), file)
                        file.seek(0)
                        engine = lf.LeadEngine(engine.pool, engine.config)
                        engine.record_visits = engine.record_candidates = True
                        engine.track(script.weights)
                        engine.load_state_dict(torch.load(file, weights_only=True))
                        assert engine.open_round.rows.tolist() == rnd.rows.tolist()
                        assert len(engine.open_round.candidates) == 1
                script.move_weights(rnd.number, step.lr)
                engine.step(lr=step.lr, num_items=step.num_items)
            report = engine.end_round()
            visits = {name: column.tolist() for name, column in report.visits.items()}
            out.append(repr((rnd.rows.tolist(), report.rewards, report.calibration, report.num_samples, visits)))
        engines.append(out)
        states.append(engine.state_dict())
    assert engines[0] == engines[1]
    assert same_state(*states)


def test_a_sketch_of_many_weights_keeps_inner_products(monkeypatch):
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(40_000, generator=g), torch.randn(300, 200, generator=g).bfloat16()]
    moved = [w + (0.5 * w.float() + torch.randn(w.shape, generator=g)).to(w.dtype) for w in weights]
    sketch, exact = WeightChange(weights, size=2**12), WeightChange(weights, size=10**6)
    other_sketch, other_exact = WeightChange(moved, size=2**12), WeightChange(moved, size=10**6)
    assert exact.exact and not sketch.exact and sketch.snapshot().shape == (2**12,)
    one, two, truth = sketch.snapshot(), other_sketch.snapshot(), float(exact.snapshot() @ other_exact.snapshot())
    assert float(one @ two) == pytest.approx(truth, rel=4 * 2**-6)  # four standard deviations, 1 / sqrt(size) each
    assert float(two @ two) == pytest.approx(float(other_exact.snapshot() @ other_exact.snapshot()), rel=4 * 2**-6)
    assert not torch.equal(one, WeightChange(weights, size=2**12, seed=1).snapshot())
    monkeypatch.setattr("lead_fast.utility._SKETCHED_AT_ONCE", 999)
    torch.testing.assert_close(sketch.snapshot(), one)
    bins = torch.bincount((_mixed(torch.arange(10**6), 0) >> 1) % 1000, minlength=1000)
    assert 850 < float(((bins - 1000) ** 2 / 1000).sum()) < 1150  # chi squared of 999 degrees of freedom
    assert abs(float((_mixed(torch.arange(10**6), 0) & 1).sum()) - 5e5) < 2000
